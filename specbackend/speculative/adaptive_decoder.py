"""Speculative decoding for as long as it pays: see `controller`."""

import time

from specbackend.batch import Accepted, DecodeBatch, ExtendBatch
from specbackend.config import TreeShape
from specbackend.request import Request
from specbackend.runner import TargetRunner, text_forward_batch
from specbackend.speculative.controller import Controller
from specbackend.speculative.decoder import Decoder
from specbackend.speculative.drafter import MOST_UNFED, Drafter


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

    def extend(self, batch: ExtendBatch) -> Accepted:
        return self._drafted.extend(batch)

    def decode(self, batch: DecodeBatch) -> Accepted:
        if any(request.tree != self._tree for request in batch.requests):
            return self._decode_drafted(batch)
        start, size = time.perf_counter(), len(batch.requests)
        if self.controller.drafts(size):
            accepted = self._decode_drafted(batch)
            num_tokens = int(accepted.count_B.sum())  # waits for the device
            self.controller.note_drafted(size, time.perf_counter() - start, num_tokens / size)
        else:
            accepted = self._decode_plain(batch)
            accepted.count_B.tolist()  # as above
            self.controller.note_plain(size, time.perf_counter() - start)
        return accepted

    def _decode_drafted(self, batch: DecodeBatch) -> Accepted:
        self._catch_up([request for request in batch.requests if request.num_unfed])
        return self._drafted.decode(batch)

    def _decode_plain(self, batch: DecodeBatch) -> Accepted:
        self._catch_up([request for request in batch.requests if request.num_unfed == MOST_UNFED])
        accepted = self._plain.decode(batch)
        for request in batch.requests:
            request.num_unfed += 1
            request.undrafted_ct += 1
        return accepted

    def _catch_up(self, requests: list[Request]) -> None:
        if not requests:
            return
        earlier = self.drafter.cache_rule.unfed_tokens
        lengths = [min(request.num_computed, request.num_unfed + earlier) for request in requests]
        starts = [request.num_computed - length for request, length in zip(requests, lengths, strict=True)]
        self.drafter.catch_up(requests, text_forward_batch(self.runner, requests, starts, lengths))
        for request in requests:
            request.num_unfed = 0
