"""The sidecar's numbers as Triton metrics: `specbackend:radix_...`."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

from specbackend.radix.index import COUNTERS

PUBLISH_INTERVAL_S = 1.0


class RadixMetrics:
    """Publishes from a thread of its own, the only one that touches metrics: two that do end tritonserver."""

    def __init__(self, pb_utils: Any, labels: Mapping[str, str], get_stats: Callable[[], dict]):
        """`get_stats` may raise ConnectionError: then there is nothing new."""
        self._pb, self._labels, self._get_stats = pb_utils, dict(labels), get_stats
        self._metrics: dict[str, Any] = {}
        self._families: list[Any] = []  # kept: a metric is of no use once its family is collected
        self._counted: dict[str, float] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="radix metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(PUBLISH_INTERVAL_S):
            try:
                stats = self._get_stats()
            except ConnectionError:
                continue
            for name, value in stats.items():
                if isinstance(value, int):
                    self._publish(name, value)

    def _publish(self, name: str, value: int) -> None:
        if name not in self._metrics:
            self._metrics[name] = self._create(name)
        if name in COUNTERS:
            self._metrics[name].increment(self._growth(name, value))
        else:
            self._metrics[name].set(value)

    def _growth(self, name: str, total: int) -> int:
        """Since the last time. A sidecar that was started anew counts from 0."""
        before, self._counted[name] = self._counted.get(name, 0), total
        return total - before if total >= before else total

    def _create(self, name: str) -> Any:
        kinds, is_counter = self._pb.MetricFamily, name in COUNTERS
        family = self._pb.MetricFamily(
            name=f"specbackend:radix_{name}{'_total' if is_counter else ''}",
            description=f"The radix sidecar's {name.replace('_', ' ')}",
            kind=kinds.COUNTER if is_counter else kinds.GAUGE,
        )
        self._families.append(family)
        return family.Metric(labels=self._labels)
