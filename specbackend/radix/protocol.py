"""What clients and the sidecar say to each other: one request, one reply, as length-prefixed msgpack frames."""

import socket
import time
from dataclasses import dataclass, field

import msgpack

from specbackend.frames import LENGTH, pack, unpack
from specbackend.radix.keys import Layout

LONGEST_FRAME = 64 << 20


# ---- requests


@dataclass(frozen=True)
class Attach:
    """Map the arena; answered by Attached, which brings its descriptor. Comes before the next four."""

    layout: Layout


@dataclass(frozen=True)
class Lookup:
    """Lease what there is of a chain of keys; answered by Found."""

    keys: list[bytes]


@dataclass(frozen=True)
class Release:
    """Give a lease back; `poisoned` are positions of blocks that are not what their checksum says."""

    number: int
    poisoned: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Reserve:
    """Room for the blocks of a chain; answered by Reserved."""

    keys: list[bytes]


@dataclass(frozen=True)
class Commit:
    """The first blocks of a reservation are filled, these are their checksums; the others are given up."""

    number: int
    checksums: list[int]


@dataclass(frozen=True)
class Prefetch:
    """Bring what there is of a chain from the third tier, later."""

    keys: list[bytes]


@dataclass(frozen=True)
class Flush:
    """Forget all blocks."""


@dataclass(frozen=True)
class GetStats:
    """Answered by Facts: counts, and the layouts that were attached."""


@dataclass(frozen=True)
class Audit:
    """Answered by Facts: {"leaks": [text, ...]}."""


@dataclass(frozen=True)
class Snapshot:
    """Write all blocks to a file of the sidecar's host."""

    path: str


# ---- replies


@dataclass(frozen=True)
class Attached:
    arena_bytes: int


@dataclass(frozen=True)
class Found:
    """`units` is all blocks' units, one block after the other, as an array of unsigned ints. No blocks, no lease."""

    number: int
    checksums: list[int]
    units: bytes


@dataclass(frozen=True)
class Reserved:
    """`places` are the positions, among the keys asked for, of the blocks to fill; `units` as Found has
    them. No places, no reservation."""

    number: int
    places: list[int]
    units: bytes


@dataclass(frozen=True)
class Facts:
    values: dict


@dataclass(frozen=True)
class Done:
    pass


@dataclass(frozen=True)
class Refused:
    message: str


KINDS = (
    *(Attach, Lookup, Release, Reserve, Commit, Prefetch, Flush, GetStats, Audit, Snapshot),
    *(Attached, Found, Reserved, Facts, Done, Refused),
)
Request = Attach | Lookup | Release | Reserve | Commit | Prefetch | Flush | GetStats | Audit | Snapshot
Reply = Attached | Found | Reserved | Facts | Done | Refused
Message = Request | Reply


def send(sock: socket.socket, message: Message, fds: tuple[int, ...] = ()) -> None:
    """Send within the socket's timeout, descriptors with the first byte."""
    frame = pack(message, KINDS)
    sent = socket.send_fds(sock, [frame], fds) if fds else 0
    sock.sendall(memoryview(frame)[sent:])


def receive(sock: socket.socket, deadline: float | None = None, fds: list[int] | None = None) -> Message:
    """Wait for one message. A descriptor that comes along is appended to `fds`, and is the caller's to close.

    Raises EOFError if the other end is closed, TimeoutError after the deadline, ValueError for what is no message.
    """
    length = LENGTH.unpack(_read(sock, LENGTH.size, deadline, fds))[0]
    if length > LONGEST_FRAME:
        raise ValueError(f"a frame of {length} bytes")
    body = _read(sock, length, deadline)
    try:
        message = unpack(body, KINDS)
        return Attach(Layout(*message.layout)) if isinstance(message, Attach) else message
    except (TypeError, IndexError, msgpack.UnpackException) as error:
        raise ValueError(f"no message: {error}") from error


def _read(sock: socket.socket, size: int, deadline: float | None, fds: list[int] | None = None) -> bytes:
    data = bytearray()
    while len(data) < size:
        if deadline is not None:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
        if fds is None:
            part = sock.recv(size - len(data))
        else:
            part, came, *_ = socket.recv_fds(sock, size - len(data), 1)
            fds += came
        if not part:
            raise EOFError("the other end is closed")
        data += part
    return bytes(data)
