"""Shadow mode: a share of the speculative answers is decoded again without speculation, and compared.

What a shadow decodes is seen by nobody: no client, no count of tokens or steps. It never keeps a place that a live
request waits for. But plain and drafted steps take turns, so each step of shadows is one that live requests wait for:
beside these they start as a full group, to which a step costs hardly more than to one.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count

from specbackend.request import FinishReason, Request, RequestStatus, Update
from specbackend.sampling_params import SamplingParams
from specbackend.scheduler import Scheduler

MOST_AT_ONCE = 4
MOST_PENDING = 1024  # answers of a server that never has a moment for their shadows are let go
FREE_SLOTS = 0.5  # of the pool, else none is started: where slots are short, it would soon have to step aside
COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shadowed:
    """A live answer that is to be had again."""

    input_ids: list[int]
    params: SamplingParams
    output_ids: list[int]


@dataclass
class ShadowTotals:
    requests: int = 0
    different_requests: int = 0
    tokens: int = 0  # of the answers compared


class ShadowRuns:
    """Chooses, runs and compares. A shadow is a request as any other to all below."""

    def __init__(self, fraction: float, scheduler: Scheduler):
        self.totals = ShadowTotals()
        self._fraction, self._scheduler = fraction, scheduler
        self._num_offered = 0
        self._pending: deque[Shadowed] = deque()
        self._runs: dict[Request, Shadowed] = {}
        self._numbers = count()

    @property
    def has_work(self) -> bool:
        return bool(self._pending or self._runs)

    @property
    def num_waiting(self) -> int:
        """Of the scheduler's waiting requests."""
        return sum(request.status is RequestStatus.WAITING for request in self._runs)

    @property
    def num_running(self) -> int:
        return len(self._runs) - self.num_waiting

    def offer(self, request: Request) -> None:
        """A live request has ended. Take every 1/fraction-th that was speculative."""
        if request.tree is None or not request.output_ids:
            return
        before, self._num_offered = self._num_offered, self._num_offered + 1
        is_due = int(self._num_offered * self._fraction) > int(before * self._fraction)
        if is_due and len(self._pending) < MOST_PENDING:
            self._pending.append(Shadowed(request.input_ids, plain_params(request), list(request.output_ids)))

    def start(self, submit: Callable[[Request], None]) -> None:
        """One more, if there is room and nobody waits. To be called before the scheduler chooses a batch."""
        if self._pending and len(self._runs) < MOST_AT_ONCE and self._is_worth_a_step() and self._has_room():
            shadowed = self._pending.popleft()
            params = replace(shadowed.params, priority=self._scheduler.least_priority)
            request = Request(f"shadow {next(self._numbers)}", shadowed.input_ids, params)
            self._runs[request] = shadowed
            submit(request)

    def take(self, requests: list[Request], updates: list[Update]) -> list[Update]:
        """Look at what a step did: compare the shadows that have ended; return the updates of live requests."""
        ours = {request.request_id for request in self._runs}
        for request in [request for request in requests if request.finish_reason]:
            if request in self._runs:
                self._compare(self._runs.pop(request), request)
            elif request.finish_reason in COMPLETE:
                self.offer(request)
        return [update for update in updates if update.request_id not in ours]

    def step_aside(self) -> None:
        """Make way for live requests that wait for what shadows hold; these begin again later.

        To be called after a step, when those that wait are those that could not be admitted.
        """
        if len(self._scheduler.waiting) > self.num_waiting:
            self._pending.extendleft(self._runs.values())
            self._end_runs()

    def drop(self) -> None:
        self._pending.clear()
        self._end_runs()

    def _is_worth_a_step(self) -> bool:
        is_full_group = len(self._runs) + len(self._pending) >= MOST_AT_ONCE
        return is_full_group or self.num_running == len(self._scheduler.running) + len(self._scheduler.prefilling)

    def _has_room(self) -> bool:
        slots, table = self._scheduler.slots, self._scheduler.table
        free = slots.num_available >= FREE_SLOTS * slots.num_slots
        return free and bool(table.num_free_rows) and not self._scheduler.waiting

    def _end_runs(self) -> None:
        for request in self._runs:
            self._scheduler.cancel(request.request_id)
        self._runs.clear()

    def _compare(self, shadowed: Shadowed, shadow: Request) -> None:
        live_ids, shadow_ids = shadowed.output_ids, shadow.output_ids
        self.totals.requests += 1
        self.totals.tokens += len(live_ids)
        if live_ids != shadow_ids:
            self.totals.different_requests += 1
            equal = [live == other for live, other in zip(live_ids, shadow_ids, strict=False)]
            position = [*equal, False].index(False)
            log.warning("shadow mode: an answer of %d tokens differs from token %d on", len(live_ids), position)


def plain_params(request: Request) -> SamplingParams:
    """The same tokens, without speculation and without what is only told of them."""
    length = len(request.output_ids)
    return replace(
        request.params,
        seed=request.seed,
        max_new_tokens=length,
        min_new_tokens=min(request.params.min_new_tokens, length),  # an answer that a stop string ended may be shorter
        speculative=False,
        speculative_num_steps=None,
        speculative_eagle_topk=None,
        speculative_num_draft_tokens=None,
        n=1,
        logprobs=None,
        prompt_logprobs=None,
        return_spec_trace=False,
    )
