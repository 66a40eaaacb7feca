"""Keeps an engine process alive: finds or starts it, notices its end or silence, finds or starts the next one.

All that want an equal engine for the same tritonserver share one. Whoever comes first starts it.
"""

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from specbackend.radix.process import make_private
from specbackend.radix.server import bind, locked
from specbackend.serving.engine_socket import connect, dismiss_unused, engine_socket
from specbackend.serving.errors import EngineError
from specbackend.serving.protocol import Channel, Failed, Hello, Message, Ready, Start, Step

ENGINE_COMMAND = (sys.executable or "python3", "-m", "specbackend.serving.engine_process")
SEND_TIMEOUT_S = 10.0  # an engine that does not read for so long is treated as silent
FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0  # between failed restarts; the first restart is immediate
EXIT_GRACE_S = 0.2  # for a process that has closed its connection to end by itself; clients wait for it meanwhile
EXIT_LIMIT_S = 30.0  # for a killed process to be gone; a driver may hold it for ever
LOAD_FACTOR = 3  # a restart may take so much longer than the first load: its files may have left the page cache

log = logging.getLogger(__name__)


class HasFileno(Protocol):
    def fileno(self) -> int: ...


@dataclass(frozen=True)
class EngineDown:
    """The engine process has ended. What was submitted to it is lost; a new one will be started."""

    reason: str
    was_ready: bool


class EngineProcess:
    """An engine process, whoever has started it, and our connection to it."""

    def __init__(self, path: Path, sock: socket.socket, child: subprocess.Popen | None):
        """child: if it is ours, which alone tells how it ends. Whoever calls holds the folder's lock."""
        sock.settimeout(SEND_TIMEOUT_S)
        self.channel = Channel(sock)
        self.pid: int | None = None
        self._path, self._identity = path, _identity(path)
        self._child = child
        self._pidfd: int | None = None
        if child:
            self.meet(child.pid)

    @property
    def is_ours(self) -> bool:
        return self._child is not None

    def meet(self, pid: int) -> None:
        """It has said who it is."""
        if self.pid is None:
            self.pid = pid
            with suppress(ProcessLookupError):
                self._pidfd = os.pidfd_open(pid)
                weakref.finalize(self, os.close, self._pidfd)

    def kill(self) -> None:
        """For all that share it. A driver may hold it for some time yet, but nobody connects to it any more."""
        with suppress(OSError), locked(self._path.parent):
            if _identity(self._path) == self._identity:  # else it is the next one's
                self._path.unlink()
        if self._pidfd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    @property
    def exited(self) -> bool:
        return self.wait(0)

    def wait(self, timeout_s: float) -> bool:
        """Whether it has exited within this time."""
        if self._pidfd is None:
            return True
        if not wait_readable([self._pidfd], timeout_s):  # a pidfd becomes readable when its process ends
            return False
        if self._child:
            self._child.wait()
        return True

    def bury(self) -> str:
        """Close the connection and say how the process ended, if it did. A slow one may still be `exited` later."""
        self.channel.close()
        if not self.wait(EXIT_GRACE_S):
            return "has closed its connection"
        if self._child is None:
            return "has ended"
        code = self._child.returncode
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


class EngineSupervisor:
    """For one thread. `receive` when `fileno` is readable, `tend` now and then."""

    def __init__(self, params: dict, watchdog_timeout: float, command: Sequence[str] = ENGINE_COMMAND):
        self._params = params
        self._watchdog_timeout = watchdog_timeout
        self._command = command
        self._server_pid = os.getppid()  # the stub is tritonserver's child, as long as that lives
        self._path = engine_socket(self._server_pid, params, command)
        self._process: EngineProcess | None = None
        self._ended: EngineProcess | None = None  # the one before
        self._load_limit = 0.0  # for restarts; known once the first engine has loaded
        self._restart_at = 0.0
        self._num_failures = 0  # since the last step
        self._reason = ""  # why the process is about to end, if known
        self._last_sign = 0.0  # of life: a message, the start, the end
        self._busy = False
        self.ready = False

    @property
    def pid(self) -> int | None:
        return self._process and self._process.pid

    def start(self) -> Ready:
        """The first start: wait until the engine has loaded. Raises EngineError with the engine's own message."""
        try:
            self._process = self._attach()
        except OSError as error:
            raise EngineError(f"the engine process cannot be started: {error}") from error
        while True:
            wait_readable([self])  # loading takes as long as it takes; who starts the server sees it
            for event in self.receive():
                match event:
                    case Ready():
                        self._load_limit = LOAD_FACTOR * event.load_seconds + self._watchdog_timeout
                        return event
                    case Failed(message):
                        self.close()
                        raise EngineError(message)
                    case EngineDown(reason) if self._ended.is_ours:
                        raise EngineError(reason)
                    case EngineDown():  # it was about to end when we came, or whoever has started it hears more
                        self._ended.wait(EXIT_LIMIT_S)
                        return self.start()

    def fileno(self) -> int | None:
        """None while there is no process."""
        return self._process and self._process.channel.fileno()

    def send(self, message: Message) -> None:
        """Send, if there is an engine; its end, also a full socket's, shows in `receive`."""
        if self._process is None:
            return
        try:
            self._process.channel.send(message)
        except TimeoutError:
            self._kill(f"did not read for {SEND_TIMEOUT_S:g} s")
        except ConnectionError:
            pass

    def receive(self) -> list[Message | EngineDown]:
        """What the engine says; the last event of a process is EngineDown."""
        try:
            messages = self._process.channel.receive()
        except (EOFError, ConnectionError):
            return [self._bury()]
        except Exception as error:  # a bug; and what follows on the socket would mean nothing either
            return [self._give_up(f"sent what cannot be read: {type(error).__name__}: {error}")]
        self._last_sign = time.monotonic()
        for message in messages:
            if isinstance(message, Hello):
                self._process.meet(message.pid)
            elif isinstance(message, Ready):
                self.ready = True
            elif isinstance(message, Step):
                self._num_failures = 0
            elif isinstance(message, Failed):
                self._kill(message.message)  # it ends by itself, but slower
        return messages

    def tend(self, now: float, busy: bool) -> list[EngineDown]:
        """Restart an engine that is gone; end one that says nothing though it is loading or busy."""
        if self._process is None:
            return self._restart(now) if now >= self._restart_at else []
        if self.ready and not (busy and self._busy):
            self._last_sign = now  # an idle engine says nothing, however long
        self._busy = busy
        silence = now - self._last_sign
        if self.ready and silence > self._watchdog_timeout:
            return [self._give_up(f"finished no step in {self._watchdog_timeout:g} s (watchdog_timeout)")]
        if not self.ready and silence > self._load_limit:
            limit = f"{self._load_limit:.1f} s ({LOAD_FACTOR} times what the first load took, and watchdog_timeout)"
            return [self._give_up(f"did not load within {limit}")]
        return []

    def close(self) -> None:
        """Leave the engine, which ends soon if nobody else is there."""
        if self._process is not None:
            self._process.channel.close()
            self._process, self.ready = None, False

    def _restart(self, now: float) -> list[EngineDown]:
        """Before the old one has exited the device's memory is not free, but somebody may have waited for that."""
        is_free = self._ended.exited or now > self._last_sign + EXIT_LIMIT_S
        try:
            self._process = self._attach(may_start=is_free)
        except OSError as error:
            return [self._go_down(f"the engine process cannot be started: {error}")]
        if self._process is not None:
            self._last_sign = now
            log.warning("engine %s", f"restarted, pid {self.pid}" if self._process.is_ours else "found anew")
        return []

    def _attach(self, may_start: bool = True) -> EngineProcess | None:
        """Connect to the engine, one that has to be started first if it may be. Raises OSError if it cannot."""
        make_private(self._path.parent)
        with locked(self._path.parent):
            sock, child = connect(self._path), None
            if sock is None and may_start:
                dismiss_unused(self._server_pid)
                sock, child = _launch(self._path, self._server_pid, self._command)
            if sock is None:
                return None
            process = EngineProcess(self._path, sock, child)
            with suppress(ConnectionError):  # it has ended already, which shows when we receive
                process.channel.send(Start(self._params))  # under the lock: an engine that is left alone ends under it
        return process

    def _give_up(self, reason: str) -> EngineDown:
        self._kill(reason)
        return self._bury()

    def _kill(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._process.kill()

    def _bury(self) -> EngineDown:
        exit_text = self._process.bury()
        reason, self._reason = self._reason or f"the engine process {exit_text}", ""
        self._process, self._ended = None, self._process
        return self._go_down(reason)

    def _go_down(self, reason: str) -> EngineDown:
        was_ready, self.ready = self.ready, False
        self._last_sign = time.monotonic()
        self._restart_at = self._last_sign + self._delay()
        self._num_failures += 1
        log.error("engine is down: %s", reason)
        return EngineDown(reason, was_ready)

    def _delay(self) -> float:
        return min(FIRST_DELAY_S * 2 ** (self._num_failures - 1), LONGEST_DELAY_S) if self._num_failures else 0.0


def wait_readable(files: Iterable[HasFileno | int], timeout_s: float | None = None) -> list[int]:
    """Wait until one of them has something to read, and return the descriptors that have."""
    poll = select.poll()  # select.select() ends at descriptor 1024
    for file in files:
        poll.register(file, select.POLLIN)
    return [fd for fd, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)]


def _launch(path: Path, server_pid: int, command: Sequence[str]) -> tuple[socket.socket, subprocess.Popen]:
    """Start an engine that listens at `path`, and a connection to it. It outlives this process if others use it."""
    with bind(path) as listener:
        sock = connect(path)
        arguments = ["--listener-fd", str(listener.fileno()), "--server-pid", str(server_pid)]
        arguments += ["--started", str(time.monotonic())]
        try:
            child = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # a Ctrl-C at the terminal is tritonserver's to handle: it drains first
            )
        except OSError:
            sock.close()
            raise
    return sock, child


def _identity(path: Path) -> tuple[int, int] | None:
    """Tells a socket's file from the one that comes after it in the same place. None: it is gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_ctime_ns
