"""The sidecar's numbers as Triton metrics: `specbackend:radix_...`."""

import threading
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

from specbackend.radix.index import COUNTERS
from specbackend.serving.metrics import Family, Metrics, counter, gauge

PUBLISH_INTERVAL_S = 1.0


class RadixMetrics:
    """Publishes from a thread of its own, the only one that touches metrics: two that do end tritonserver."""

    def __init__(self, pb_utils: Any, labels: Mapping[str, str], get_stats: Callable[[], dict]):
        """`get_stats` may raise ConnectionError: then there is nothing new."""
        self._metrics, self._get_stats = Metrics(pb_utils, labels), get_stats
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
            self._metrics.publish(stats, [_family(name) for name, value in stats.items() if isinstance(value, int)])


def _family(name: str) -> Family:
    help = f"The radix sidecar's {name.replace('_', ' ')}"
    if name in COUNTERS:
        return counter(f"specbackend:radix_{name}_total", help, itemgetter(name))
    return gauge(f"specbackend:radix_{name}", help, itemgetter(name))
