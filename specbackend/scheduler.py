"""Who runs next, on which slots, and what became of it."""

import bisect
import time
from array import array
from collections.abc import Callable, Sequence

from specbackend.batch import Accepted, DecodeBatch, ExtendBatch, traced_rows
from specbackend.cache.kv_pool import RequestTable
from specbackend.cache.radix_tree import shared_length
from specbackend.cache.slots import PinnedPrefix, SlotManager
from specbackend.config import EngineConfig
from specbackend.errors import QueueFull
from specbackend.request import Failure, FinishReason, Request, RequestStatus, TokenLogprob, Update
from specbackend.sampling_params import UNLIMITED
from specbackend.spec_trace import StepTrace, first_tokens
from specbackend.speculative.drafter import CacheRule

OLDEST_EVERY = 16  # of so many admissions one is the oldest's, whatever the policy says, so that nobody waits for ever
MOST_COMPARED = 128  # of the waiting requests, by lpm: looking for prefixes takes time


class Scheduler:
    """Continuous batching with chunked prefill.

    A request of n computed tokens owns the slots of table columns [0, n + reserve), where reserve is `num_nodes` while
    it decodes, or more if a step was to be begun ahead. The first `len(pinned.slots)` of them belong to the prefix
    cache and are pinned there.

    bring: has a lower tier add to the cache what it knows of a text, given with its salt.
    """

    def __init__(
        self,
        config: EngineConfig,
        slots: SlotManager,
        table: RequestTable,
        num_nodes: int,
        context_length: int,
        eos_token_ids: frozenset[int],
        cache_rule: CacheRule,
        bring: Callable[[Sequence[int], str | None], None] | None = None,
    ):
        self.config, self.slots, self.table = config, slots, table
        self.num_nodes, self.context_length, self.eos_token_ids = num_nodes, context_length, eos_token_ids
        self.cache_rule, self._bring = cache_rule, bring
        self.waiting: list[Request] = []  # in order of arrival
        self.prefilling: list[Request] = []
        self.running: list[Request] = []
        self._pinned: dict[Request, PinnedPrefix] = {}
        self._num_owned: dict[Request, int] = {}  # table columns that hold a slot
        self._num_drafted: dict[Request, int | None] = {}  # see `SlotManager.share`
        self.num_retracted = 0  # since start
        self._num_arrived = 0
        self._num_admitted = 0
        self._last_was_extend = False
        self._last_was_plain = False

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.prefilling or self.running)

    @property
    def least_priority(self) -> int:
        """Of a request that is more urgent than nobody."""
        if not self.config.enable_priority_scheduling:
            return 0
        return UNLIMITED if self.config.schedule_low_priority_values_first else -UNLIMITED

    def add(self, request: Request) -> None:
        if len(self.waiting) >= self.config.max_queued_requests:
            raise QueueFull("Exceeds maximum queue size")
        request.arrival = self._num_arrived
        self._num_arrived += 1
        self.waiting.append(request)

    def cancel(self, request_id: str) -> Request | None:
        """Forget a request, free what it holds and return it; an unknown id is none of our business any more."""
        for queue in (self.waiting, self.prefilling, self.running):
            for request in queue:
                if request.request_id == request_id:
                    queue.remove(request)
                    self._finish(request, FinishReason.ABORT)
                    return request
        return None

    # ---- schedule ----

    def schedule(self) -> ExtendBatch | DecodeBatch | None:
        """Prompt chunks and decode steps take turns, so neither starves the other."""
        self._admit()
        extend_next = self.prefilling and not (self.running and self._last_was_extend)
        self._last_was_extend = bool(extend_next)
        if extend_next:
            return self._extend_batch()
        return self._decode_batch()

    def _admit(self) -> None:
        """Start those whose turn it is, until one does not fit: it is not overtaken by smaller ones."""
        while (request := self._next_waiting()) and self._find_room(request):
            self.waiting.remove(request)
            self.prefilling.append(request)
            self._num_admitted += 1

    def _next_waiting(self) -> Request | None:
        if not self.waiting or not (self.table.num_free_rows or self.config.enable_priority_scheduling):
            return None
        is_oldest_turn = self._num_admitted % OLDEST_EVERY == OLDEST_EVERY - 1
        line = self.waiting if is_oldest_turn else self._by_policy()
        return next((request for request in line if not self._will_find_its_prefix(request)), None)

    def _by_policy(self) -> list[Request]:
        line = list(self.waiting)
        if self.config.enable_priority_scheduling:
            line.sort(key=self._urgency, reverse=True)  # equals stay in order of arrival
        if self.config.schedule_policy == "lpm" and len(line) > 1:
            compared = line[:MOST_COMPARED]
            compared.sort(key=lambda request: (-self._urgency(request), -self._cached_length(request)))
            line[:MOST_COMPARED] = compared
        return line

    def _urgency(self, request: Request) -> int:
        """The priority as one where more is more urgent."""
        priority = request.params.priority
        return -priority if self.config.schedule_low_priority_values_first else priority

    def _cached_length(self, request: Request) -> int:
        return self.slots.cached_length(request.text_array(), request.params.cache_salt)

    def _will_find_its_prefix(self, request: Request) -> bool:
        """Whether at least half of what it would compute is just being computed for others, and will be cached then."""
        salt = request.params.cache_salt
        others = [other for other in self.prefilling if other.params.cache_salt == salt]
        if not others or _wants_prompt_rows(request):
            return False
        keys = self.slots.keys(request.text_array())
        coming = max(shared_length(keys, self.slots.keys(other.text_array())) for other in others)
        missing = request.num_tokens - self._cached_length(request)
        return 2 * (request.num_tokens - coming) <= missing

    def _find_room(self, request: Request) -> bool:
        """Start it, if need be in the place of requests that are much less urgent."""
        while not self._start(request):
            least = min(self._yielding_to(request), key=self._worth, default=None)
            if least is None:
                return False
            least.has_made_way = True
            self._retract(least)
        return True

    def _yielding_to(self, request: Request) -> list[Request]:
        if not self.config.enable_priority_scheduling:
            return []
        bound = self._urgency(request) - self.config.priority_scheduling_preemption_threshold
        active = self.prefilling + self.running
        return [other for other in active if self._urgency(other) < bound and not other.has_made_way]

    def _worth(self, request: Request) -> tuple[int, int]:
        """Whoever is worth least goes first when there is no room: the least urgent, and of these the youngest."""
        return self._urgency(request), -request.arrival

    def _start(self, request: Request) -> bool:
        """Give the request a row, its cached prefix and slots for its other tokens and one tree; False if full."""
        if not self.table.num_free_rows:
            return False
        needs_drafts = self._needs_drafts(request)
        tokens = request.text_array() if not _wants_prompt_rows(request) else []
        pinned = self.slots.match(tokens, request.params.cache_salt, needs_drafts)
        on_device = len(pinned.slots)
        needed = request.num_tokens - on_device + self.num_nodes
        headroom = self.num_nodes * (len(self.running) + len(self.prefilling))  # else the next step retracts it again
        if needed + headroom > self.slots.num_available:
            self.slots.unpin(pinned)
            return False
        pinned = self._with_lower_tier(tokens, pinned, needs_drafts)  # what it brings is no longer needed
        cached = len(pinned.slots)
        fresh = self.slots.allocate(request.num_tokens - cached + self.num_nodes)
        request.row = self.table.take_row()
        request.status = RequestStatus.PREFILLING
        request.num_computed = cached
        if not request.output_ids:  # else it was retracted, and what it finds is its own
            request.num_cached, request.num_cached_on_host = cached, cached - on_device
            request.first_scheduled_ns = request.first_scheduled_ns or time.monotonic_ns()
        request.accept_counts = request.accept_counts or [0] * request.most_step_tokens
        self._pinned[request] = pinned
        if not needs_drafts:  # the draft reads the prompt, too, unless something that it would read before is missing
            self._num_drafted[request] = request.num_tokens if pinned.num_drafted == cached else pinned.num_drafted
        self._own(request, pinned.slots + fresh)
        return True

    def _with_lower_tier(self, tokens: Sequence[int], pinned: PinnedPrefix, needs_drafts: bool) -> PinnedPrefix:
        """The cached prefix once a lower tier has added to it. KV without drafts goes further, and stays as it is."""
        if self._bring is None or pinned.num_drafted < len(pinned.slots):
            return pinned
        self._bring(tokens, pinned.salt)
        self.slots.unpin(pinned)
        return self.slots.match(tokens, pinned.salt, needs_drafts)

    def _needs_drafts(self, request: Request) -> bool:
        return request.tree is not None or not self.cache_rule.has_draft_kv

    def _own(self, request: Request, slots: list[int]) -> None:
        self.table.write([request.row] * len(slots), list(range(len(slots))), slots)
        self._num_owned[request] = len(slots)

    def _extend_batch(self) -> ExtendBatch:
        """The next chunk of every prefilling request, up to max_prefill_tokens as padded.

        Where others decode, which wait for it meanwhile, it is no more than one chunk's tokens.
        """
        limit = self.config.chunked_prefill_size if self.config.chunked_prefill_size > 0 else self.context_length
        most = min(limit, self.config.max_prefill_tokens) if self.running else self.config.max_prefill_tokens
        requests, chunk_lens, width = [], [], 0
        for request in self.prefilling:
            chunk = min(limit, request.num_tokens - request.num_computed)
            wider = max(width, chunk)
            if requests and wider * (len(requests) + 1) > most:
                break
            requests.append(request)
            chunk_lens.append(chunk)
            width = wider
        return ExtendBatch(requests, chunk_lens)

    def _decode_batch(self) -> DecodeBatch | None:
        """All requests of one kind, speculative or plain; where both run, they take turns."""
        plain = [request for request in self.running if request.tree is None]
        drafted = [request for request in self.running if request.tree is not None]
        self._last_was_plain = bool(plain) and not (drafted and self._last_was_plain)
        requests = plain if self._last_was_plain else drafted
        if not requests:
            return None
        kept = self._refill_windows(requests)
        return DecodeBatch(kept) if kept else None

    def _refill_windows(self, requests: list[Request]) -> list[Request]:
        """Make each request own num_nodes slots beyond its computed ones; when slots run out, the youngest of the least
        urgent step back.

        All of these may have to, if prompts and requests of the other kind hold the rest; those go on then.
        """
        kept = list(requests)
        while kept:
            missing = [self._num_missing(request) for request in kept]
            fresh = self.slots.allocate(sum(missing))
            if fresh is not None:
                self._append_slots(kept, missing, fresh)
                return kept
            least = min(self.prefilling + self.running, key=self._worth)
            self._retract(least)
            kept = [request for request in kept if request is not least]
        assert self.running or self.prefilling, "a single request always fits: Engine sizes the pool for it"
        return []

    def _num_missing(self, request: Request, most_tokens: int = 0) -> int:
        """Slots that it lacks for its next window, when it has computed so many tokens more."""
        return max(0, request.num_computed + most_tokens + self.num_nodes - self._num_owned[request])

    def goes_on(self, batch: DecodeBatch) -> bool:
        """Whether the step after this one, of which nothing is known yet, is due to the same requests.

        If so, they own the slots that it can need at most. Nobody is retracted for that.
        """
        requests = batch.requests
        if self.waiting or self.prefilling or len(requests) < len(self.running):
            return False
        if not all(self._is_far_from_its_end(request) for request in requests):
            return False
        missing = [self._num_missing(request, request.most_step_tokens) for request in requests]
        fresh = self.slots.allocate(sum(missing))
        if fresh is None:
            return False
        self._append_slots(requests, missing, fresh)
        return True

    def _is_far_from_its_end(self, request: Request) -> bool:
        """Whether its length allows a step after the next one."""
        room = request.num_tokens + request.most_step_tokens < self.context_length
        return room and len(request.output_ids) + 1 < request.params.max_new_tokens

    def _append_slots(self, requests: list[Request], counts: list[int], slots: list[int]) -> None:
        rows, columns = [], []
        for request, count in zip(requests, counts, strict=True):
            owned = self._num_owned[request]
            rows += [request.row] * count
            columns += range(owned, owned + count)
            self._num_owned[request] = owned + count
        if slots:
            self.table.write(rows, columns, slots)

    def _retract(self, request: Request) -> None:
        """Take a request's slots; it waits in its old place in line and is recomputed, outputs included."""
        self.num_retracted += 1
        (self.running if request in self.running else self.prefilling).remove(request)
        self.slots.unpin(self._release(request))
        if not request.output_ids:
            request.prompt_logprobs.clear()  # maybe of a part
        request.status = RequestStatus.WAITING
        bisect.insort(self.waiting, request, key=lambda each: each.arrival)

    # ---- commit ----

    def commit(self, batch: ExtendBatch | DecodeBatch, accepted: Accepted) -> list[Update]:
        """Record what a step produced: append tokens, finish, cache, free. One update per request that got tokens."""
        if isinstance(batch, ExtendBatch):
            for request, length in zip(batch.requests, batch.chunk_lens, strict=True):
                request.num_computed += length
        updates, token_lists = [], accepted.tolists()
        logprobs = _logprobs(batch.requests, accepted, token_lists)
        traces = _traces(batch, accepted, token_lists)
        for request, tokens in zip(batch.requests, token_lists, strict=True):
            if not tokens:
                continue
            kept, reason = self._cut(request, tokens)
            if isinstance(batch, ExtendBatch):
                self._start_running(request, tokens[0])
            else:
                request.num_computed += len(tokens)
                request.spec_verify_ct += 1
                request.accept_counts[len(kept) - 1] += 1
            updates.append(self._append(request, kept, reason, logprobs.get(request, []), traces.get(request, [])))
        return updates

    def _start_running(self, request: Request, first_token: int) -> None:
        """The prompt is complete: share it at once, so that requests behind this one need not wait for its end."""
        self.prefilling.remove(request)
        self.running.append(request)
        request.status = RequestStatus.RUNNING
        self._share(request, request.text_array() + array("q", [first_token]), request.num_computed)

    def _append(
        self,
        request: Request,
        tokens: list[int],
        reason: FinishReason | None,
        logprobs: list[TokenLogprob],
        trace: list[StepTrace],
    ) -> Update:
        if request.failure:
            tokens, reason = [], FinishReason.ABORT
        prompt_logprobs = [] if request.output_ids else request.prompt_logprobs
        request.output_ids += tokens
        if reason:
            self.running.remove(request)
            self._finish(request, reason)
        return Update(
            request_id=request.request_id,
            token_ids=tokens,
            finish_reason=reason,
            prompt_tokens=len(request.input_ids),
            completion_tokens=len(request.output_ids),
            cached_tokens=request.num_cached,
            host_cached_tokens=request.num_cached_on_host,
            first_scheduled_ns=request.first_scheduled_ns,
            accept_counts=list(request.accept_counts),
            spec_verify_ct=request.spec_verify_ct,
            draft_tokens=_num_drafted(request),
            has_end_token=reason is FinishReason.STOP and self._is_end_token(request, tokens[-1]),
            logprobs=logprobs[: len(tokens)],
            prompt_logprobs=prompt_logprobs,
            failure=request.failure,
            spec_trace=first_tokens(trace, len(tokens)),
        )

    def _cut(self, request: Request, tokens: list[int]) -> tuple[list[int], FinishReason | None]:
        """Stop at the first token that ends the text (kept) or at the length limit, whichever comes first."""
        room = min(request.params.max_new_tokens - len(request.output_ids), self.context_length - request.num_tokens)
        for count, token in enumerate(tokens[:room], start=1):
            if self._ends(request, token):
                return tokens[:count], FinishReason.STOP
        if len(tokens) >= room:
            return tokens[:room], FinishReason.LENGTH
        return tokens, None

    def _ends(self, request: Request, token: int) -> bool:
        """Whether nothing follows this token, the text's next: the one place where grammars go on."""
        if request.grammar is not None:
            request.grammar.advance(token)
            if request.grammar.error:
                request.failure = Failure(request.params.guide.kind, request.grammar.error)
            if request.grammar.error or request.grammar.is_complete:
                return True
        return self._is_end_token(request, token)

    def _is_end_token(self, request: Request, token: int) -> bool:
        ends = token in self.eos_token_ids and not request.params.ignore_eos
        return ends or token in request.params.stop_token_ids

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        request.status = RequestStatus.FINISHED
        request.grammar = None
        if request in self._pinned:
            self.slots.finish(self._release(request))

    def _release(self, request: Request) -> PinnedPrefix:
        """Cache what may be cached of the request's KV, free the rest and its row. What is cached is left pinned."""
        # Tokens past num_tokens - 1 may have KV too (a stop token cut the path short), but no known successor.
        known, cacheable = len(self._pinned[request].slots), min(request.num_computed, request.num_tokens - 1)
        if self._needs_drafts(request):
            cacheable -= self.cache_rule.unfed_tokens + request.num_unfed
        if cacheable > known:  # a failure at the first token leaves less text than is cached
            self._share(request, request.text_array(), cacheable)
        pinned = self._pinned.pop(request)
        owned = self.table.read(request.row, self._num_owned.pop(request))
        self.slots.release(owned[len(pinned.slots) :])
        self._num_drafted.pop(request, None)
        self.table.give_back(request.row)
        request.row, request.num_unfed = -1, 0
        return pinned

    def _share(self, request: Request, token_ids: array, count: int) -> None:
        """Hand the first `count` slots to the prefix cache and use the cache's own wherever it had them already."""
        mine = self.table.read(request.row, count)
        known = len(self._pinned[request].slots)
        num_drafted, urgency = self._num_drafted.get(request), self._urgency(request)
        pinned = self.slots.share(token_ids, mine, self._pinned[request], num_drafted, urgency)
        self._pinned[request] = pinned
        replaced = [column for column in range(known, len(pinned.slots)) if mine[column] != pinned.slots[column]]
        if replaced:
            slots = [pinned.slots[column] for column in replaced]
            self.table.write([request.row] * len(replaced), replaced, slots)


def _wants_prompt_rows(request: Request) -> bool:
    """Whether the prompt's own rows are needed, which a cached prefix does not have."""
    return request.params.prompt_logprobs is not None and not request.prompt_logprobs


def _num_drafted(request: Request) -> int:
    if request.tree is None:
        return 0
    return (request.spec_verify_ct - request.undrafted_ct) * (request.tree.num_nodes - 1)


def _logprobs(
    requests: list[Request], accepted: Accepted, tokens: list[list[int]]
) -> dict[Request, list[TokenLogprob]]:
    if accepted.logprobs is None:
        return {}
    asking = [requests[row] for row in accepted.logprobs.rows]
    counts = [len(tokens[row]) for row in accepted.logprobs.rows]
    tops = [request.params.logprobs for request in asking]
    return dict(zip(asking, accepted.logprobs.tolists(counts, tops), strict=True))


def _traces(
    batch: ExtendBatch | DecodeBatch, accepted: Accepted, tokens: list[list[int]]
) -> dict[Request, list[StepTrace]]:
    """Of the requests that ask, the step whose tokens have just come to the host."""
    rows = [row for row in traced_rows(batch.requests) if tokens[row]]
    if not rows:
        return {}
    step_ms = (time.monotonic_ns() - batch.started_ns) / 1e6
    rounds = accepted.rounds() if accepted.rounds else {}
    kind = "prefill" if isinstance(batch, ExtendBatch) else "speculative" if rounds else "plain"
    traces = {}
    for row in rows:
        request, round = batch.requests[row], rounds.get(row)
        step = StepTrace(
            kind=kind,
            batch_size=len(batch.requests),
            started_ns=batch.started_ns,
            step_ms=round.step_ms if round else step_ms,
            token_ids=tokens[row],
            bonus=tokens[row][-1],
            prompt_tokens=len(request.input_ids),
            cached_tokens=request.num_cached,
            round=round,
        )
        traces[request] = [step]
    return traces
