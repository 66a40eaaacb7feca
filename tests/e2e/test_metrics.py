"""What the real tritonserver shows on its metrics port, and what the engine writes to its log.

Newer tritonservers make the ORCA header of `nv_trt_llm_kv_cache_block_metrics`; this one, 2.51, does not yet.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from specbackend.serving.client import Question, ask_all, read_metrics
from specbackend.serving.metrics import FAMILIES, PUBLISH_INTERVAL_S
from specbackend.serving.tritonserver import TritonServer
from tests.e2e.conftest import ENGINE_PARAMS
from tests.e2e.test_tritonserver import chat

NUM_REQUESTS, MAX_TOKENS = 12, 48
SECRET = "Xylophone"  # in all prompts

Found = dict[str, float]  # by name and own label's value; of histograms _sum and _count


def llm_metrics(server: TritonServer) -> Found:
    found = {}
    for line, value in read_metrics(server.metrics_url).items():
        name, _, labels = line.partition("{")
        own = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if own.pop("model", "") == "llm" and "le" not in own:
            found["/".join([name, *(text for label, text in own.items() if label != "version")])] = value
    return found


def wait_for(server: TritonServer, condition: Callable[[Found], bool]) -> Found:
    """The metrics once this holds, or after a while."""
    deadline = time.monotonic() + 10
    while not condition(found := llm_metrics(server)) and time.monotonic() < deadline:
        time.sleep(PUBLISH_INTERVAL_S / 4)
    return found


def is_idle(found: Found) -> bool:
    return found.get("sglang:num_running_reqs") == 0 == found["sglang:num_queue_reqs"]


def metrics_at_rest(server: TritonServer) -> Found:
    """When nothing is published any more, also of other tests' requests."""
    found, before = wait_for(server, is_idle), {}
    while found != before:
        time.sleep(1.5 * PUBLISH_INTERVAL_S)
        found, before = llm_metrics(server), found
    return found


def question(text: str, speculative: bool) -> Question:
    inputs = {"text_input": chat(f"{text} {SECRET}"), "max_tokens": MAX_TOKENS}
    flags = ("return_perf_metrics", "return_num_input_tokens", "return_num_output_tokens")
    return Question({**inputs, **dict.fromkeys(flags, True)}, {"speculative": speculative})


@dataclass(frozen=True)
class Traffic:
    responses: list[dict]  # what clients were told, each of one answer
    before: Found
    after: Found

    def total(self, name: str) -> int:
        return sum(response[name] for response in self.responses)

    def growth(self, name: str) -> float:
        """Of this metric and those that differ from it in their own label."""
        return sum(
            value - self.before.get(key, 0) for key, value in self.after.items() if key.partition("/")[0] == name
        )


@pytest.fixture(scope="module")
def traffic(server, gsm8k_questions) -> Traffic:
    """Some requests, a third of them plain, and a few again."""
    ask_all(server.grpc_url, "llm", [question("Once before.", True)])
    before = metrics_at_rest(server)
    asked = [question(text, number % 3 > 0) for number, text in enumerate(gsm8k_questions[30 : 30 + NUM_REQUESTS])]
    answers = ask_all(server.grpc_url, "llm", asked, in_flight=6) + ask_all(server.grpc_url, "llm", asked[:4])
    finished = before["sglang:num_requests_total"] + len(answers)
    after = wait_for(server, lambda found: is_idle(found) and found["sglang:num_requests_total"] == finished)
    return Traffic([response for answer in answers for response in answer.responses], before, after)


def test_every_family_is_there(traffic):
    names = {key.partition("/")[0] for key in traffic.after}
    expected = {family.name for family in FAMILIES if family.kind != "HISTOGRAM"}
    expected |= {
        f"{family.name}_{part}" for family in FAMILIES if family.kind == "HISTOGRAM" for part in ("sum", "count")
    }
    assert expected <= names


def test_counters_and_histograms_are_what_clients_were_told(traffic):
    answers = len(traffic.responses)
    drafted = [response for response in traffic.responses if response["total_draft_tokens"]]
    tokens = {"num_input_tokens": "prompt", "num_output_tokens": "generation"}
    for told, name in tokens.items():
        total = traffic.total(told)
        for owner in ("vllm", "sglang"):
            assert traffic.growth(f"{owner}:{name}_tokens_total") == total
        assert traffic.growth(f"vllm:request_{name}_tokens_sum") == total
    assert traffic.growth("nv_llm_input_token_len_sum") == traffic.total("num_input_tokens")
    assert traffic.growth("nv_llm_output_token_len_sum") == traffic.total("num_output_tokens")
    assert traffic.growth("vllm:prefix_cache_hits_total") == traffic.total("num_cached_tokens") > 0
    assert traffic.growth("sglang:cached_tokens_total") == traffic.total("num_cached_tokens")
    assert traffic.growth("vllm:spec_decode_num_drafts_total") == sum(each["num_spec_steps"] for each in drafted) > 0
    assert traffic.growth("vllm:spec_decode_num_draft_tokens_total") == traffic.total("total_draft_tokens")
    accepted = traffic.total("total_accepted_draft_tokens")
    assert traffic.growth("vllm:spec_decode_num_accepted_tokens_total") == accepted > 0
    assert traffic.growth("vllm:spec_decode_num_accepted_tokens_per_pos_total") == accepted
    for name in ("vllm:request_success_total", "sglang:num_requests_total", "vllm:request_params_n_sum"):
        assert traffic.growth(name) == answers
    assert traffic.growth("vllm:time_per_output_token_seconds_count") == answers
    assert traffic.growth("sglang:inter_token_latency_seconds_count") == answers
    for name in ("time_to_first_token", "e2e_request_latency"):
        assert traffic.growth(f"vllm:{name}_seconds_count") == traffic.growth(f"sglang:{name}_seconds_count") == answers
    assert (
        0
        < traffic.growth("vllm:time_to_first_token_seconds_sum")
        < traffic.growth("vllm:e2e_request_latency_seconds_sum")
    )


def test_gauges_are_plausible(traffic):
    after, slots = traffic.after, ENGINE_PARAMS["max_total_tokens"]
    assert {after[f"nv_trt_llm_kv_cache_block_metrics/{kind}"] for kind in ("max", "free")} == {slots}
    assert after["nv_trt_llm_request_metrics/max"] == 48
    assert after["sglang:kv_available_tokens"] + after["sglang:kv_evictable_tokens"] == slots
    assert after["sglang:num_used_tokens"] == after["sglang:token_usage"] == after["sglang:gen_throughput"] == 0
    assert 1 < after["sglang:spec_accept_length"] <= 6 and 0 < after["sglang:spec_accept_rate"] < 1
    assert after["specbackend:plain_share"] == 0  # the server's speculation is not adaptive
    kinds = ("prefill", "plain", "speculative")
    for kind in kinds:
        steps, seconds = (
            after[f"specbackend:{name}_total/{kind}"] - traffic.before[f"specbackend:{name}_total/{kind}"]
            for name in ("steps", "step_seconds")
        )
        assert steps > 0 and seconds > 0
    # the one counts since the engine's start, the other since the server's
    counted = "nv_trt_llm_general_metrics/iteration_counter"
    assert traffic.growth("specbackend:steps_total") == after[counted] - traffic.before[counted]


def test_the_engine_writes_its_lines_to_the_servers_log(server, traffic):
    log = server.log()
    stamp = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] "
    assert re.search(
        rf"^{stamp}Prefill batch\. #new-seq: [1-6], #new-token: \d+, #cached-token: \d+, ", log, re.MULTILINE
    )
    assert re.search(rf"^{stamp}Decode batch\. .* accept len: \d\.\d\d, accept rate: 0\.\d\d, ", log, re.MULTILINE)
    assert SECRET not in log
