"""Leaves alone for a while what has just failed."""

import threading
import time

FIRST_DELAY_S, LONGEST_DELAY_S = 0.1, 5.0


class CircuitBreaker:
    """Open, which means closed to calls, after a failure; twice as long after each further one. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_failures = 0
        self._open_until = 0.0

    @property
    def is_open(self) -> bool:
        return time.monotonic() < self._open_until

    def succeed(self) -> None:
        with self._lock:
            self._num_failures = 0

    def fail(self) -> int:
        """Returns how many failures there were since the last success."""
        with self._lock:
            delay = min(FIRST_DELAY_S * 2 ** min(self._num_failures, 30), LONGEST_DELAY_S)
            self._num_failures += 1
            self._open_until = time.monotonic() + delay
            return self._num_failures
