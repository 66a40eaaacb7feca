"""Nouns: what a client asks for, what the engine says back. No torch: the Triton adapter imports this file."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from specbackend.config import TreeShape
from specbackend.sampling_params import SamplingParams
from specbackend.spec_trace import StepTrace

if TYPE_CHECKING:  # it brings llguidance, which Triton's process has no use for
    from specbackend.grammar import GrammarState


class FinishReason(str, Enum):
    STOP = "stop"  # an eos or stop id, or a stop string
    LENGTH = "length"  # max_new_tokens, or the context is full
    ABORT = "abort"  # cancelled by the client or timed out


class RequestStatus(Enum):
    WAITING = 0  # holds no slots
    PREFILLING = 1  # part of the prompt is in the KV pool
    RUNNING = 2  # decoding
    FINISHED = 3


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was at its place, and the likeliest ones there. Natural logarithms."""

    token_id: int
    logprob: float
    rank: int  # 1: no token was likelier
    top: list[tuple[int, float]] = field(default_factory=list)  # token ids, the likeliest first


@dataclass(frozen=True)
class Failure:
    """Why a request that was accepted could not be carried through."""

    field: str  # the parameter at fault
    message: str


@dataclass(eq=False)
class Request:
    """One generation. The scheduler owns every field below `params` once the request is submitted."""

    request_id: str
    input_ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)

    status: RequestStatus = RequestStatus.WAITING
    output_ids: list[int] = field(default_factory=list)
    arrival: int = 0  # place among all that have come
    has_made_way: bool = False  # for a more urgent request, which is asked of it once
    row: int = -1  # place in the RequestTable
    num_computed: int = 0  # tokens whose KV is in the pool
    num_cached: int = 0  # of these, how many the prefix cache supplied
    num_cached_on_host: int = 0  # of these, how many a lower tier supplied
    first_scheduled_ns: int = 0  # on time.monotonic_ns()'s clock
    spec_verify_ct: int = 0  # decode steps taken
    accept_counts: list[int] = field(default_factory=list)  # of these, by how many drafted tokens they gave
    undrafted_ct: int = 0  # of these, how many verified the root alone although there is a tree; the decoder counts
    num_unfed: int = 0  # of num_computed, the last that the draft has yet to read for that; the decoder counts
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # of all tokens but the first, if asked for
    failure: Failure | None = None  # set by whatever finds it; the request ends with the step
    # resolved when the engine takes the request
    seed: int = 0
    tree: TreeShape | None = None  # None: plain decoding
    processors: tuple[Callable, ...] = ()  # the server's own, see sampling.custom
    end_ids: tuple[int, ...] = ()  # eos and stop_token_ids, those of the vocabulary
    grammar: "GrammarState | None" = None  # behind output_ids, if the parameters have a guide and until the end
    _text: array = field(default_factory=lambda: array("q"), init=False, repr=False)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids) + len(self.output_ids)

    @property
    def all_ids(self) -> list[int]:
        return self.input_ids + self.output_ids

    @property
    def most_step_tokens(self) -> int:
        """That one decode step may add."""
        return self.tree.longest_path if self.tree else 1

    def text_array(self) -> array:
        """all_ids as 64-bit integers, which become a tensor at once. It grows: read it, do not keep it."""
        if not self._text:
            self._text.extend(self.input_ids)
        self._text.extend(self.output_ids[len(self._text) - len(self.input_ids) :])
        return self._text


@dataclass(slots=True)
class Update:
    """What one engine step did for one request: the new tokens and, on the last update, why it ended.

    Nobody changes it. It is not frozen, as it is made for every response: that would take eight times as long.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    spec_verify_ct: int = 0
    draft_tokens: int = 0  # verified so far
    has_end_token: bool = False  # the last token is an eos or stop id, which is no text
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of token_ids, if asked for
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # of all but the first, on the first update
    failure: Failure | None = None  # on the last update, which says abort
    host_cached_tokens: int = 0  # of cached_tokens, how many a lower tier supplied
    first_scheduled_ns: int = 0  # on time.monotonic_ns()'s clock
    accept_counts: list[int] = field(default_factory=list)  # steps by how many drafted tokens they gave, 0 first
    spec_trace: list[StepTrace] = field(default_factory=list)  # how it came by token_ids, if asked for

    @property
    def is_first(self) -> bool:
        """Whether it has the request's first token."""
        return 0 < len(self.token_ids) == self.completion_tokens

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None
