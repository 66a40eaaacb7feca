"""Work that nobody waits for."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

log = logging.getLogger(__name__)


class BoundedWorker:
    """One thread and a queue before it; what comes when the queue is full is dropped."""

    def __init__(self, name: str, most_waiting: int):
        self._name = name
        self._executor = ThreadPoolExecutor(1, name)
        self._room = threading.BoundedSemaphore(most_waiting)
        self.num_dropped = 0

    def submit(self, function: Callable[..., Any], *args: object) -> Future | None:
        """The future result; None if this is dropped."""
        if not self._room.acquire(blocking=False):
            self.num_dropped += 1
            return None
        future = self._executor.submit(function, *args)
        future.add_done_callback(self._done)
        return future

    def close(self) -> None:
        """Forget what waits, and wait for what runs."""
        self._executor.shutdown(cancel_futures=True)

    def _done(self, future: Future) -> None:
        self._room.release()
        if not future.cancelled() and (error := future.exception()):
            log.error("%s: %s", self._name, type(error).__name__, exc_info=error)
