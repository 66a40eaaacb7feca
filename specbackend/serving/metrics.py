"""What the engine and the response thread know, as Triton metrics, when REPORT_CUSTOM_METRICS asks for them.

`FAMILIES` is all of it: what is exported under which name, and where its value comes from. Names are those of Triton's
TensorRT-LLM and vLLM backends, of vLLM and of SGLang; what none of them has is called specbackend. A block of KV is one
token's slot. Models that share an engine all export its numbers, each beside its own answers.

Every call is made by the response thread: two threads that touch one metric end tritonserver.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from specbackend.engine_stats import EngineStats
from specbackend.serving.generation import AnswerRecord

PUBLISH_INTERVAL_S = 1.0  # answers wait meanwhile: some 50 calls that take 40 us each, more where cores are short
IDLE_PUBLISH_INTERVAL_S = 0.25  # when no answer is open
BLOCKS = "nv_trt_llm_kv_cache_block_metrics"  # Triton's front end makes the ORCA header for load balancers of it

TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
TENSORRT_LLM_TOKEN_BUCKETS = (10, 50, 100, 500, 1000)
FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
PER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
REQUEST_BUCKETS = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)


@dataclass
class Traffic:
    """What the response thread has seen."""

    engine_restarts: int = 0
    finished: Counter[str] = field(
        default_factory=lambda: Counter(stop=0, length=0, abort=0)
    )  # answers, by why they ended
    first_token_seconds: list[float] = field(default_factory=list)  # since the last publish, like all below
    answers: list[AnswerRecord] = field(default_factory=list)
    numbers_of_answers: list[int] = field(default_factory=list)  # of calls

    def note_answer(self, answer: AnswerRecord) -> None:
        self.finished[answer.finish_reason.value] += 1
        self.answers.append(answer)

    def forget_observations(self) -> None:
        for observed in (self.first_token_seconds, self.answers, self.numbers_of_answers):
            observed.clear()


@dataclass(frozen=True)
class Snapshot:
    engine: EngineStats
    traffic: Traffic
    timestamp: float = field(default_factory=time.time)


Number = int | float
Value = Number | Sequence[Number]  # what is new, if the family is a histogram; counters are since start
Take = Callable[[Any], Value | Mapping[str, Value]]  # of a Snapshot, in FAMILIES


@dataclass(frozen=True)
class Family:
    """How a metric looks on the metrics port, and where it comes from."""

    name: str
    kind: str  # GAUGE, COUNTER or HISTOGRAM, as in pb_utils.MetricFamily
    help: str
    take: Take
    label: str | None = None  # beside the model's; `take` gives a value for each of its values
    buckets: Sequence[float] = ()

    def values(self, snapshot: Any) -> Mapping[str | None, Value]:
        """By the label's value; of a family without label the only one, under None."""
        value = self.take(snapshot)
        return value if self.label else {None: value}


def gauge(name: str, help: str, take: Take, label: str | None = None) -> Family:
    return Family(name, "GAUGE", help, take, label)


def counter(name: str, help: str, take: Take, label: str | None = None) -> Family:
    return Family(name, "COUNTER", help, take, label)


def histogram(name: str, help: str, take: Take, buckets: Sequence[float], label: str | None = None) -> Family:
    return Family(name, "HISTOGRAM", help, take, label, buckets)


def engine(name: str) -> Take:
    """A field of EngineStats, where what the number means is said."""
    return attrgetter(f"engine.{name}")


def of_answers(name: str) -> Take:
    """A field of AnswerRecord, of all answers that have ended, but where it is None."""
    return lambda s: [value for answer in s.traffic.answers if (value := getattr(answer, name)) is not None]


def requests_by_state(s: Snapshot) -> dict[str, int]:
    e = s.engine
    return {
        "active": e.num_running + e.num_waiting,
        "max": e.max_running_requests,
        "scheduled": e.num_running,
        "context": e.num_prefilling,
        "waiting": e.num_waiting,
    }


def blocks(s: Snapshot) -> dict[str, Number]:
    e = s.engine
    return {
        "max": e.total_slots,
        "free": e.total_slots - e.used_slots,
        "used": e.used_slots,
        "tokens_per": 1,
        "reused": e.cached_tokens,
        "fraction": e.token_usage,
    }


def batcher(s: Snapshot) -> dict[str, int]:
    e = s.engine
    return {
        "total_context_tokens": e.context_tokens,
        "generation_requests": e.num_running - e.num_prefilling,
        "micro_batch_id": 0,
        "paused_requests": e.recent_retractions,
    }


def cached_by_source(s: Snapshot) -> dict[str, int]:
    """What the sidecar had fetched from its store counts as the host's: it was there when the engine asked."""
    host = s.engine.host_cached_tokens
    return {"device": s.engine.cached_tokens - host, "host": host}


RECENT = "the last decode_log_interval decode steps"
MEAN = "of each answer that has ended, the mean"
# fmt: off
FAMILIES = (
    # ---- Triton's TensorRT-LLM backend
    gauge("nv_trt_llm_request_metrics", "Requests by state", requests_by_state, "request_type"),
    gauge(BLOCKS, "KV slots by state; those that only the prefix cache holds are free", blocks, "kv_cache_block_type"),
    gauge("nv_trt_llm_inflight_batcher_metrics", "The last step, and recent retractions",
          batcher, "inflight_batcher_specific_metric"),
    gauge("nv_trt_llm_general_metrics", "Steps since start, and when they were counted",
          lambda s: {"iteration_counter": sum(s.engine.steps.values()), "timestamp": s.timestamp},
          "general_type"),
    histogram("nv_llm_input_token_len", "Tokens of the prompt", lambda s: {
        "total_input_tokens": of_answers("prompt_tokens")(s)}, TENSORRT_LLM_TOKEN_BUCKETS, "response_metric_type"),
    histogram("nv_llm_output_token_len", "Tokens of the answer", lambda s: {
        "total_output_tokens": of_answers("completion_tokens")(s)}, TENSORRT_LLM_TOKEN_BUCKETS, "response_metric_type"),

    # ---- vLLM, and Triton's vLLM backend
    gauge("vllm:num_requests_running", "Requests that hold slots", engine("num_running")),
    gauge("vllm:num_requests_waiting", "Requests that wait", engine("num_waiting")),
    gauge("vllm:kv_cache_usage_perc", "Part of the KV slots that requests hold, 1 is all", engine("token_usage")),
    counter("vllm:num_preemptions_total", "Requests that lost their slots and were computed again",
            engine("retractions")),
    counter("vllm:prompt_tokens_total", "Tokens of prompts, cached ones too", engine("prompt_tokens")),
    counter("vllm:generation_tokens_total", "Tokens generated", engine("completion_tokens")),
    counter("vllm:prefix_cache_queries_total", "Tokens of prompts that the prefix cache was asked for",
            engine("prompt_tokens")),
    counter("vllm:prefix_cache_hits_total", "Tokens of prompts that the prefix cache supplied",
            engine("cached_tokens")),
    counter("vllm:request_success_total", "Answers that have ended", attrgetter("traffic.finished"), "finished_reason"),
    histogram("vllm:time_to_first_token_seconds", "From a request's arrival to its answer's first token",
              attrgetter("traffic.first_token_seconds"), FIRST_TOKEN_BUCKETS),
    histogram("vllm:time_per_output_token_seconds", f"Time between tokens: {MEAN}",
              of_answers("seconds_per_token"), PER_TOKEN_BUCKETS),
    histogram("vllm:e2e_request_latency_seconds", "From a request's arrival to its answer's end",
              of_answers("seconds"), REQUEST_BUCKETS),
    histogram("vllm:request_prompt_tokens", "Tokens of the prompt", of_answers("prompt_tokens"), TOKEN_BUCKETS),
    histogram("vllm:request_generation_tokens", "Tokens of the answer",
              of_answers("completion_tokens"), TOKEN_BUCKETS),
    histogram("vllm:request_params_n", "Answers that a request asked for",
              attrgetter("traffic.numbers_of_answers"), (1, 2, 5, 10, 20)),
    counter("vllm:spec_decode_num_drafts_total", "Draft trees verified", engine("drafts")),
    counter("vllm:spec_decode_num_draft_tokens_total", "Nodes of draft trees verified, roots not counted",
            engine("draft_tokens")),
    counter("vllm:spec_decode_num_accepted_tokens_total", "Drafted tokens accepted", engine("accepted_tokens")),
    counter("vllm:spec_decode_num_accepted_tokens_per_pos_total", "Drafted tokens accepted, by their depth from 0 on",
            lambda s: {str(depth): count for depth, count in enumerate(s.engine.accepted_per_position)}, "position"),

    # ---- SGLang
    gauge("sglang:num_running_reqs", "Requests that hold slots", engine("num_running")),
    gauge("sglang:num_queue_reqs", "Requests that wait", engine("num_waiting")),
    gauge("sglang:num_used_tokens", "KV slots that requests hold", engine("used_slots")),
    gauge("sglang:kv_available_tokens", "KV slots that nobody holds", engine("free_slots")),
    gauge("sglang:kv_evictable_tokens", "KV slots that only the prefix cache holds", engine("evictable_slots")),
    gauge("sglang:max_total_num_tokens", "KV slots", engine("total_slots")),
    gauge("sglang:token_usage", "Part of the KV slots that requests hold", engine("token_usage")),
    gauge("sglang:cache_hit_rate", "Part of the prompt tokens since start that the prefix cache supplied",
          engine("cache_hit_rate")),
    gauge("sglang:gen_throughput", f"New tokens per second in {RECENT}; 0 when nothing runs",
          lambda s: s.engine.gen_throughput if s.engine.num_running else 0),
    gauge("sglang:spec_accept_length", f"Tokens per draft tree, bonus included, in {RECENT}", engine("accept_length")),
    gauge("sglang:spec_accept_rate", f"Part of the drafted tokens that was accepted, in {RECENT}",
          engine("accept_rate")),
    gauge("sglang:num_retracted_reqs", f"Retractions in {RECENT}", engine("recent_retractions")),
    counter("sglang:num_retracted_requests_total", "Requests that lost their slots and were computed again",
            engine("retractions")),
    counter("sglang:prompt_tokens_total", "Tokens of prompts, cached ones too", engine("prompt_tokens")),
    counter("sglang:generation_tokens_total", "Tokens generated", engine("completion_tokens")),
    counter("sglang:cached_tokens_total", "Tokens of prompts that the prefix cache supplied, by where it had them",
            cached_by_source, "cache_source"),
    counter("sglang:num_requests_total", "Answers that have ended", lambda s: s.traffic.finished.total()),
    histogram("sglang:time_to_first_token_seconds", "From a request's arrival to its answer's first token",
              attrgetter("traffic.first_token_seconds"), FIRST_TOKEN_BUCKETS),
    histogram("sglang:inter_token_latency_seconds", f"Time between tokens: {MEAN}",
              of_answers("seconds_per_token"), PER_TOKEN_BUCKETS),
    histogram("sglang:e2e_request_latency_seconds", "From a request's arrival to its answer's end",
              of_answers("seconds"), REQUEST_BUCKETS),

    # ---- ours
    counter("specbackend:engine_restarts_total", "Engines that were started because the one before had ended",
            attrgetter("traffic.engine_restarts")),
    counter("specbackend:steps_total", "Steps of the engine", engine("steps"), "kind"),
    counter("specbackend:step_seconds_total", "Time that steps took", engine("step_seconds"), "kind"),
    counter("specbackend:undrafted_steps_total", "Requests' steps that were plain because trees did not pay",
            engine("undrafted_steps")),
    gauge("specbackend:plain_share", f"Part of the steps that could have a tree and were plain, in {RECENT}",
          engine("plain_share")),
    gauge("specbackend:tree_utilization", f"Part of the rows verified, roots too, that became tokens, in {RECENT}",
          engine("tree_utilization")),
    counter("specbackend:shadow_requests_total", "Answers compared in shadow mode", engine("shadow_requests")),
    counter("specbackend:shadow_different_requests_total", "Of these, how many differed",
            engine("shadow_different_requests")),
    counter("specbackend:shadow_tokens_total", "Tokens of the answers compared in shadow mode",
            engine("shadow_tokens")),
)
# fmt: on


class Metrics:
    """A model's metrics. The first `publish` creates them, so that one thread alone touches them."""

    def __init__(self, pb_utils: Any, labels: Mapping[str, str]):
        self._pb = pb_utils
        self._labels = dict(labels)
        self._families: dict[str, Any] = {}  # kept: a metric is of no use once its family is collected
        self._metrics: dict[tuple[str, str | None], Any] = {}  # by family and its label's value
        self._told: dict[tuple[str, str | None], Number] = {}  # what gauges and counters were told last

    def publish(self, snapshot: Any, families: Iterable[Family] = FAMILIES) -> None:
        """Tell Triton what has changed; a call costs tens of microseconds. snapshot: what the families take from."""
        for family in families:
            for label, value in family.values(snapshot).items():
                self._tell(family, label, value)

    def _tell(self, family: Family, label: str | None, value: Value) -> None:
        key = family.name, label
        if key not in self._metrics:
            self._metrics[key] = self._create(family, label)
        metric = self._metrics[key]
        if family.kind == "HISTOGRAM":
            for each in value:
                metric.observe(each)
        elif family.kind == "COUNTER":
            if growth := self._growth(key, value):
                metric.increment(growth)
        elif value != self._told.get(key):
            self._told[key] = value
            metric.set(value)

    def _growth(self, key: tuple[str, str | None], total: Number) -> Number:
        """Since the last call. An engine or a sidecar that was started anew counts from 0."""
        before, self._told[key] = self._told.get(key, 0), total
        return total - before if total >= before else total

    def _create(self, family: Family, label: str | None) -> Any:
        if family.name not in self._families:
            kind = getattr(self._pb.MetricFamily, family.kind)
            self._families[family.name] = self._pb.MetricFamily(name=family.name, description=family.help, kind=kind)
        labels = {**self._labels, **({family.label: label} if family.label else {})}
        buckets = {"buckets": list(family.buckets)} if family.buckets else {}
        return self._families[family.name].Metric(labels=labels, **buckets)
