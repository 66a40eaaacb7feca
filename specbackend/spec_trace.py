"""What a request that asks (`return_spec_trace`) is told of its steps: what was drafted, and what became of it.

Times are of this machine's monotonic clock, which is one for all its processes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

LEAST_LOGPROB = -9999.0  # JSON has no infinity; vLLM's server says so, too


@dataclass(frozen=True)
class TreeTrace:
    """Node 0 is the root, the last token of the text so far; parents come before their children."""

    parents: list[int]  # -1: of the root
    token_ids: list[int]
    draft_logprobs: list[float | None]  # of a node given its parent, by the draft's forecast; None: it has none
    target_logprobs: list[float | None]  # the same by the distribution that the target picks from; None of the root


@dataclass(frozen=True)
class Round:
    """A tree that was drafted and verified."""

    tree: TreeTrace
    accepted: list[int]  # the path's nodes, without the root
    draft_ms: float  # all that comes before the target's forward
    verify_ms: float
    extend_ms: float  # the draft takes note of what was accepted

    @property
    def step_ms(self) -> float:
        return self.draft_ms + self.verify_ms + self.extend_ms


@dataclass(frozen=True)
class StepTrace:
    """One step of one request, and how it came by its tokens."""

    kind: str  # prefill, of which this is the step that completes the prompt; plain; speculative
    batch_size: int
    started_ns: int
    step_ms: float
    token_ids: list[int]  # what the answer has of the step: a stop, or its length, may have cut it
    bonus: int  # the target's last pick; of prefill and plain the only one
    prompt_tokens: int = 0
    cached_tokens: int = 0
    round: Round | None = None  # of speculative steps

    def to_dict(self, arrival_ns: int, text: Callable[[int], str]) -> dict:
        """As clients get it. text: of a single token."""
        told = {
            "kind": self.kind,
            "batch_size": self.batch_size,
            "started_ms": (self.started_ns - arrival_ns) / 1e6,
            "step_ms": self.step_ms,
            **_with_texts(self.token_ids, text),
            "accepted": [],
            "bonus": self.bonus,
        }
        if self.kind == "prefill":
            told |= {"prompt_tokens": self.prompt_tokens, "cached_tokens": self.cached_tokens}
        return told if self.round is None else told | _round_to_dict(self.round, text)


def first_tokens(steps: list[StepTrace], count: int) -> list[StepTrace]:
    """The steps that the first `count` of their tokens come from, and of each only these tokens."""
    kept = []
    for step in steps:
        if count > 0:
            kept.append(replace(step, token_ids=step.token_ids[:count]))
        count -= len(step.token_ids)
    return kept


def _round_to_dict(round: Round, text: Callable[[int], str]) -> dict:
    tree = round.tree
    return {
        "draft_ms": round.draft_ms,
        "verify_ms": round.verify_ms,
        "extend_ms": round.extend_ms,
        "accepted": round.accepted,
        "tree": {
            "parents": tree.parents,
            **_with_texts(tree.token_ids, text),
            "draft_logprobs": _finite(tree.draft_logprobs),
            "target_logprobs": _finite(tree.target_logprobs),
        },
    }


def _with_texts(token_ids: list[int], text: Callable[[int], str]) -> dict:
    return {"token_ids": token_ids, "token_texts": [text(token) for token in token_ids]}


def _finite(logprobs: list[float | None]) -> list[float | None]:
    return [None if logprob is None else max(logprob, LEAST_LOGPROB) for logprob in logprobs]
