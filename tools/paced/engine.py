"""An engine that computes nothing: each step takes its time and gives every request some tokens."""

import time
from types import SimpleNamespace

from specbackend.config import EngineConfig
from specbackend.engine_stats import EngineStats
from specbackend.request import FinishReason, Request, Update

STEP_SECONDS = 0.02  # a large model's on a GPU
TOKENS_PER_STEP = 3  # of each request, as if so many were accepted
VOCAB_SIZE = 1 << 17


def repeated(input_ids: list[int], count: int) -> list[int]:
    """What the engine says to a prompt: the prompt, over and over."""
    return (input_ids * (count // len(input_ids) + 1))[:count]


class PacedEngine:
    """Has the Engine's interface. All requests run at once, whatever its parameters are."""

    context_length = 4096
    model_config = SimpleNamespace(vocab_size=VOCAB_SIZE, eos_token_ids=())

    def __init__(self, **params):
        self.config = EngineConfig.from_params(params)
        self._running: dict[str, Request] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._running)

    def submit(self, request: Request) -> None:
        self._running[request.request_id] = request

    def cancel(self, request_id: str) -> None:
        self._running.pop(request_id, None)

    def step(self) -> list[Update]:
        time.sleep(STEP_SECONDS)
        updates = [self._advance(request) for request in self._running.values()]
        for update in updates:
            if update.finished:
                del self._running[update.request_id]
        return updates

    def stats(self) -> EngineStats:
        return EngineStats(len(self._running), num_waiting=0, free_slots=1, evictable_slots=0, total_slots=1)

    def _advance(self, request: Request) -> Update:
        start, limit = len(request.output_ids), request.params.max_new_tokens
        new = repeated(request.input_ids, limit)[start : start + TOKENS_PER_STEP]
        request.output_ids += new
        reason = FinishReason.LENGTH if len(request.output_ids) == limit else None
        return Update(request.request_id, new, reason, len(request.input_ids), len(request.output_ids))
