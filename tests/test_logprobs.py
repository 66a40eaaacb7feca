"""Logprobs are those of Hugging Face's model under Hugging Face's processors, for drafted tokens as for others."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specbackend import Engine
from specbackend.request import Request, TokenLogprob, Update
from specbackend.sampling import logprobs
from specbackend.sampling_params import SamplingParams
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET

NEW_TOKENS, TOP = 16, 5
EAGLE3 = {
    "speculative_adaptive": False,
    "speculative_algorithm": "EAGLE3",
    "speculative_draft_model_path": str(DEMO_EAGLE3),
}
SERVERS = {"plain": {}, "drafted": EAGLE3}
PARAMS = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 0.7},
    {"temperature": 0.9, "top_k": 4},
    {"temperature": 1.1, "top_p": 0.8, "repetition_penalty": 1.1},
    {"temperature": 1.0, "min_p": 0.1},
]
PROCESSORS = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}


def run(engine: Engine, prompts: list[list[int]], params: list[dict]) -> list[list[Update]]:
    updates: dict[str, list[Update]] = {str(i): [] for i in range(len(prompts))}
    for index, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        engine.submit(Request(str(index), prompt, SamplingParams.from_dict(each)))
    while engine.has_work:
        for update in engine.step():
            updates[update.request_id].append(update)
    return list(updates.values())


def hf_logprobs(hf_target, text: list[int], num_prompt: int, params: dict) -> torch.Tensor:
    """[output tokens, V]"""
    made = [kind(params[name]) for name, kind in PROCESSORS.items() if params.get(name)]
    ids = torch.tensor([text])
    with torch.no_grad():
        logits_TV = hf_target(ids).logits[0]
    rows = [LogitsProcessorList(made)(ids[:, :end], logits_TV[end - 1 : end]) for end in range(num_prompt, len(text))]
    return torch.cat(rows).log_softmax(-1)


def check(found: list[TokenLogprob], tokens: list[int], expected_PV: torch.Tensor, top: int) -> None:
    assert [each.token_id for each in found] == tokens
    for each, row_V in zip(found, expected_PV, strict=True):
        assert each.logprob == pytest.approx(row_V[each.token_id].item(), abs=1e-4)
        assert each.rank == 1 + int((row_V > row_V[each.token_id] + 1e-5).sum())
        likeliest = [logprob for logprob in row_V.topk(top).values.tolist() if logprob > -torch.inf]
        assert [logprob for _, logprob in each.top] == pytest.approx(likeliest, abs=1e-4)
        assert all(logprob == pytest.approx(row_V[token].item(), abs=1e-4) for token, logprob in each.top)


@pytest.mark.parametrize("server", SERVERS)
def test_of_every_token_that_is_picked(server, hf_target, demo_prompts):
    engine = Engine(model_path=str(DEMO_TARGET), **SERVERS[server])
    params = [{**each, "logprobs": TOP, "max_new_tokens": NEW_TOKENS, "seed": i} for i, each in enumerate(PARAMS * 2)]
    prompts = demo_prompts[: len(params)]
    params[3]["logprobs"] = 0
    params.append({"max_new_tokens": NEW_TOKENS})
    prompts.append(demo_prompts[-1])
    answers = run(engine, prompts, params)
    assert not any(update.logprobs for update in answers.pop())
    for prompt, each, updates in zip(prompts, params, answers, strict=False):
        for update in updates:
            assert [logprob.token_id for logprob in update.logprobs] == update.token_ids
        tokens = [token for update in updates for token in update.token_ids]
        expected_PV = hf_logprobs(hf_target, prompt + tokens, len(prompt), each)
        check([logprob for update in updates for logprob in update.logprobs], tokens, expected_PV, each["logprobs"])
    if server == "drafted":
        assert any(len(update.logprobs) > 2 for updates in answers for update in updates), "no draft was accepted"


@pytest.mark.parametrize("most_rows", [logprobs.MOST_ROWS, 5])
@pytest.mark.parametrize("chunk", [-1, 7])
@pytest.mark.parametrize("server", SERVERS)
def test_of_prompts(server, chunk, most_rows, hf_target, demo_prompts, monkeypatch):
    """Also where the cache holds the prompt, whose rows must be computed again."""
    monkeypatch.setattr(logprobs, "MOST_ROWS", most_rows)
    engine = Engine(model_path=str(DEMO_TARGET), chunked_prefill_size=chunk, **SERVERS[server])
    prompts = [*demo_prompts[:4], demo_prompts[4][:1]]
    params = [{"temperature": 0, "max_new_tokens": 6}] * len(prompts)
    asking = [{**each, "prompt_logprobs": top} for each, top in zip(params, (0, 3, None, 1, 2), strict=True)]
    before = run(engine, prompts, params)
    answers = run(engine, prompts, asking)
    for prompt, each, updates, unasked in zip(prompts, asking, answers, before, strict=True):
        assert [u.token_ids for u in updates] == [u.token_ids for u in unasked]
        assert not any(update.prompt_logprobs for update in updates[1:])
        with torch.no_grad():
            expected_PV = hf_target(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        if each["prompt_logprobs"] is None:
            assert not updates[0].prompt_logprobs
        else:
            check(updates[0].prompt_logprobs, prompt[1:], expected_PV, each["prompt_logprobs"])


def test_a_request_that_is_retracted_tells_its_prompt_once(hf_target, demo_prompts):
    engine = Engine(model_path=str(DEMO_TARGET), context_length=320, max_total_tokens=520, **EAGLE3)
    params = [{"temperature": 0, "max_new_tokens": 120, "ignore_eos": True, "prompt_logprobs": 1, "logprobs": 0}] * 6
    answers = run(engine, demo_prompts[:6], params)
    for prompt, updates in zip(demo_prompts, answers, strict=False):
        assert [len(update.prompt_logprobs) for update in updates if update.prompt_logprobs] == [len(prompt) - 1]
        tokens = [token for update in updates for token in update.token_ids]
        assert [logprob.token_id for update in updates for logprob in update.logprobs] == tokens
