"""What is told of each step is what happened: it adds up to the answer, and trees and chances are the true ones."""

import json
from collections import defaultdict
from math import exp

import pytest

from specbackend import Engine
from specbackend.config import TREE
from specbackend.request import Request
from specbackend.sampling import pick
from specbackend.sampling_params import SamplingParams
from specbackend.speculative import tree_decoder
from tests.conftest import DEMO_TARGET, DEMOS
from tests.speculative.test_adaptive_decoder import Says, adaptive

NEW_TOKENS = 24
DRAFTS = {"EAGLE": "llama-gsm8k-eagle", "EAGLE3": "llama-gsm8k-eagle3", "STANDALONE": "llama-gsm8k"}
ALGORITHMS = [*DRAFTS, "NEXTN", "NGRAM"]
SERVER_TREE = dict(zip(TREE, (5, 4, 8), strict=True))
OWN_TREE = dict(zip(TREE, (3, 2, 5), strict=True))
REPEATED = [5, 6, 7, 8, 9, 10, 11, 12] * 4  # a text that NGRAM has something to say about


def make_engine(algorithm: str | None, **params) -> Engine:
    params = {"model_path": str(DEMO_TARGET), "speculative_adaptive": False, **params}
    if algorithm == "NEXTN":
        params["model_path"] = str(DEMOS / "mimo-gsm8k")
    if algorithm not in (None, "NGRAM"):
        params = {**SERVER_TREE, **params}
    if algorithm in DRAFTS:
        params["speculative_draft_model_path"] = str(DEMOS / DRAFTS[algorithm])
    return Engine(speculative_algorithm=algorithm, **params)


def ask(engine: Engine, prompts: list[list[int]], params: list[dict]) -> list[dict]:
    params = [{"max_new_tokens": NEW_TOKENS, **each} for each in params]
    return engine.generate(input_ids=prompts, sampling_params=params)


def traced(params: dict) -> dict:
    return {**params, "return_spec_trace": True, "logprobs": 0}


def trace_of(answer: dict) -> list[dict]:
    return answer["meta_info"]["spec_trace"]


def check(engine: Engine, prompt: list[int], answer: dict, has_draft_logprobs: bool = True, most_nodes=12) -> None:
    """The trace of a finished answer, whose logprobs are known."""
    steps, meta, text = trace_of(answer), answer["meta_info"], list(prompt)
    assert [token for step in steps for token in step["token_ids"]] == answer["output_ids"]
    assert json.loads(json.dumps(steps, allow_nan=False)) == steps
    assert [step["kind"] == "prefill" for step in steps] == [True] + [False] * meta["spec_verify_ct"]
    assert (steps[0]["prompt_tokens"], steps[0]["cached_tokens"]) == (len(prompt), meta["cached_tokens"])
    starts = [step["started_ms"] for step in steps]
    assert starts == sorted(starts) and starts[0] > 0 and starts[-1] + steps[-1]["step_ms"] < meta["e2e_latency"] * 1e3
    logprobs = iter(logprob for logprob, *_ in meta["output_token_logprobs"])
    for step in steps:
        tokens = step["token_ids"]
        assert step["token_texts"] == [engine.tokenizer.decode([t], skip_special_tokens=False) for t in tokens]
        emitted = [step["tree"]["token_ids"][node] for node in step["accepted"]] + [step["bonus"]]
        assert emitted[: len(tokens)] == tokens
        assert step is steps[-1] or len(emitted) == len(tokens)
        mine = [next(logprobs) for _ in tokens]
        if step["kind"] == "speculative":
            assert step["step_ms"] == pytest.approx(step["draft_ms"] + step["verify_ms"] + step["extend_ms"])
            assert len(step["tree"]["parents"]) <= most_nodes
            check_tree(step, text, mine, has_draft_logprobs)
        else:
            assert not {"tree", "draft_ms"} & step.keys() and not step["accepted"] and step["step_ms"] > 0
        text += tokens


def check_tree(step: dict, text: list[int], logprobs: list[float], has_draft_logprobs: bool) -> None:
    tree, children = step["tree"], defaultdict(list)
    parents, tokens = tree["parents"], tree["token_ids"]
    assert parents[0] == -1 and all(0 <= parent < node for node, parent in enumerate(parents) if node)
    assert tokens[0] == text[-1]
    assert len(tree["token_texts"]) == len(tokens) == len(parents)
    for node, parent in enumerate(parents):
        children[parent].append(node)
    for siblings in list(children.values())[1:]:
        assert len({tokens[node] for node in siblings}) == len(siblings)
        for side in ("draft_logprobs", "target_logprobs") if has_draft_logprobs else ("target_logprobs",):
            assert sum(exp(tree[side][node]) for node in siblings) <= 1 + 1e-4
    path = [0, *step["accepted"]]
    assert [parents[node] for node in path[1:]] == path[:-1]
    assert step["bonus"] not in [tokens[node] for node in children[path[-1]]]
    assert tree["draft_logprobs"][0] is tree["target_logprobs"][0] is None
    assert has_draft_logprobs or not any(tree["draft_logprobs"])
    told = [tree["target_logprobs"][node] for node in step["accepted"]][: len(logprobs)]
    assert told == pytest.approx(logprobs[: len(told)], abs=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_drafter(algorithm, demo_prompts):
    """In one batch with requests that decode plainly, that have trees of their own, and that do not ask."""
    own = {"speculative_num_draft_tokens": 5} if algorithm == "NGRAM" else OWN_TREE
    kinds = [
        {"temperature": 0},
        {"temperature": 0, **own},
        {"temperature": 0.9, "seed": 1, "top_k": 4, "repetition_penalty": 1.1},
        {"temperature": 0, "speculative": False},
        {"temperature": 0, "return_spec_trace": False},
    ]
    prompts = [REPEATED if algorithm == "NGRAM" else prompt for prompt in demo_prompts[: len(kinds)]]
    engine = make_engine(algorithm)
    answers = ask(engine, prompts, [{**traced({}), **kind} for kind in kinds])
    without = ask(engine, prompts, kinds)
    assert [answer["output_ids"] for answer in answers] == [answer["output_ids"] for answer in without]
    assert not any("spec_trace" in answer["meta_info"] for answer in [*without, answers.pop()])
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=False)):
        check(engine, prompt, answer, algorithm != "NGRAM", most_nodes=5 if index == 1 else 12)
    *drafted, plain = [[step["kind"] for step in trace_of(answer)[1:]] for answer in answers]
    assert {kind for each in drafted for kind in each} == {"speculative"} and set(plain) == {"plain"}
    assert max(len(step["accepted"]) for answer in answers for step in trace_of(answer)) > 1
    assert max(step["batch_size"] for step in trace_of(answers[0])[1:]) == 4
    assert max(step["batch_size"] for step in trace_of(answers[3])[1:]) == 1


def test_a_tree_of_its_own_is_told_as_if_it_were_alone(demo_prompts):
    """Though larger trees of the batch have it padded, here and there."""
    engine = make_engine("EAGLE3")
    params = traced({"temperature": 0, **OWN_TREE})
    [alone] = ask(engine, demo_prompts[:1], [params])
    beside, *_ = ask(engine, demo_prompts[:3], [params, {"temperature": 0}, traced({"temperature": 0})])
    alone, beside = trace_of(alone)[1:], trace_of(beside)[1:]
    for one, other in zip(alone, beside, strict=True):
        for name in ("parents", "token_ids"):
            assert one["tree"][name] == other["tree"][name]
        for name in ("draft_logprobs", "target_logprobs"):
            assert one["tree"][name] == pytest.approx(other["tree"][name], abs=1e-4)
    assert any(len(step["tree"]["parents"]) == 5 and max(step["tree"]["parents"]) > 1 for step in alone)


def test_a_draft_that_is_the_target_thinks_what_the_target_thinks(demo_prompts, monkeypatch):
    """At every node, accepted or not; where forecasts are made at the target's temperature."""
    monkeypatch.setattr(pick, "LOWEST_FORECAST_TEMPERATURE", 1.0)
    tree = dict(zip(TREE, (3, 4, 14), strict=True))
    answers = ask(make_engine("STANDALONE", **tree), demo_prompts[:2], [traced({"temperature": 0})] * 2)
    trees = [step["tree"] for answer in answers for step in trace_of(answer)[1:]]
    assert len(trees) > 8
    for tree in trees:
        assert len(tree["parents"]) == 14
        assert tree["draft_logprobs"] == pytest.approx(tree["target_logprobs"], abs=1e-3)


@pytest.mark.parametrize("algorithm", ["EAGLE3", "NGRAM"])
def test_plain_steps_of_an_adaptive_engine_are_told_as_such(algorithm, demo_prompts):
    engine = adaptive(make_engine(algorithm, speculative_adaptive=True), Says(lambda step: step % 3 == 0))
    [answer] = ask(engine, demo_prompts[:1], [traced({"temperature": 0})])
    check(engine, demo_prompts[0], answer, algorithm != "NGRAM")
    kinds = [step["kind"] for step in trace_of(answer)[1:]]
    assert kinds == ["plain" if index % 3 else "speculative" for index in range(len(kinds))]


def test_what_ends_an_answer_cuts_its_last_step(demo_prompts):
    """A length, a stop token, a stop string: only what the answer has is told, of a path that is told whole."""
    engine, prompt = make_engine("EAGLE3"), demo_prompts[0]
    greedy = {"temperature": 0, "ignore_eos": True}
    [whole] = ask(engine, [prompt], [traced(greedy)])
    ids = whole["output_ids"]
    ends = [{"max_new_tokens": count} for count in range(1, 12)]
    ends += [{"stop_token_ids": [token]} for token in ids[3:8]]
    ends += [{"stop": engine.tokenizer.decode(ids[start : start + 2])} for start in range(3, 8)]
    answers = ask(engine, [prompt] * len(ends), [traced({**greedy, **end}) for end in ends])
    cuts = []
    for end, answer in zip(ends, answers, strict=True):
        check(engine, prompt, answer)
        assert 0 < len(answer["output_ids"]) < len(ids)
        last = trace_of(answer)[-1]
        if len(last["token_ids"]) < len(last["accepted"]) + 1:
            cuts.append(next(iter(end)))
    assert set(cuts) == {"max_new_tokens", "stop_token_ids", "stop"}


@pytest.mark.parametrize("algorithm", [None, "EAGLE3"])
def test_what_is_computed_again_is_told_again(algorithm, demo_prompts):
    """A request that was retracted has another prefill, with the next token of its text."""
    engine = make_engine(algorithm, context_length=320, max_total_tokens=520)
    params = [traced({"temperature": 0, "max_new_tokens": 90, "ignore_eos": True})] * 6
    answers = ask(engine, demo_prompts[:6], params)
    for answer in answers:
        assert [token for step in trace_of(answer) for token in step["token_ids"]] == answer["output_ids"]
    prefills = [[step for step in trace_of(answer) if step["kind"] == "prefill"] for answer in answers]
    assert max(map(len, prefills)) > 1
    assert all(len(step["token_ids"]) == 1 for each in prefills for step in each)


def test_chunks_of_prompts_are_one_prefill(demo_prompts):
    engine = make_engine("EAGLE3", chunked_prefill_size=5)
    for cached in (0, len(demo_prompts[0]) - 1):
        [answer] = ask(engine, demo_prompts[:1], [traced({"temperature": 0})])
        check(engine, demo_prompts[0], answer)
        assert trace_of(answer)[0]["cached_tokens"] == cached


def test_updates_of_requests_that_do_not_ask_have_none(demo_prompts):
    engine = make_engine("EAGLE3")
    for name, asks in (("asks", True), ("does not", False)):
        params = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS, return_spec_trace=asks)
        engine.submit(Request(name, demo_prompts[0], params))
    updates = []
    while engine.has_work:
        updates += engine.step()
    assert len(updates) > 8
    assert all(bool(update.spec_trace) == (update.request_id == "asks") for update in updates)


def test_where_nobody_asks_nothing_is_kept(demo_prompts, monkeypatch):
    monkeypatch.setattr(tree_decoder, "Tracer", None)
    [answer] = ask(make_engine("EAGLE3"), demo_prompts[:1], [{"temperature": 0}])
    assert len(answer["output_ids"]) == NEW_TOKENS
    with pytest.raises(TypeError):
        ask(make_engine("EAGLE3"), demo_prompts[:1], [traced({"temperature": 0})])


def test_a_stream_tells_of_all_steps_so_far(demo_prompts):
    engine, params = make_engine("EAGLE3"), traced({"temperature": 0, "max_new_tokens": NEW_TOKENS})
    for answer in engine.generate(input_ids=demo_prompts[0], sampling_params=params, stream=True):
        assert [token for step in trace_of(answer) for token in step["token_ids"]] == answer["output_ids"]
