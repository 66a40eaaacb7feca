"""An engine's end: find blocks, copy them out, and write new ones behind its back."""

import logging
import os
import socket
import struct
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from specbackend.radix.arena import Arena, units_for
from specbackend.radix.breaker import CircuitBreaker
from specbackend.radix.keys import Layout, checksum
from specbackend.radix.protocol import (
    Attach,
    Attached,
    Commit,
    Done,
    Facts,
    Found,
    Lookup,
    Prefetch,
    Release,
    Reply,
    Request,
    Reserve,
    Reserved,
    receive,
    send,
)
from specbackend.radix.worker import BoundedWorker

TIMEOUT_S = 0.25  # of a call in the engine's thread, connecting included
WRITE_TIMEOUT_S = 1.0  # of one in the background
ADMIN_TIMEOUT_S = 2.0
MOST_WAITING = 64  # texts to write; more are dropped
PEER = struct.Struct("3i")  # pid, uid, gid

Fill = Callable[[list[int]], np.ndarray]  # positions of blocks -> their bytes, uint8 [len(positions), block_bytes]

log = logging.getLogger(__name__)


class Connection:
    """Calls the sidecar, and (re)connects to do so. For one thread.

    No failure raises: the answer is None, at once while the sidecar has failed lately.
    """

    def __init__(self, path: Path, layout: Layout | None, timeout_s: float):
        """Without a layout for questions about the sidecar only."""
        self._path, self._layout, self._timeout_s = path, layout, timeout_s
        self._breaker = CircuitBreaker()
        self._socket: socket.socket | None = None
        self.arena: Arena | None = None  # of this connection
        self.num_failures = 0

    def call(self, request: Request) -> Reply | None:
        if self._breaker.is_open:
            return None
        deadline = time.monotonic() + self._timeout_s
        try:
            if self._socket is None:
                self._connect(deadline)
            reply = self._exchange(request, deadline)
        except (OSError, EOFError, ValueError) as error:
            self.fail(error)
            return None
        self._breaker.succeed()
        return reply

    def fail(self, error: Exception) -> None:
        """Leave a sidecar that is gone, does not answer or talks nonsense."""
        self.num_failures += 1
        if self._breaker.fail() == 1:
            log.warning("no radix sidecar for a while: %s: %s", type(error).__name__, error)
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = self.arena = None

    def _connect(self, deadline: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(self._timeout_s)
        self._socket.connect(str(self._path))
        _check_peer(self._socket)
        if self._layout is not None:
            self.arena = self._attach(deadline)

    def _attach(self, deadline: float) -> Arena:
        fds: list[int] = []
        try:
            reply = self._exchange(Attach(self._layout), deadline, fds)
            if not isinstance(reply, Attached) or not fds:
                raise ValueError(f"cannot attach: {reply}")
            return Arena(fds[0], reply.arena_bytes)
        finally:
            for fd in fds:
                os.close(fd)

    def _exchange(self, request: Request, deadline: float, fds: list[int] | None = None) -> Reply:
        self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
        send(self._socket, request)
        return receive(self._socket, deadline, fds)


@dataclass(frozen=True)
class Lease:
    """Blocks that stay where they are until they are released, the first ones of the keys asked for."""

    keys: Sequence[bytes]
    checksums: Sequence[int]
    units: Sequence[array]
    arena: Arena
    number: int

    @property
    def num_blocks(self) -> int:
        return len(self.units)


class RadixClient:
    """For one thread, the engine's, but for what `store` is given, which runs in a thread of the client's own.

    A sidecar that is gone or silent is an empty cache: nothing here raises for it, or waits for it longer than a
    fraction of a second.
    """

    def __init__(self, path: Path, layout: Layout, timeout_s: float = TIMEOUT_S):
        self.layout = layout
        self._reader = Connection(path, layout, timeout_s)
        self._writer = Connection(path, layout, max(timeout_s, WRITE_TIMEOUT_S))  # of the worker's thread
        self._worker = BoundedWorker("radix writes", MOST_WAITING)
        self.num_poisoned = 0

    def lookup(self, keys: Sequence[bytes]) -> Lease | None:
        """Lease the longest prefix of these blocks that there is, in one round trip; None if there is none.

        The lease has to be given back, by `read`, or by `release` after `copy`.
        """
        reply = self._reader.call(Lookup(list(keys)))
        if not isinstance(reply, Found) or not reply.checksums:
            return None
        arena = self._reader.arena
        try:
            units = self._unit_rows(reply.units, len(reply.checksums), arena)
        except ValueError as error:
            self._reader.fail(error)
            return None
        return Lease(keys[: len(units)], reply.checksums, units, arena, reply.number)

    def read(self, lease: Lease, out: np.ndarray) -> int:
        """Copy the lease's blocks to the rows of `out`, uint8 [num_blocks, block_bytes], and give it back.

        Returns how many rows, from the first on, are what was once written; the others may hold anything.
        """
        sound = self.copy(lease, 0, out)
        self.release(lease, range(sound, lease.num_blocks)[:1])
        return sound

    def copy(self, lease: Lease, start: int, out: np.ndarray) -> int:
        """Copy the blocks from `start` on to the rows of `out`, as many as it has. The lease stays.

        Returns how many rows, from the first on, are sound; the block of the next one is poisoned.
        """
        for count, row in enumerate(out):
            place = start + count
            lease.arena.read(lease.units[place], row)
            if checksum(lease.keys[place], row) != lease.checksums[place]:
                self.num_poisoned += 1
                return count
        return len(out)

    def release(self, lease: Lease, poisoned: Sequence[int] = ()) -> None:
        """Give a lease back; blocks at the positions `poisoned` are removed."""
        if lease.arena is self._reader.arena:  # else it ended with its connection
            self._reader.call(Release(lease.number, list(poisoned)))

    def cached_tokens(self, token_ids: Sequence[int], salt: str | None = None) -> int:
        """How many tokens, from the first on, a lookup would find."""
        lease = self.lookup(self.layout.token_keys(token_ids, salt))
        if lease is None:
            return 0
        self.release(lease)
        return lease.num_blocks * self.layout.block_tokens

    def store(self, keys: Sequence[bytes], fill: Fill) -> Future | None:
        """Write those of these blocks that the sidecar lacks, later and in another thread.

        There `fill` is called with the positions of the blocks to write, unless there are none. The result says how
        many were written. None: too much is waiting, this is not written. Either way what `fill` reads from is free
        again when the result is there.
        """
        return self._worker.submit(self._write, list(keys), fill)

    def prefetch(self, keys: Sequence[bytes]) -> None:
        """Have the sidecar fetch what it lacks from the third tier, for a lookup some time later."""
        self._reader.call(Prefetch(list(keys)))

    def close(self) -> None:
        self._worker.close()
        self._writer.close()
        self._reader.close()

    def _write(self, keys: list[bytes], fill: Fill) -> int:
        reply = self._writer.call(Reserve(keys))
        if not isinstance(reply, Reserved) or not reply.places:
            return 0
        checksums: list[int] = []
        try:
            arena = self._writer.arena
            units = self._unit_rows(reply.units, len(reply.places), arena)
            for place, row_units, row in zip(reply.places, units, np.asarray(fill(reply.places)), strict=True):
                arena.write(row_units, row)
                checksums.append(checksum(keys[place], row))
        finally:  # if there is less than was reserved, the rest is given up
            is_done = isinstance(self._writer.call(Commit(reply.number, checksums)), Done)
        return len(checksums) if is_done else 0

    def _unit_rows(self, units: bytes, num_blocks: int, arena: Arena) -> list[array]:
        """Each block's units. Raises ValueError if they cannot be."""
        numbers, size = array("I", units), units_for(self.layout.block_bytes)
        if len(numbers) != num_blocks * size or max(numbers) >= arena.num_units:
            raise ValueError(f"{len(numbers)} units of {arena.num_units} for {num_blocks} blocks of {size}")
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def _check_peer(sock: socket.socket) -> None:
    """Raises PermissionError for another user's sidecar, which could answer anything."""
    _, uid, _ = PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
    if uid not in (0, os.geteuid()):
        raise PermissionError(f"the sidecar belongs to user {uid}")


def ask(path: Path, request: Request, timeout_s: float = ADMIN_TIMEOUT_S) -> dict:
    """Put a question about the sidecar itself; returns its facts. Raises ConnectionError if it does not answer."""
    connection = Connection(path, None, timeout_s)
    reply = connection.call(request)
    connection.close()
    if not isinstance(reply, Facts | Done):
        raise ConnectionError(f"the radix sidecar at {path} does not answer" if reply is None else reply.message)
    return reply.values if isinstance(reply, Facts) else {}
