"""Speculative decoding for as long as it pays: see `controller`."""

import time
from dataclasses import dataclass

from specbackend.batch import Accepted, DecodeBatch, ExtendBatch
from specbackend.config import TreeShape
from specbackend.request import Request
from specbackend.runner import TargetRunner, text_forward_batch
from specbackend.speculative.controller import Controller
from specbackend.speculative.decoder import Decoder, Step
from specbackend.speculative.drafter import MOST_UNFED, Drafter


@dataclass(frozen=True, kw_only=True)
class AdaptiveStep(Step):
    inner: Step
    is_drafted: bool


class AdaptiveDecoder:
    """Takes each step with trees or without, whole batches alike. The tokens are the same.

    The draft need not follow plain steps: it reads what it missed, up to MOST_UNFED tokens in one forward, before the
    next tree or when it can be no further behind.
    """

    def __init__(self, drafted: Decoder, plain: Decoder, runner: TargetRunner, drafter: Drafter, tree: TreeShape):
        """tree: the server's. Requests with trees of their own get what they asked for, and who runs with them."""
        self.num_nodes, self.runner, self.drafter = drafted.num_nodes, runner, drafter
        self.controller = Controller()
        self._drafted, self._plain, self._tree = drafted, plain, tree
        self._last_read = 0.0  # when a step's end was seen; one that is begun before then takes its time from there

    def extend(self, batch: ExtendBatch) -> Accepted:
        return self._drafted.extend(batch)

    def begin(self, batch: DecodeBatch) -> Step:
        start, is_ours = time.perf_counter(), self._is_ours(batch)
        is_drafted = not is_ours or self.controller.drafts(len(batch.requests))
        most_unfed = 1 if is_drafted else MOST_UNFED
        self._catch_up([request for request in batch.requests if request.num_unfed >= most_unfed])
        inner = (self._drafted if is_drafted else self._plain).begin(batch)
        return self._step(inner, is_drafted, start) if is_ours else inner

    def begin_next(self, step: AdaptiveStep) -> Step | None:
        """One of the same kind, or none."""
        start, requests, is_drafted = time.perf_counter(), step.batch.requests, step.is_drafted
        if self.controller.drafts(len(requests)) != is_drafted:
            return None
        if not is_drafted and any(request.num_unfed + 1 >= MOST_UNFED for request in requests):
            return None
        inner = (self._drafted if is_drafted else self._plain).begin_next(step.inner)
        return inner and self._step(inner, is_drafted, start)

    def _is_ours(self, batch: DecodeBatch) -> bool:
        return all(request.tree == self._tree for request in batch.requests)

    def _step(self, inner: Step, is_drafted: bool, start: float) -> AdaptiveStep:
        def read() -> Accepted:
            accepted = inner.read()
            num_tokens = int(accepted.count_B.sum())  # waits for the device
            end = time.perf_counter()
            self._note(inner.batch.requests, is_drafted, end - max(start, self._last_read), num_tokens)
            self._last_read = end
            return accepted

        return AdaptiveStep(inner.batch, read, inner.goes_on, inner=inner, is_drafted=is_drafted)

    def _note(self, requests: list[Request], is_drafted: bool, seconds: float, num_tokens: int) -> None:
        size = len(requests)
        if is_drafted:
            self.controller.note_drafted(size, seconds, num_tokens / size)
            return
        self.controller.note_plain(size, seconds)
        for request in requests:
            request.num_unfed += 1
            request.undrafted_ct += 1

    def _catch_up(self, requests: list[Request]) -> None:
        if not requests:
            return
        earlier = self.drafter.cache_rule.unfed_tokens
        lengths = [min(request.num_computed, request.num_unfed + earlier) for request in requests]
        starts = [request.num_computed - length for request, length in zip(requests, lengths, strict=True)]
        self.drafter.catch_up(requests, text_forward_batch(self.runner, requests, starts, lengths))
        for request in requests:
            request.num_unfed = 0
