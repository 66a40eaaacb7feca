"""The engine's numbers as Triton metrics, when the parameter REPORT_CUSTOM_METRICS asks for them.

Every call is made by the response thread: two threads that touch one metric end tritonserver.
"""

from collections.abc import Mapping
from typing import Any

PUBLISH_INTERVAL_S = 0.25
BLOCKS = "nv_trt_llm_kv_cache_block_metrics"  # Triton's front end makes the ORCA header for load balancers of it

Stats = Mapping[str, float]  # EngineStats as a dict; the class itself would bring torch

GAUGES = {
    "sglang:num_running_reqs": "Requests that hold slots",
    "sglang:num_queue_reqs": "Requests that wait",
    "sglang:token_usage": "Part of the KV slots that running requests hold",
    "sglang:cache_hit_rate": "Part of the prompt tokens that the prefix cache supplied",
    "sglang:spec_accept_length": "Tokens per verification, bonus included",
}
COUNTERS = {  # by the field of EngineStats
    "shadow_requests": ("specbackend:shadow_requests_total", "Answers compared in shadow mode"),
    "shadow_different_requests": ("specbackend:shadow_different_requests_total", "Of these, how many differed"),
    "shadow_tokens": ("specbackend:shadow_tokens_total", "Tokens of the answers compared in shadow mode"),
}


def gauge_values(stats: Stats) -> dict[str, float]:
    return {
        "sglang:num_running_reqs": stats["num_running"],
        "sglang:num_queue_reqs": stats["num_waiting"],
        "sglang:token_usage": block_values(stats)["fraction"],
        "sglang:cache_hit_rate": stats["cached_tokens"] / max(stats["prompt_tokens"], 1),
        "sglang:spec_accept_length": stats["completion_tokens"] / max(stats["verify_steps"], 1),
    }


def block_values(stats: Stats) -> dict[str, float]:
    """A block is one token's slot; what only the prefix cache holds can be had at once, so it counts as free."""
    free = stats["free_slots"] + stats["evictable_slots"]
    total = stats["total_slots"]
    return {"max": total, "free": free, "used": total - free, "tokens_per": 1, "fraction": (total - free) / total}


class Metrics:
    """The model's metrics. The first `publish` creates them, so that this happens in the response thread, too."""

    def __init__(self, pb_utils: Any, labels: Mapping[str, str]):
        self._pb = pb_utils
        self._labels = dict(labels)
        self._families: list[Any] = []  # kept: a metric is of no use once its family is collected
        self._gauges: dict[str, Any] = {}
        self._counters: dict[str, Any] = {}  # by the field of EngineStats
        self._counted: dict[str, float] = {}

    def publish(self, stats: Stats) -> None:
        if not self._gauges:
            self._create(stats)
        for name, value in self._values(stats).items():
            self._gauges[name].set(value)
        for name, counter in self._counters.items():
            counter.increment(self._growth(name, stats[name]))

    def _values(self, stats: Stats) -> dict[str, float]:
        return gauge_values(stats) | {f"{BLOCKS}.{kind}": value for kind, value in block_values(stats).items()}

    def _growth(self, name: str, total: float) -> float:
        """Since the last call. An engine that was started anew counts from 0."""
        before, self._counted[name] = self._counted.get(name, 0), total
        return total - before if total >= before else total

    def _create(self, stats: Stats) -> None:
        for name, text in GAUGES.items():
            self._gauges[name] = self._family(name, text).Metric(labels=self._labels)
        blocks = self._family(BLOCKS, "KV slots by state")
        for kind in block_values(stats):
            self._gauges[f"{BLOCKS}.{kind}"] = blocks.Metric(labels={**self._labels, "kv_cache_block_type": kind})
        counter = self._pb.MetricFamily.COUNTER
        for field, (name, text) in COUNTERS.items():
            self._counters[field] = self._family(name, text, counter).Metric(labels=self._labels)

    def _family(self, name: str, description: str, kind: Any = None) -> Any:
        kind = self._pb.MetricFamily.GAUGE if kind is None else kind
        family = self._pb.MetricFamily(name=name, description=description, kind=kind)
        self._families.append(family)
        return family
