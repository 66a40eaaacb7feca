"""The other ranks of an engine with tp_size > 1, as the one that leads sees them: processes that repeat its calls."""

import faulthandler
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch.distributed as dist

from specbackend.errors import RankError
from specbackend.ranks import Seat
from specbackend.request import Update

SEND_TIMEOUT_S = 10  # for a follower to read what it is told; it does so between steps, and the socket holds much
LAST_WORDS_S = 2.0  # for a follower that fails to say why
EXIT_GRACE_S = 1.0

Tokens = list[tuple[str, list[int]]]


@dataclass(frozen=True)
class Call:
    """A method of Engine that the leader was called with. The followers' engines must do what its engine did."""

    method: str
    arguments: tuple
    last_tokens: Tokens = field(default_factory=list)  # of the leader's last step


def tokens_of(updates: list[Update]) -> Tokens:
    return [(update.request_id, update.token_ids) for update in updates]


class Follower:
    """One process, and the socket to it. What comes back is a sign that it can join, and later why it ends."""

    def __init__(self, seat: Seat, params: dict):
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = ["--rank", str(seat.rank), "--meeting", str(seat.meeting), "--socket-fd", str(theirs.fileno())]
            self.process = subprocess.Popen(
                [sys.executable or "python3", "-m", "specbackend.follow", *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # for logits_processors
                start_new_session=True,  # a Ctrl-C at the terminal is the leader's to handle
            )
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_TIMEOUT_S, 0))
        self.rank, self.connection = seat.rank, Connection(ours.detach())
        self.send(params)

    def send(self, message: object) -> None:
        """Its end, also a full socket's, shows in the next step."""
        with suppress(OSError):
            self.connection.send(message)

    def wait_for_start(self) -> None:
        """Raises EOFError if it ends first."""
        self.connection.recv()

    def last_words(self) -> str:
        with suppress(EOFError, OSError):
            return f"has failed: {self.connection.recv()}"
        try:
            code = self.process.wait(LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            return "has closed its socket"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"

    def end(self) -> None:
        self.connection.close()  # which ends it
        try:
            self.process.wait(EXIT_GRACE_S)
        except subprocess.TimeoutExpired:  # it is stopped, or in a driver
            self.process.kill()
            self.process.wait()


class Followers:
    """They end with this object, with this process, with `stop`, and with the first of them."""

    def __init__(self, tp_size: int, params: dict):
        """params: keyword arguments of each follower's engine."""
        folder = Path(tempfile.mkdtemp(prefix="specbackend-ranks-"))
        self.leaders_seat = Seat(0, folder / "meeting")
        self._followers = [Follower(Seat(rank, folder / "meeting"), params) for rank in range(1, tp_size)]
        self._last_tokens: Tokens = []
        self.stop = weakref.finalize(self, _end, self._followers, folder)

    @property
    def pids(self) -> list[int]:
        return [follower.process.pid for follower in self._followers]

    def wait_for_start(self) -> None:
        """Until the next thing they do is to join. To import torch takes its time."""
        for follower in self._followers:
            follower.wait_for_start()

    def tell(self, method: str, *arguments) -> None:
        """Have the followers make this call, too."""
        call = Call(method, arguments, self._last_tokens)
        for follower in self._followers:
            follower.send(call)

    def compare(self, updates: list[Update]) -> list[Update]:
        """The same updates, once noted: with the next call each follower learns whether its own were the same."""
        self._last_tokens = tokens_of(updates)
        return updates

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """What the ranks do together. If it fails on one, the others are left at another place: it is the end of all.

        Raises RankError with the name of the rank if a follower has ended. One that is stuck makes a collective fail
        after watchdog_timeout; NCCL then ends the process.
        """
        if not self.stop.alive:
            raise RankError("the ranks of this engine have ended")
        try:
            if any(follower.process.poll() is not None for follower in self._followers):
                raise RankError("a rank has ended")
            yield
        except BaseException as error:
            reason = self._why_ended() if isinstance(error, (EOFError, OSError, RuntimeError)) else ""
            self.stop()
            if reason:
                raise RankError(reason) from error
            raise

    def _why_ended(self) -> str:
        """What is known after LAST_WORDS_S of the followers that have ended; if none has, the leader's error tells."""
        wait([follower.connection for follower in self._followers], LAST_WORDS_S)
        ended = [follower for follower in self._followers if follower.connection.poll()]
        return "; ".join(f"rank {follower.rank} {follower.last_words()}" for follower in ended)


@contextmanager
def exit_after(seconds: float) -> Iterator[None]:
    """End this process, and tell where it was, if it is not through by then.

    Nothing else ends the wait for a CUDA graph in which NCCL waits for a rank that is gone.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _end(followers: list[Follower], folder: Path) -> None:
    for follower in followers:
        follower.end()
    if dist.is_initialized():
        dist.destroy_process_group()
    shutil.rmtree(folder, ignore_errors=True)
