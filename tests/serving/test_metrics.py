"""The engine's numbers as Triton's metrics."""

from collections.abc import Iterator
from dataclasses import asdict

import pytest

from specbackend.serving.metrics import Metrics
from tests.fakes import FakePbUtils, FakeStats


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    FakePbUtils.metric_families.clear()
    yield Metrics(FakePbUtils, {"model": "llm"})
    FakePbUtils.metric_families.clear()


def values() -> dict[str, float]:
    """By name; of families with one metric."""
    return {family.name: metric.value for family in FakePbUtils.metric_families for metric in family.metrics.values()}


def publish(metrics: Metrics, requests: int, different: int, tokens: int) -> None:
    shadow = {"shadow_requests": requests, "shadow_different_requests": different, "shadow_tokens": tokens}
    metrics.publish({**asdict(FakeStats(num_running=1, num_waiting=2, free_slots=900)), **shadow})


def test_shadow_mode_is_counted(metrics):
    publish(metrics, 3, 1, 40)
    publish(metrics, 5, 1, 70)
    counters = {family.name for family in FakePbUtils.metric_families if family.kind == "counter"}
    prefix = "specbackend:shadow_"
    assert counters == {f"{prefix}{what}_total" for what in ("requests", "different_requests", "tokens")}
    assert {name: value for name, value in values().items() if name in counters} == {
        f"{prefix}requests_total": 5,
        f"{prefix}different_requests_total": 1,
        f"{prefix}tokens_total": 70,
    }
    assert values()["sglang:num_queue_reqs"] == 2


def test_counters_go_on_when_a_new_engine_counts_from_zero(metrics):
    for requests in (0, 5, 2, 4):
        publish(metrics, requests, 0, 0)
    assert values()["specbackend:shadow_requests_total"] == 5 + 4
