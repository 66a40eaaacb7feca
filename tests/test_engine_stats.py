"""What an engine counts, against what its answers say, and the lines it writes to the log."""

import logging
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specbackend import Engine
from specbackend.config import EngineConfig
from specbackend.engine_stats import DEFAULT_WINDOW, PLAIN, PREFILL, SPECULATIVE, EngineStep, StepCounts, ratio
from specbackend.request import Request, Update
from specbackend.sampling_params import SamplingParams
from specbackend.speculative.tree_shapes import tree_of
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET

TREE = {"speculative_num_steps": 3, "speculative_eagle_topk": 2, "speculative_num_draft_tokens": 5}
DRAFT = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(DEMO_EAGLE3), **TREE}
GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}


def make_engine(**params) -> Engine:
    params = {**DRAFT, "speculative_adaptive": False, "max_total_tokens": 4000, **params}
    return Engine(model_path=str(DEMO_TARGET), **params)


def total(answers: list[dict], name: str) -> int:
    return sum(answer["meta_info"][name] for answer in answers)


def test_totals_are_those_of_the_answers(demo_prompts):
    engine = make_engine(chunked_prefill_size=20)
    answers = engine.generate(input_ids=demo_prompts[:3], sampling_params=GREEDY)
    answers += engine.generate(input_ids=demo_prompts[:2], sampling_params=GREEDY)
    plain = engine.generate(input_ids=demo_prompts[:2], sampling_params={**GREEDY, "speculative": False})
    stats = engine.stats()
    every = answers + plain
    assert stats.prompt_tokens == total(every, "prompt_tokens") and stats.cached_tokens == total(every, "cached_tokens")
    assert stats.cached_tokens > 0
    assert stats.completion_tokens == total(every, "completion_tokens")
    assert stats.verify_steps == total(every, "spec_verify_ct")
    assert stats.drafts == total(answers, "spec_verify_ct")
    assert stats.draft_tokens == stats.drafts * 4
    assert stats.accepted_tokens == total(answers, "completion_tokens") - len(answers) - stats.drafts > 0
    assert sum(stats.accepted_per_position) == stats.accepted_tokens
    assert stats.accepted_per_position == sorted(stats.accepted_per_position, reverse=True)
    assert len(stats.accepted_per_position) == 3
    assert stats.undrafted_steps == 0
    assert all(stats.steps.values()) and sum(stats.step_seconds.values()) == pytest.approx(stats.busy_seconds)
    assert all(seconds > 0 for seconds in stats.step_seconds.values())


def test_steps_that_did_not_draft_are_plain(demo_prompts):
    engine = make_engine(speculative_adaptive=True)
    answer = engine.generate(input_ids=demo_prompts[0], sampling_params={**GREEDY, "max_new_tokens": 60})
    stats = engine.stats()
    assert stats.undrafted_steps > 0 and stats.drafts > 0  # the first step is a plain one, to see what that costs
    assert stats.undrafted_steps + stats.drafts == answer["meta_info"]["spec_verify_ct"]
    assert (stats.steps[PLAIN], stats.steps[SPECULATIVE]) == (stats.undrafted_steps, stats.drafts)


def test_retractions_are_counted(demo_prompts):
    engine = make_engine(context_length=200, max_total_tokens=300, disable_radix_cache=True)
    engine.generate(input_ids=[demo_prompts[0][:60]] * 4, sampling_params={**GREEDY, "max_new_tokens": 100})
    assert engine.stats().retractions > 0


steps = st.builds(
    lambda kind, tokens, seconds: (kind, tokens, seconds),
    st.sampled_from([PREFILL, PLAIN, SPECULATIVE]),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(1, 8),
)


@given(st.lists(steps, max_size=30), st.integers(0, 4))
def test_recent_is_what_happened_since_so_many_decode_steps(taken, interval):
    config = EngineConfig(model_path="-", decode_log_interval=interval, **DRAFT)
    counts, tree = StepCounts(config), tree_of(SamplingParams(), config)
    for kind, tokens, seconds in taken:
        requests = [Request(str(number), [1], tree=tree) for number in range(len(tokens))]
        updates = [
            Update(str(number), [0] * (count if kind == SPECULATIVE else 1), completion_tokens=9, spec_verify_ct=1)
            for number, count in enumerate(tokens)
        ]
        counts.note(EngineStep(kind, seconds, requests, [1] * len(requests) * (kind == PREFILL), updates, 0))
    decode_steps = [at for at, (kind, _, _) in enumerate(taken) if kind != PREFILL]
    window = interval or DEFAULT_WINDOW
    recent = taken[decode_steps[-window - 1] + 1 :] if len(decode_steps) > window else taken
    drafted = [count for kind, tokens, _ in recent if kind == SPECULATIVE for count in tokens]
    others = Counter(kind for kind, tokens, _ in recent if kind != SPECULATIVE for _ in tokens)
    numbers = counts.numbers()
    new_tokens = sum(drafted) + others.total()
    assert numbers["gen_throughput"] == ratio(new_tokens, sum(seconds for *_, seconds in recent))
    assert numbers["accept_length"] == ratio(sum(drafted), len(drafted))
    assert numbers["accept_rate"] == ratio(sum(drafted) - len(drafted), 4 * len(drafted))
    assert numbers["tree_utilization"] == ratio(sum(drafted), 5 * len(drafted))
    assert numbers["plain_share"] == ratio(others[PLAIN], others[PLAIN] + len(drafted))


DECODE_LINE = re.compile(
    r"Decode batch\. #running-req: (\d+), #token: (\d+), token usage: (0\.\d\d), "
    r"(?:accept len: (\d\.\d\d), accept rate: (0\.\d\d), )?gen throughput \(token/s\): (\d+\.\d\d), #queue-req: (\d+)"
)


def lines(caplog, kind: str) -> list[str]:
    return [line for line in caplog.messages if line.startswith(kind)]


def test_log_lines(demo_prompts, caplog):
    caplog.set_level(logging.INFO, "specbackend.engine_stats")
    engine = make_engine(decode_log_interval=3, max_running_requests=2, max_total_tokens=2000)
    prompt = demo_prompts[0]
    engine.generate(input_ids=[prompt, demo_prompts[1], prompt[:30]], sampling_params=GREEDY)
    first, last = lines(caplog, "Prefill batch.")
    new = len(prompt) + len(demo_prompts[1])
    pattern = rf"Prefill batch\. #new-seq: 2, #new-token: {new}, #cached-token: 0, token usage: 0\.0[78], "
    assert re.fullmatch(pattern + "#running-req: 2, #queue-req: 1", first)
    assert "#new-seq: 1, #new-token: 1, #cached-token: 29, " in last
    decode_lines = [DECODE_LINE.fullmatch(line) for line in lines(caplog, "Decode batch.")]
    num_decode_steps = engine.stats().steps[SPECULATIVE]
    assert len(decode_lines) == num_decode_steps // 3 and all(decode_lines)
    running, tokens, usage, accept_length, accept_rate, throughput, waiting = map(float, decode_lines[0].groups())
    assert (running, waiting) == (2, 1)
    assert usage == pytest.approx(tokens / 2000, abs=0.005)
    assert 1 <= accept_length <= 4 and accept_rate == pytest.approx((accept_length - 1) / 4, abs=0.01)
    assert throughput > 0


def test_cached_tokens_are_told_with_the_first_chunk(demo_prompts, caplog):
    engine = make_engine(chunked_prefill_size=8)
    engine.generate(input_ids=demo_prompts[0][:16], sampling_params={**GREEDY, "max_new_tokens": 1})
    caplog.set_level(logging.INFO, "specbackend.engine_stats")
    answer = engine.generate(input_ids=demo_prompts[0][:40], sampling_params={**GREEDY, "max_new_tokens": 1})
    cached = answer["meta_info"]["cached_tokens"]
    told = [re.search(r"#new-token: (\d+), #cached-token: (\d+)", line).groups() for line in caplog.messages]
    assert [int(count) for _, count in told] == [cached, *[0] * (len(told) - 1)] and cached > 0 and len(told) > 1
    assert sum(int(count) for count, _ in told) == 40 - cached


def test_plain_engines_have_no_accept_length(demo_prompts, caplog):
    caplog.set_level(logging.INFO, "specbackend.engine_stats")
    engine = Engine(model_path=str(DEMO_TARGET), decode_log_interval=5, max_total_tokens=4000)
    engine.generate(input_ids=demo_prompts[0], sampling_params=GREEDY)
    assert [DECODE_LINE.fullmatch(line)[4] for line in lines(caplog, "Decode batch.")] == [None] * (23 // 5)


def test_no_lines(demo_prompts, caplog):
    caplog.set_level(logging.INFO, "specbackend.engine_stats")
    engine = make_engine(decode_log_interval=0)
    engine.generate(input_ids=demo_prompts[0], sampling_params={**GREEDY, "max_new_tokens": 4})
    assert not caplog.messages
    assert engine.stats().accept_length >= 1
