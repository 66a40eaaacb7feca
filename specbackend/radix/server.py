"""The sidecar: `python -m specbackend.radix.server`. One process for all engines of a host, which come and go.

A thread for each connection. What a connection holds ends with it, also when its engine is killed. No torch here.
"""

import argparse
import errno
import fcntl
import logging
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from specbackend.radix import snapshot
from specbackend.radix.arena import Arena, create_memory, provide, units_for
from specbackend.radix.cache import BlockCache
from specbackend.radix.index import Block, BlockIndex
from specbackend.radix.keys import Layout
from specbackend.radix.protocol import (
    Attach,
    Attached,
    Audit,
    Commit,
    Done,
    Facts,
    Flush,
    Found,
    GetStats,
    Lookup,
    Prefetch,
    Refused,
    Release,
    Reply,
    Request,
    Reserve,
    Reserved,
    Snapshot,
    receive,
    send,
)
from specbackend.radix.tiers import StoreTier, ValkeyStore

ENDS = {signal.SIGTERM, signal.SIGINT}
REFUSED_PAUSE_S = 0.5
SEND_TIMEOUT_S = 10.0  # for a client that asks and does not read
SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

log = logging.getLogger(__name__)


class Sidecar:
    def __init__(self, arena_bytes: int, store_url: str | None = None):
        self.memory_fd = create_memory(arena_bytes)
        self.arena_bytes = os.fstat(self.memory_fd).st_size
        arena = Arena(self.memory_fd, self.arena_bytes)
        self.cache = BlockCache(BlockIndex(arena.num_units, partial(provide, self.memory_fd)), arena)
        self.tier = StoreTier(ValkeyStore(store_url), self.cache) if store_url else None
        self.layouts: set[Layout] = set()
        self._saving = threading.Lock()

    def serve(self, listener: socket.socket) -> None:
        """Accept connections for ever."""
        while True:
            try:
                connection, _ = listener.accept()
                threading.Thread(target=Session(self, connection).run, daemon=True).start()
            except (OSError, RuntimeError) as error:  # too many files or threads, which may change
                log.error("a client is not served: %s", error)
                time.sleep(REFUSED_PAUSE_S)

    def stats(self) -> dict:
        of_store = self.tier.stats() if self.tier else {}
        return {"arena_bytes": self.arena_bytes, **self.cache.index.stats(), **of_store, "layouts": list(self.layouts)}

    def save(self, path: Path) -> None:
        with self._saving:
            log.info("snapshot of %d blocks", snapshot.save(path, self.cache, list(self.layouts)))

    def restore(self, path: Path) -> None:
        self.layouts.update(snapshot.restore(path, self.cache))
        log.info("restored %d blocks", self.cache.index.stats()["published_blocks"])

    def close(self) -> None:
        if self.tier:
            self.tier.close()


class Session:
    """One connection and what it holds."""

    def __init__(self, sidecar: Sidecar, sock: socket.socket):
        self._sidecar, self._socket = sidecar, sock
        self._index = sidecar.cache.index
        self._block_bytes = 0  # until it attaches

    def run(self) -> None:
        with self._socket, self._index.holding() as self._holder:
            try:
                while True:
                    self._socket.settimeout(None)
                    request = receive(self._socket)
                    self._socket.settimeout(SEND_TIMEOUT_S)
                    self._reply(self._answer(request))
            except (EOFError, OSError):
                pass  # the client is gone
            except ValueError as error:
                log.warning("a client is dropped: %s", error)

    def _reply(self, reply: Reply) -> None:
        send(self._socket, reply, (self._sidecar.memory_fd,) if isinstance(reply, Attached) else ())

    def _answer(self, request: Request) -> Reply:
        if not self._block_bytes and isinstance(request, (Lookup, Reserve, Prefetch)):
            return Refused("attach first")
        try:
            return self._do(request)
        except KeyError:  # of the sidecar before this one
            return Refused("no such lease or reservation")
        except OSError as error:  # a snapshot's
            return Refused(str(error))

    def _do(self, request: Request) -> Reply:
        match request:
            case Attach(layout):
                return self._attach(layout)
            case Lookup(keys):
                return self._lookup(keys)
            case Reserve(keys):
                return self._reserve(keys)
            case Release(number, poisoned):
                self._index.release(self._holder, number, poisoned)
            case Commit(number, checksums):
                self._commit(number, checksums)
            case Prefetch(keys):
                if self._sidecar.tier:
                    self._sidecar.tier.prefetch(keys, self._block_bytes)
            case Flush():
                self._index.flush()
            case GetStats():
                return Facts(self._sidecar.stats())
            case Audit():
                return Facts({"leaks": self._index.audit()})
            case Snapshot(path):
                self._sidecar.save(Path(path))
        return Done()

    def _attach(self, layout: Layout) -> Reply:
        if layout.block_bytes < 1 or units_for(layout.block_bytes) > self._index.num_units:
            return Refused(f"a block of {layout.block_bytes} bytes; the arena has {self._sidecar.arena_bytes}")
        self._block_bytes = layout.block_bytes
        self._sidecar.layouts.add(layout)
        return Attached(self._sidecar.arena_bytes)

    def _lookup(self, keys: list[bytes]) -> Found:
        found = self._index.lookup(self._holder, keys)
        num_hits = len(found.blocks)
        self._index.count(lookups=1, hit_blocks=num_hits, missed_blocks=len(keys) - num_hits)
        return Found(found.number, [block.checksum for block in found.blocks], _units(found.blocks))

    def _reserve(self, keys: list[bytes]) -> Reserved:
        reserved = self._index.reserve(self._holder, keys, self._block_bytes)
        fresh = {block.key for block in reserved.blocks}
        places = [place for place, key in enumerate(keys) if key in fresh]
        return Reserved(reserved.number, places, _units(reserved.blocks))

    def _commit(self, number: int, checksums: list[int]) -> None:
        published = self._index.commit(self._holder, number, checksums)
        if self._sidecar.tier and published:
            self._sidecar.tier.write_behind(published)


def _units(blocks: list[Block]) -> bytes:
    return b"".join(block.units for block in blocks)


@contextmanager
def listen(path: Path) -> Iterator[socket.socket]:
    """A socket that only this user reaches; its file goes at the end. Raises OSError if a sidecar serves there."""
    with locked(path.parent):
        if is_served(path):
            raise OSError(f"{path}: a sidecar serves there already")
        listener = bind(path)
    try:
        yield listener
    finally:
        path.unlink(missing_ok=True)


def bind(path: Path) -> socket.socket:
    """A socket that listens for this user only, in the place of one whose process was killed."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    umask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(umask)
    listener.listen()
    return listener


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """For whoever makes or removes sockets in it."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def is_served(path: Path) -> bool:
    """Whether a sidecar listens there, be it one that does not answer."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) not in (errno.ENOENT, errno.ECONNREFUSED)


def end_with(pid: int) -> None:
    """End this process, as SIGTERM does, when that one ends."""
    pidfd = os.pidfd_open(pid)

    def wait() -> None:
        select.select([pidfd], [], [])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def parse_size(text: str) -> int:
    """`4GiB`, `512M`, `65536`, ... Raises ValueError."""
    match = re.fullmatch(r"(\d+) ?(?:([KMGT])i?B?)?", text.strip())
    if not match:
        raise ValueError(f"{text!r} is no size: 512MiB, 4GiB, ...")
    return int(match[1]) * SUFFIXES.get(match[2], 1)


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="radix sidecar: %(message)s")
    try:
        with end_signals() as ends:
            if args.follow:
                end_with(args.follow)
            run(Sidecar(args.size, args.valkey), args.socket, args.snapshot, ends)
    except (OSError, ImportError, ValueError) as error:
        print(f"radix sidecar: {error}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def end_signals() -> Iterator[socket.socket]:
    """What has something to receive once a signal came to end, to whichever thread.

    Blocked and waited for, it would end the process at once whenever it comes to a thread that a library has started
    before and whose mask nobody can set.
    """
    ends, told = socket.socketpair()
    with ends, told:
        told.setblocking(False)
        signal.set_wakeup_fd(told.fileno())
        for each in ENDS:
            signal.signal(each, lambda *_: None)  # python's own handler tells the socket
        try:
            yield ends
        finally:
            signal.set_wakeup_fd(-1)


def run(sidecar: Sidecar, path: Path, snapshot_path: Path | None, ends: socket.socket) -> None:
    """Serve until `ends` has something to receive; start with the snapshot, if there is one, and leave one."""
    if snapshot_path:
        with suppress(FileNotFoundError):
            sidecar.restore(snapshot_path)
    with listen(path) as listener:
        threading.Thread(target=sidecar.serve, args=(listener,), daemon=True).start()
        log.info("ready")
        ends.recv(1)
        sidecar.close()
        if snapshot_path:
            sidecar.save(snapshot_path)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Keep KV blocks of prompts in memory for all engines of this host.")
    parser.add_argument("--socket", type=Path, required=True, help="where engines find it")
    parser.add_argument("--size", type=parse_size, default="4GiB", help="of the memory; default: %(default)s")
    parser.add_argument("--snapshot", type=Path, help="a file: read at the start, written at the end")
    parser.add_argument("--valkey", metavar="URL", help="third tier: valkey://host:port, valkey-cluster://host:port")
    parser.add_argument("--follow", type=int, metavar="PID", help="end when that process ends")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
