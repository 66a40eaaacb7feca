"""The table of metrics, what becomes of it on Triton's side, and what the response thread notes."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specbackend.engine_stats import EngineStats
from specbackend.request import FinishReason
from specbackend.serving.generation import AnswerRecord
from specbackend.serving.metrics import FAMILIES, Metrics, Snapshot, Traffic
from tests.fakes import FakeMetric, FakePbUtils, FakeRequest
from tests.serving.conftest import SLOW_ENGINE

IDLE = EngineStats(num_running=0, num_waiting=0, free_slots=600, evictable_slots=400, total_slots=1000)


@pytest.fixture(autouse=True)
def no_families() -> Iterator[None]:
    FakePbUtils.metric_families.clear()
    yield
    FakePbUtils.metric_families.clear()


def exported() -> dict[str, FakeMetric]:
    """Metrics by name and label's value, as Triton has them."""
    names = {}
    for family in FakePbUtils.metric_families:
        for labels, metric in family.metrics.items():
            own = [value for name, value in json.loads(labels).items() if name not in ("model", "version")]
            names["/".join([family.name, *own])] = metric
    return names


def values(*engines: EngineStats, traffic: Traffic | None = None) -> dict[str, float]:
    """Of gauges and counters after these; a counter that nothing was added to is 0."""
    FakePbUtils.metric_families.clear()
    metrics = Metrics(FakePbUtils, {"model": "llm"})
    for engine in engines:
        metrics.publish(Snapshot(engine, traffic or Traffic()))
    return {name: metric.value or 0 for name, metric in exported().items()}


def test_names_are_those_of_one_family_each():
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    assert all(family.name.endswith("_total") == (family.kind == "COUNTER") for family in FAMILIES)
    assert all(bool(family.buckets) == (family.kind == "HISTOGRAM") for family in FAMILIES)
    assert all(list(family.buckets) == sorted(set(family.buckets)) for family in FAMILIES)


def test_every_number_of_the_engine_is_exported_somewhere():
    """Each changed alone changes something."""
    busy = replace(IDLE, num_running=5, cached_tokens=50, gen_throughput=1.0)
    before = values(busy)
    for name, value in vars(busy).items():
        changed = [7, 6] if name == "accepted_per_position" else {"plain": 7} if isinstance(value, dict) else value + 3
        after = values(replace(busy, **{name: changed}))
        different = {key for key in after if after.get(key) != before.get(key) and "timestamp" not in key}
        assert different or name in ("verify_steps", "busy_seconds"), f"{name} is exported nowhere"


def test_values():
    engine = EngineStats(
        num_running=3, num_waiting=2, free_slots=500, evictable_slots=300, total_slots=1000, num_prefilling=1,
        max_running_requests=48, context_tokens=17, prompt_tokens=400, cached_tokens=100, host_cached_tokens=30,
        completion_tokens=90, drafts=20, undrafted_steps=4, draft_tokens=140, accepted_tokens=45,
        accepted_per_position=[18, 15, 12], retractions=6, steps={"prefill": 3, "plain": 4, "speculative": 20},
        step_seconds={"prefill": 0.5, "plain": 0.25, "speculative": 2.0}, gen_throughput=55.5, accept_length=3.25,
        accept_rate=0.32, tree_utilization=0.41, plain_share=0.17, recent_retractions=2,
    )  # fmt: skip
    got = values(engine, traffic=Traffic(engine_restarts=2))
    blocks = {"max": 1000, "free": 800, "used": 200, "tokens_per": 1, "reused": 100, "fraction": 0.2}
    states = {"active": 5, "max": 48, "scheduled": 3, "context": 1, "waiting": 2}
    last_step = {"total_context_tokens": 17, "generation_requests": 2, "micro_batch_id": 0, "paused_requests": 2}
    labelled = {
        "nv_trt_llm_kv_cache_block_metrics": blocks,
        "nv_trt_llm_request_metrics": states,
        "nv_trt_llm_inflight_batcher_metrics": last_step,
        "vllm:spec_decode_num_accepted_tokens_per_pos_total": {"0": 18, "1": 15, "2": 12},
        "sglang:cached_tokens_total": {"device": 70, "host": 30},
        "specbackend:steps_total": engine.steps,
        "specbackend:step_seconds_total": engine.step_seconds,
    }
    expected = {f"{name}/{label}": value for name, those in labelled.items() for label, value in those.items()}
    expected |= {
        "nv_trt_llm_general_metrics/iteration_counter": 27,
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 2,
        "vllm:num_preemptions_total": 6,
        "vllm:prompt_tokens_total": 400,
        "vllm:prefix_cache_hits_total": 100,
        "vllm:generation_tokens_total": 90,
        "vllm:spec_decode_num_drafts_total": 20,
        "vllm:spec_decode_num_draft_tokens_total": 140,
        "vllm:spec_decode_num_accepted_tokens_total": 45,
        "sglang:token_usage": 0.2,
        "sglang:num_used_tokens": 200,
        "sglang:cache_hit_rate": 0.25,
        "sglang:gen_throughput": 55.5,
        "sglang:spec_accept_length": 3.25,
        "sglang:spec_accept_rate": 0.32,
        "sglang:num_retracted_reqs": 2,
        "specbackend:engine_restarts_total": 2,
        "specbackend:undrafted_steps_total": 4,
        "specbackend:plain_share": 0.17,
        "specbackend:tree_utilization": 0.41,
    }
    assert {name: got[name] for name in expected} == expected
    assert abs(got["nv_trt_llm_general_metrics/timestamp"] - time.time()) < 60


def test_an_idle_engine_generates_nothing():
    busy = replace(IDLE, num_running=1, gen_throughput=80.0, accept_length=3.0)
    assert values(busy)["sglang:gen_throughput"] == 80
    idle = values(busy, replace(busy, num_running=0))
    assert (idle["sglang:gen_throughput"], idle["sglang:spec_accept_length"]) == (0, 3)


@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=4), max_size=4))
def test_counters_go_on_when_a_new_engine_counts_from_zero(lives):
    """growth: of each life. A new engine is told of before it has counted as much as the one before."""
    totals = [sum(growth[: end + 1]) for growth in lives for end in range(-1, len(growth))]
    got = values(*(replace(IDLE, shadow_requests=total, accepted_per_position=[total]) for total in totals))
    expected = sum(map(sum, lives))
    assert got.get("specbackend:shadow_requests_total", 0) == expected
    assert got.get("vllm:spec_decode_num_accepted_tokens_per_pos_total/0", 0) == expected


def test_what_has_not_changed_is_not_told_again():
    """A call costs tens of microseconds."""
    metrics = Metrics(FakePbUtils, {"model": "llm"})
    metrics.publish(Snapshot(IDLE, Traffic(), timestamp=1.0))
    for metric in exported().values():
        metric.threads.clear()
    metrics.publish(Snapshot(replace(IDLE, num_waiting=4), Traffic(), timestamp=1.0))
    told = {name for name, metric in exported().items() if metric.threads}
    assert told == {
        "nv_trt_llm_request_metrics/active",
        "nv_trt_llm_request_metrics/waiting",
        "vllm:num_requests_waiting",
        "sglang:num_queue_reqs",
    }


def test_histograms_observe_what_is_new():
    traffic = Traffic(first_token_seconds=[0.25], numbers_of_answers=[2])
    traffic.note_answer(AnswerRecord(FinishReason.STOP, 10, 5, first_token_seconds=0.5, seconds=2.5))
    traffic.note_answer(AnswerRecord(FinishReason.LENGTH, 20, 1, first_token_seconds=0.5, seconds=0.5))
    metrics = Metrics(FakePbUtils, {"model": "llm"})
    metrics.publish(Snapshot(IDLE, traffic))
    traffic.forget_observations()
    metrics.publish(Snapshot(IDLE, traffic))
    got = {name: metric.observed for name, metric in exported().items() if metric.buckets}
    first, tokens, seconds, prompts, answers = [0.25], [0.5], [2.5, 0.5], [10, 20], [5, 1]
    assert got == {
        "nv_llm_input_token_len/total_input_tokens": prompts,
        "nv_llm_output_token_len/total_output_tokens": answers,
        "vllm:time_to_first_token_seconds": first,
        "vllm:time_per_output_token_seconds": tokens,
        "vllm:e2e_request_latency_seconds": seconds,
        "vllm:request_prompt_tokens": prompts,
        "vllm:request_generation_tokens": answers,
        "vllm:request_params_n": [2],
        "sglang:time_to_first_token_seconds": first,
        "sglang:inter_token_latency_seconds": tokens,
        "sglang:e2e_request_latency_seconds": seconds,
    }
    counted = {name.removeprefix("vllm:request_success_total/"): metric.value for name, metric in exported().items()}
    assert (counted["stop"], counted["length"], counted["sglang:num_requests_total"]) == (1, 1, 2)


def ask(adapter, **inputs) -> FakeRequest:
    request = FakeRequest(**{"text_input": "abc", **inputs})
    adapter.execute([request])
    request.sender.wait()
    return request


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def test_answers_are_observed_once_each(start_adapter):
    """Two ends by length, one by a stop string, one failed; a call for two answers is one call."""
    start = time.monotonic()
    adapter = start_adapter(REPORT_CUSTOM_METRICS="true")
    requests = [
        ask(adapter, max_tokens=30, stream=True),
        ask(adapter, max_tokens=9, num_return_sequences=2, seed=1),
        ask(adapter, max_tokens=40, text_input="abcdefgh", stop_words=["ef"]),
        ask(adapter, text_input="fail"),
    ]
    assert requests[-1].sender.error()
    wait_until(lambda: len(exported()["vllm:request_generation_tokens"].observed) == 4)
    generated = exported()["vllm:request_generation_tokens"].observed
    assert sorted(generated)[1:] == [9, 9, 30] and 6 <= min(generated) < 40  # until the engine heard of the stop string
    assert sorted(exported()["vllm:request_prompt_tokens"].observed) == [3, 3, 3, 8]
    assert exported()["vllm:request_params_n"].observed == [1, 2, 1]
    latencies = ("vllm:time_to_first_token_seconds", "vllm:e2e_request_latency_seconds")
    firsts, seconds = (exported()[name].observed for name in latencies)
    assert len(firsts) == len(seconds) == 4
    assert min(firsts) > 0 and max(seconds) < time.monotonic() - start
    assert sum(firsts) < sum(seconds)
    ends = {name: metric.value for name, metric in exported().items() if "request_success" in name}
    assert ends == {
        f"vllm:request_success_total/{why}": count for why, count in (("stop", 1), ("length", 3), ("abort", 1))
    }


def test_answers_that_are_given_up_are_counted(start_adapter):
    adapter = start_adapter(SLOW_ENGINE, REPORT_CUSTOM_METRICS="true")
    aborted = "vllm:request_success_total/abort"
    ask(adapter, max_tokens=400, num_return_sequences=2, seed=1, timeout=100_000)
    wait_until(lambda: exported()[aborted].value == 2)
    running = FakeRequest("it", text_input="abc", max_tokens=400)
    adapter.execute([running])
    adapter.execute([FakeRequest("it", stop=True)])
    wait_until(lambda: exported()[aborted].value == 3)
    ask(adapter, max_tokens=400, text_input="crash")
    wait_until(lambda: exported()[aborted].value == exported()["sglang:num_requests_total"].value == 4)


def test_metrics_are_there_from_the_start_and_right_after_a_restart(start_adapter):
    """No request is needed for that."""
    adapter = start_adapter(REPORT_CUSTOM_METRICS="true")
    wait_until(lambda: "specbackend:engine_restarts_total" in exported())
    assert exported()["sglang:kv_available_tokens"].value == 1000
    for count in (1, 2):
        ask(adapter, text_input="crash", max_tokens=5)
        wait_until(lambda count=count: exported()["specbackend:engine_restarts_total"].value == count)
        assert exported()["sglang:num_running_reqs"].value == 0
