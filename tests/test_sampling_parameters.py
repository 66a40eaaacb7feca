"""Request parameters on the whole engine: drafted output is that of plain decoding, and that of Hugging Face."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from specbackend import Engine
from specbackend.errors import InvalidRequest
from specbackend.request import Request
from specbackend.sampling_params import SamplingParams
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET

NEW_TOKENS = 24
VOCAB_SIZE = 1024
TREE = {"speculative_num_steps": 5, "speculative_eagle_topk": 4, "speculative_num_draft_tokens": 16}
EAGLE3 = {
    "speculative_adaptive": False,
    "speculative_algorithm": "EAGLE3",
    "speculative_draft_model_path": str(DEMO_EAGLE3),
    **TREE,
}


def make_engine(**params) -> Engine:
    return Engine(model_path=str(DEMO_TARGET), **params)


def output_ids(engine: Engine, prompts: list[list[int]], params: list[dict] | dict) -> list[list[int]]:
    return [answer["output_ids"] for answer in engine.generate(input_ids=prompts, sampling_params=params)]


class FrequencyPenalty(LogitsProcessor):
    """Hugging Face has none."""

    def __init__(self, penalty: float, prompt_length: int):
        self.penalty, self.prompt_length = penalty, prompt_length

    def __call__(self, input_ids, scores):
        counts = torch.bincount(input_ids[0, self.prompt_length :], minlength=scores.shape[1])
        return scores - self.penalty * counts


def test_greedy_with_penalties_equals_hf_generate(hf_target, demo_prompts):
    prompts, expected = demo_prompts[:20], []
    for prompt in prompts:
        output = hf_target.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            repetition_penalty=1.3,
            logits_processor=LogitsProcessorList([FrequencyPenalty(0.5, len(prompt))]),
        )
        expected.append(output[0, len(prompt) :].tolist())
    params = {
        "temperature": 0,
        "max_new_tokens": NEW_TOKENS,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.5,
    }
    engine = make_engine(**EAGLE3)
    assert output_ids(engine, prompts, params) == expected
    assert engine.stats().verify_steps < sum(map(len, expected)), "no draft was accepted: nothing is tested"


MIXED = [
    {"temperature": 0},
    {"temperature": 0.8, "top_k": 5},
    {"temperature": 1.2, "top_p": 0.9, "presence_penalty": 0.8},
    {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.2},
    {"temperature": 0, "frequency_penalty": 1.0, "min_new_tokens": 20},
    {"temperature": 0.7, "logit_bias": {"20": 4.0, "33": -3.0}, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 1.0, "allowed_token_ids": list(range(0, VOCAB_SIZE, 3)), "min_new_tokens": 8},
    {"temperature": 0.9, "frequency_penalty": -0.3, "stop_token_ids": [30], "min_new_tokens": 12},
    {"temperature": 1.0},
    {"temperature": 0, "repetition_penalty": 0.8, "presence_penalty": 2.0, "logit_bias": {40: 1.5}},
]


@pytest.fixture(scope="module")
def plain(demo_prompts) -> tuple[list[dict], list[list[int]]]:
    """Parameters of a mixed batch, and what plain decoding makes of each request alone."""
    engine = make_engine(max_running_requests=1)
    params = [{**each, "max_new_tokens": NEW_TOKENS, "seed": 100 + i} for i, each in enumerate(MIXED * 2)]
    with_bad_words = params[::3]  # which are what the answers would begin with
    first = output_ids(engine, demo_prompts[:20:3], [{**each, "max_new_tokens": 10} for each in with_bad_words])
    for each, answer in zip(with_bad_words, first, strict=True):
        each["bad_words_ids"] = [answer[:1], answer[3:6], answer[8:10]]
    return params, output_ids(engine, demo_prompts[:20], params)


@pytest.mark.parametrize("pool", [{}, {"context_length": 320, "max_total_tokens": 520}], ids=["roomy", "retracting"])
def test_a_mixed_batch_drafted_is_each_request_alone_and_plain(pool, plain, demo_prompts):
    params, expected = plain
    engine = make_engine(**EAGLE3, **pool, chunked_prefill_size=50)
    assert output_ids(engine, demo_prompts[:20], params) == expected
    assert engine.stats().verify_steps < 0.8 * sum(map(len, expected)), "hardly any draft was accepted"


def test_parameters_do_what_their_names_say(plain, demo_prompts):
    params, answers = plain
    eos = make_engine().model_config.eos_token_ids
    for each, answer in zip(params, answers, strict=True):
        ends = {*eos, *each.get("stop_token_ids", [])}
        assert not ends & set(answer[: each.get("min_new_tokens", 0)])
        assert set(answer) <= set(each.get("allowed_token_ids", range(VOCAB_SIZE)))
        for word in each.get("bad_words_ids", []):
            assert all(answer[i : i + len(word)] != word for i in range(len(answer)))


def test_speculation_switched_off_for_a_request_changes_nothing(plain, demo_prompts):
    params, expected = plain
    some_plain = [{**each, "speculative": index % 2 == 0} for index, each in enumerate(params)]
    assert output_ids(make_engine(**EAGLE3), demo_prompts[:20], some_plain) == expected


@pytest.mark.parametrize(
    "params, field",
    [
        ({"logit_bias": {str(VOCAB_SIZE): 1.0}}, "logit_bias"),
        ({"allowed_token_ids": [1, VOCAB_SIZE]}, "allowed_token_ids"),
        ({"bad_words_ids": [[1, VOCAB_SIZE]]}, "bad_words_ids"),
        ({"allowed_token_ids": [5], "bad_words_ids": [[5, 5]]}, "allowed_token_ids"),
    ],
    ids=str,
)
def test_the_engine_refuses_by_name(params, field):
    engine = make_engine()
    with pytest.raises(InvalidRequest) as refusal:
        engine.submit(Request("a", [1, 2], SamplingParams.from_dict(params)))
    assert refusal.value.field == field
    assert not engine.has_work


def test_stop_ids_outside_the_vocabulary_do_no_harm():
    params = {"temperature": 0, "max_new_tokens": 4, "min_new_tokens": 2, "stop_token_ids": [VOCAB_SIZE, 1 << 30]}
    assert len(make_engine(**EAGLE3).generate(input_ids=[1, 2, 3], sampling_params=params)["output_ids"]) == 4


@pytest.mark.parametrize("server", [{}, EAGLE3], ids=["plain", "drafted"])
def test_no_end_before_min_new_tokens(server, demo_prompts):
    """Of a text that would end at once."""
    engine = make_engine(**server)
    eos = min(engine.model_config.eos_token_ids)
    params = {"temperature": 0, "logit_bias": {eos: 1000.0}}
    for more, length in (({}, 1), ({"min_new_tokens": 6}, 7), ({"min_new_tokens": 6, "ignore_eos": True}, 9)):
        params |= {"max_new_tokens": 9, **more}
        answer = engine.generate(input_ids=demo_prompts[0], sampling_params=params)["output_ids"]
        assert len(answer) == length
        assert [token == eos for token in answer] == [
            count >= params.get("min_new_tokens", 0) for count in range(length)
        ]


@pytest.mark.parametrize("server", [{}, EAGLE3], ids=["plain", "drafted"])
def test_a_text_goes_on_after_retraction_as_it_would_have(server, demo_prompts):
    """Prefill then picks the token after the output's last, which the penalties and bad words must see."""
    engine, prompt = make_engine(**server), demo_prompts[1]
    params = {"temperature": 0, "max_new_tokens": 12, "frequency_penalty": 0.4}
    first = engine.generate(input_ids=prompt, sampling_params=params)["output_ids"]
    params["bad_words_ids"] = [first[i : i + 2] for i in range(4, 8)]
    answer = engine.generate(input_ids=prompt, sampling_params=params)["output_ids"]
    assert answer[:5] == first[:5] and answer[5] != first[5]
    for count in range(1, 12):
        engine.submit(Request("a", prompt, SamplingParams.from_dict(params), output_ids=answer[:count]))
        rest = []
        while engine.has_work:
            rest += [token for update in engine.step() for token in update.token_ids]
        assert rest == answer[count:]
