"""Engines that go wrong in ways of their own, for `--engine tests.serving.engines:NAME`."""

import time

from specbackend.serving import connections
from tests.fakes import FakeEngine

STUCK_SEED = 14  # a random_seed with which the engine never finishes loading


class StuckEngine(FakeEngine):
    def __init__(self, **params):
        super().__init__(**params)
        if self.config.random_seed == STUCK_SEED:
            time.sleep(3600)


class ImpatientEngine(FakeEngine):
    """Waits less for adapters that do not read, those that connect once it has loaded."""

    def __init__(self, **params):
        super().__init__(**params)
        connections.SEND_TIMEOUT = connections.as_timeval(0.5)


class UnluckyEngine(FakeEngine):
    """Takes its time to find out that it cannot load."""

    def __init__(self, **params):
        time.sleep(1)
        super().__init__(**params)
