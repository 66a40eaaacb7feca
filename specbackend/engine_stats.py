"""What an engine does, in numbers: counted step by step, told to metrics and, in SGLang's words, to the log.

No torch: Triton's process reads these numbers, too. Nothing here is a client's text.
"""

import logging
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from specbackend.config import EngineConfig
from specbackend.request import Request, Update

PREFILL, PLAIN, SPECULATIVE = STEP_KINDS = ("prefill", "plain", "speculative")
DEFAULT_WINDOW = 40  # decode steps that are recent, if decode_log_interval does not say

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineStats:
    """Plain numbers for metrics. Idle and without leaks: free_slots + evictable_slots == total_slots."""

    num_running: int
    num_waiting: int
    free_slots: int
    evictable_slots: int
    total_slots: int
    num_prefilling: int = 0  # of num_running
    max_running_requests: int = 0
    context_tokens: int = 0  # of prompts, computed in the last step

    prompt_tokens: int = 0  # since start, like all in this block
    cached_tokens: int = 0  # of prompt_tokens
    host_cached_tokens: int = 0  # of cached_tokens, what a lower tier supplied
    completion_tokens: int = 0
    verify_steps: int = 0  # each request's decode steps
    drafts: int = 0  # of these, those with a tree
    undrafted_steps: int = 0  # of these, those that were plain although the request has a tree
    draft_tokens: int = 0  # nodes verified, roots not counted
    accepted_tokens: int = 0  # of draft_tokens, those given to requests
    accepted_per_position: list[int] = field(default_factory=list)  # drafts of which so many tokens and one were kept
    retractions: int = 0
    steps: dict[str, int] = field(default_factory=dict)  # by STEP_KINDS
    step_seconds: dict[str, float] = field(default_factory=dict, compare=False)  # by STEP_KINDS
    busy_seconds: float = field(default=0.0, compare=False)  # of all steps
    shadow_requests: int = 0
    shadow_different_requests: int = 0
    shadow_tokens: int = 0

    gen_throughput: float = field(default=0.0, compare=False)  # new tokens per second; recent, like all in this block
    accept_length: float = 0.0  # tokens per draft, the target's own included; 0: there were no drafts
    accept_rate: float = 0.0  # accepted_tokens of draft_tokens
    tree_utilization: float = 0.0  # part of the rows verified, roots included, that became tokens
    plain_share: float = 0.0  # part of the decode steps of requests with trees that were plain
    recent_retractions: int = 0

    @property
    def used_slots(self) -> int:
        """What only the prefix cache holds can be had at once, so it counts as free."""
        return self.total_slots - self.free_slots - self.evictable_slots

    @property
    def token_usage(self) -> float:
        return self.used_slots / self.total_slots

    @property
    def cache_hit_rate(self) -> float:
        """Since start."""
        return ratio(self.cached_tokens, self.prompt_tokens)


@dataclass(frozen=True)
class EngineStep:
    """A step that is done."""

    kind: str  # of STEP_KINDS
    seconds: float
    requests: Sequence[Request]
    chunk_lens: Sequence[int]  # of prompts, one for each request; empty unless the kind is PREFILL
    updates: Sequence[Update]  # of the requests that are clients'
    num_retracted: int  # by now, since start


class StepCounts:
    """Counts steps. Recent is what happened in the last decode_log_interval decode steps and the prompts between."""

    def __init__(self, config: EngineConfig):
        tree = config.tree
        self._interval = config.decode_log_interval
        self._totals: Counter[str] = Counter()  # by field of EngineStats
        self._accepted_per_position = [0] * (tree.longest_path - 1 if tree else 0)
        self._steps, self._seconds = dict.fromkeys(STEP_KINDS, 0), dict.fromkeys(STEP_KINDS, 0.0)
        self._context_tokens = 0
        self._earlier = deque([Counter()], maxlen=1 + (self._interval or DEFAULT_WINDOW))  # totals after decode steps

    def note(self, step: EngineStep) -> None:
        totals = self._totals
        self._steps[step.kind] += 1
        self._seconds[step.kind] += step.seconds
        self._context_tokens = sum(step.chunk_lens)
        totals["busy_seconds"] += step.seconds
        totals["retractions"] = step.num_retracted
        for update in step.updates:  # not when requests end, because one that is cancelled has no last update
            totals["completion_tokens"] += len(update.token_ids)
            if update.completion_tokens == 1 and update.spec_verify_ct == 0:
                totals["prompt_tokens"] += update.prompt_tokens
                totals["cached_tokens"] += update.cached_tokens
                totals["host_cached_tokens"] += update.host_cached_tokens
        if step.kind != PREFILL:
            self._note_decode(step)

    def _note_decode(self, step: EngineStep) -> None:
        totals, trees = self._totals, {request.request_id: request.tree for request in step.requests}
        totals["verify_steps"] += len(step.updates)
        for update in step.updates:
            if step.kind == SPECULATIVE:
                self._note_draft(trees[update.request_id].num_nodes - 1, max(len(update.token_ids) - 1, 0))
            elif trees[update.request_id]:
                totals["undrafted_steps"] += 1
        self._earlier.append(totals.copy())

    def _note_draft(self, num_drafted: int, num_accepted: int) -> None:
        """One request's: each step gives one token of the target's own."""
        totals = self._totals
        totals["drafts"] += 1
        totals["draft_tokens"] += num_drafted
        totals["accepted_tokens"] += num_accepted
        for position in range(num_accepted):
            self._accepted_per_position[position] += 1

    def numbers(self) -> dict[str, object]:
        """The fields of EngineStats that are counted here."""
        recent = self._totals - self._earlier[0]
        drafts, drafted, accepted = (recent[name] for name in ("drafts", "draft_tokens", "accepted_tokens"))
        undrafted = recent["undrafted_steps"]
        return {
            **self._totals,
            "accepted_per_position": list(self._accepted_per_position),
            "steps": dict(self._steps),
            "step_seconds": dict(self._seconds),
            "context_tokens": self._context_tokens,
            "gen_throughput": ratio(recent["completion_tokens"], recent["busy_seconds"]),
            "accept_length": ratio(accepted + drafts, drafts),
            "accept_rate": ratio(accepted, drafted),
            "tree_utilization": ratio(accepted + drafts, drafted + drafts),
            "plain_share": ratio(undrafted, undrafted + drafts),
            "recent_retractions": recent["retractions"],
        }

    def is_line_due(self, step: EngineStep) -> bool:
        """Whether the log should hear of the step that was noted last."""
        if not self._interval or not log.isEnabledFor(logging.INFO):
            return False
        return step.kind == PREFILL or (self._steps[PLAIN] + self._steps[SPECULATIVE]) % self._interval == 0


def log_step(step: EngineStep, stats: EngineStats, speculates: bool) -> None:
    """One line about a prefill, or about the recent decode steps. stats: as the step has left them."""
    log.info(_prefill_line(step, stats) if step.kind == PREFILL else _decode_line(stats, speculates))


def _prefill_line(step: EngineStep, stats: EngineStats) -> str:
    starts = [request.num_computed - chunk for request, chunk in zip(step.requests, step.chunk_lens, strict=True)]
    firsts = [request for request, start in zip(step.requests, starts, strict=True) if start == request.num_cached]
    return (
        f"Prefill batch. #new-seq: {len(step.requests)}, #new-token: {sum(step.chunk_lens)}, "
        f"#cached-token: {sum(request.num_cached for request in firsts)}, token usage: {stats.token_usage:.2f}, "
        f"#running-req: {stats.num_running - stats.num_prefilling}, #queue-req: {stats.num_waiting}"
    )


def _decode_line(stats: EngineStats, speculates: bool) -> str:
    accepts = f"accept len: {stats.accept_length:.2f}, accept rate: {stats.accept_rate:.2f}, " if speculates else ""
    return (
        f"Decode batch. #running-req: {stats.num_running - stats.num_prefilling}, #token: {stats.used_slots}, "
        f"token usage: {stats.token_usage:.2f}, {accepts}gen throughput (token/s): {stats.gen_throughput:.2f}, "
        f"#queue-req: {stats.num_waiting}"
    )


def ratio(part: float, whole: float) -> float:
    """0 of nothing."""
    return part / whole if whole else 0.0
