"""Nouns: what a client asks for, what the engine says back. No torch: the Triton adapter imports this file."""

from dataclasses import dataclass, field, fields
from enum import Enum

from specbackend.errors import InvalidRequest

FLOAT32_MAX = 3.4e38  # the device's temperatures are float32
UNLIMITED = 1 << 30  # max_new_tokens of a request that is bounded by the context length alone


class FinishReason(str, Enum):
    STOP = "stop"  # an eos or stop id, or a stop string
    LENGTH = "length"  # max_new_tokens, or the context is full
    ABORT = "abort"  # cancelled by the client or timed out


@dataclass(frozen=True)
class SamplingParams:
    """How to pick tokens, under SGLang's names. Every value is applied exactly; what cannot be is refused by name."""

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0 is greedy
    seed: int | None = None  # None: the engine draws one
    stop: tuple[str, ...] = ()  # strings; matched on text, outside the engine's step
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    speculative: bool = True  # False: plain decoding for this request, whatever the server does

    def __post_init__(self) -> None:
        _require_int("max_new_tokens", self.max_new_tokens, low=1, high=UNLIMITED)
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, (int, float)):
            raise InvalidRequest("temperature", f"must be a number, got {self.temperature!r}")
        if not 0 <= self.temperature <= FLOAT32_MAX:  # false for nan too
            raise InvalidRequest("temperature", f"must be finite and at least 0, got {self.temperature}")
        if self.seed is not None:
            _require_int("seed", self.seed, low=0, high=(1 << 64) - 1)
        for token in self.stop_token_ids:
            _require_int("stop_token_ids", token, low=0, high=UNLIMITED)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InvalidRequest("stop", "must be non-empty strings")
        for flag in ("ignore_eos", "speculative"):
            if not isinstance(getattr(self, flag), bool):
                raise InvalidRequest(flag, f"must be a bool, got {getattr(self, flag)!r}")

    @classmethod
    def from_dict(cls, params: dict) -> "SamplingParams":
        """Build from user input; names this class does not have are refused, lists become tuples."""
        known = {f.name for f in fields(cls)}
        for name in params:
            if name not in known:
                raise InvalidRequest(
                    name, f"is not a supported sampling parameter (supported: {', '.join(sorted(known))})"
                )
        values = dict(params)
        for name in ("stop", "stop_token_ids"):
            value = values.get(name, ())
            if value is None:
                values[name] = ()
            elif isinstance(value, (list, tuple)):
                values[name] = tuple(value)
            else:
                values[name] = (value,)
        return cls(**values)


def _require_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(name, f"must be an integer, got {value!r}")
    if not low <= value <= high:
        raise InvalidRequest(name, f"must be between {low} and {high}, got {value}")


class RequestStatus(Enum):
    WAITING = 0  # holds no slots
    PREFILLING = 1  # part of the prompt is in the KV pool
    RUNNING = 2  # decoding
    FINISHED = 3


@dataclass(eq=False)
class Request:
    """One generation. The scheduler owns every field below `params` once the request is submitted."""

    request_id: str
    input_ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)

    status: RequestStatus = RequestStatus.WAITING
    output_ids: list[int] = field(default_factory=list)
    row: int = -1  # place in the RequestTable
    num_computed: int = 0  # tokens whose KV is in the pool
    num_cached: int = 0  # of these, how many the prefix cache supplied
    spec_verify_ct: int = 0  # decode steps taken
    finish_reason: FinishReason | None = None
    seed: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids) + len(self.output_ids)

    @property
    def all_ids(self) -> list[int]:
        return self.input_ids + self.output_ids


@dataclass(frozen=True)
class Update:
    """What one engine step did for one request: the new tokens and, on the last update, why it ended."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    spec_verify_ct: int = 0

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None
