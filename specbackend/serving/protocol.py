"""What adapters and the engine process say to each other: messages as length-prefixed msgpack frames.

Each adapter has a connection of its own, with request ids of its own. Whoever sends no Start only asks.
"""

import socket
from dataclasses import dataclass, field

from specbackend.frames import LENGTH, field_names, pack, unpack
from specbackend.request import Failure, FinishReason, TokenLogprob, Update
from specbackend.sampling_params import SamplingParams
from specbackend.spec_trace import Round, StepTrace, TreeTrace

RECEIVE_BYTES = 1 << 16  # of more, each receive would map fresh memory, which takes longer than to receive


# ---- adapter -> engine


@dataclass(frozen=True)
class Start:
    """An adapter's first message: what to load. Whose comes first is the one that counts; the others' are equal."""

    params: dict  # of EngineConfig.from_params


@dataclass(frozen=True)
class Submit:
    request_id: str
    input_ids: list[int]
    params: SamplingParams


@dataclass(frozen=True)
class Cancel:
    request_id: str


@dataclass(frozen=True)
class FlushCache:
    """Drop what the prefix cache holds and no request uses. Answered by Facts: freed_tokens."""


@dataclass(frozen=True)
class CacheTree:
    """Answered by Facts: what the engine is, and its prefix cache as `cache.tree_view` describes it."""

    limit: int  # nodes of the tree at most


@dataclass(frozen=True)
class Leave:
    """End at once, if no adapter is there and you only wait for one to come back."""


# ---- engine -> adapter


@dataclass(frozen=True)
class Hello:
    """The first message on every connection, loaded or not."""

    pid: int


@dataclass(frozen=True)
class Ready:
    """The engine has loaded; these are the limits to check requests against."""

    context_length: int
    vocab_size: int
    eos_token_ids: list[int]
    num_draft_tokens: int  # nodes of the tree verified per step, root included; 0: no speculation
    load_seconds: float = 0.0  # since the process was started
    stats: dict[str, object] = field(default_factory=dict)  # as in Step


@dataclass(frozen=True)
class Failed:
    """The engine cannot start or go on, and ends."""

    message: str


@dataclass(frozen=True)
class Rejected:
    """The engine does not take a request. `field` names the parameter at fault; None: the queue is full."""

    request_id: str
    field: str | None
    message: str


@dataclass(frozen=True)
class Step:
    """One step is done: what it did for this adapter. All adapters get one for every step, as a sign of life that the
    watchdog looks for."""

    updates: list[Update] = field(default_factory=list)
    stats: dict[str, object] = field(default_factory=dict)  # EngineStats


@dataclass(frozen=True)
class Facts:
    """Plain values, by name."""

    values: dict


MESSAGES = (Start, Submit, Cancel, FlushCache, CacheTree, Leave, Hello, Ready, Failed, Rejected, Step, Facts)
Message = Start | Submit | Cancel | FlushCache | CacheTree | Leave | Hello | Ready | Failed | Rejected | Step | Facts


def encode(message: Message) -> bytes:
    return pack(message, MESSAGES)


def decode(body: bytes) -> Message:
    message = unpack(body, MESSAGES)
    if isinstance(message, Submit):
        return Submit(message.request_id, message.input_ids, _sampling_params(message.params))
    if isinstance(message, Step):
        return Step([_update(values) for values in message.updates], message.stats)
    return message


class Channel:
    """One end of the socket. One thread may send while another receives."""

    def __init__(self, sock: socket.socket):
        self._socket = sock
        self._received = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        self._socket.sendall(encode(message))

    def receive(self) -> list[Message]:
        """Wait for data and return the messages that it completes, perhaps none. EOFError: the other end is closed."""
        data = self._socket.recv(RECEIVE_BYTES)
        if not data:
            raise EOFError
        self._received += data
        return self._whole_messages()

    def close(self) -> None:
        self._socket.close()

    def _whole_messages(self) -> list[Message]:
        messages, start = [], 0
        while (body := start + LENGTH.size) <= len(self._received):
            end = body + LENGTH.unpack_from(self._received, start)[0]
            if end > len(self._received):
                break
            messages.append(decode(bytes(self._received[body:end])))
            start = end
        del self._received[:start]
        return messages


def _sampling_params(values: list) -> SamplingParams:
    return SamplingParams.from_dict(dict(zip(field_names(SamplingParams), values, strict=True)))


def _token_logprobs(values: list) -> list[TokenLogprob]:
    return [_token_logprob(*each) for each in values]


def _token_logprob(token_id: int, logprob: float, rank: int, top: list) -> TokenLogprob:
    return TokenLogprob(token_id, logprob, rank, [tuple(pair) for pair in top])


def _step_trace(*values) -> StepTrace:
    *step, round = values
    return StepTrace(*step, round and Round(TreeTrace(*round[0]), *round[1:]))


UPDATE_FIELDS = field_names(Update)
# What is not a plain value in an update, by its place. Most updates have none of it.
UPDATE_READERS = [
    (UPDATE_FIELDS.index(name), read)
    for name, read in {
        "finish_reason": FinishReason,
        "logprobs": _token_logprobs,
        "prompt_logprobs": _token_logprobs,
        "failure": lambda values: Failure(*values),
        "spec_trace": lambda values: [_step_trace(*each) for each in values],
    }.items()
]


def _update(values: list) -> Update:
    """Raises ValueError if there are not as many as an update has: fewer would leave defaults."""
    if len(values) != len(UPDATE_FIELDS):
        raise ValueError(f"an update of {len(values)} values, not {len(UPDATE_FIELDS)}: of another version")
    for place, read in UPDATE_READERS:
        if values[place]:
            values[place] = read(values[place])
    return Update(*values)
