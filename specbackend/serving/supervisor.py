"""Keeps one engine process alive: starts it, notices its end or silence, starts the next one."""

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from specbackend.serving.errors import EngineError
from specbackend.serving.protocol import Channel, Failed, Message, Ready, Start, Step

ENGINE_COMMAND = (sys.executable or "python3", "-m", "specbackend.serving.engine_process")
SEND_TIMEOUT_S = 10.0  # an engine that does not read for so long is treated as silent
FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0  # between failed restarts; the first restart is immediate
EXIT_GRACE_S = 0.2  # for a process that has closed its socket to end by itself; clients wait for their answer meanwhile
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
    """One engine process and the socket to it."""

    def __init__(self, params: dict, command: Sequence[str]):
        ours, theirs = socket.socketpair()
        ours.settimeout(SEND_TIMEOUT_S)
        with theirs:
            self._process = subprocess.Popen(
                [*command, *_arguments(theirs)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C at the terminal is tritonserver's to handle: it drains first
            )
        self.channel = Channel(ours)
        with suppress(ConnectionError):  # it has ended already, which shows when we receive
            self.channel.send(Start(params))

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()

    @property
    def exited(self) -> bool:
        return self._process.poll() is not None

    def bury(self) -> str:
        """Close the socket, which ends the process, and say how it ended. A slow one may still be `exited` later."""
        self.channel.close()
        try:
            code = self._process.wait(EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return "has closed its socket"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"

    def wait(self) -> None:
        self._process.wait()


class EngineSupervisor:
    """For one thread. `receive` when `fileno` is readable, `tend` now and then."""

    def __init__(self, params: dict, watchdog_timeout: float, command: Sequence[str] = ENGINE_COMMAND):
        self._params = params
        self._watchdog_timeout = watchdog_timeout
        self._command = command
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
        start = time.monotonic()
        self._process = EngineProcess(self._params, self._command)
        while True:
            wait_readable([self])  # loading takes as long as it takes; who starts the server sees it
            for event in self.receive():
                if isinstance(event, EngineDown):
                    raise EngineError(event.reason)
                if isinstance(event, Ready):
                    self._load_limit = LOAD_FACTOR * (time.monotonic() - start) + self._watchdog_timeout
                    return event

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
            if isinstance(message, Ready):
                self.ready = True
            elif isinstance(message, Step):
                self._num_failures = 0
            elif isinstance(message, Failed):
                self._kill(message.message)  # it ends by itself, but slower
        return messages

    def tend(self, now: float, busy: bool) -> list[EngineDown]:
        """Restart an engine that is gone; end one that says nothing though it is loading or busy."""
        if self._process is None:
            # before the old one has exited the device's memory is not free
            gone = self._ended.exited or now > self._last_sign + EXIT_LIMIT_S
            return self._restart(now) if gone and now >= self._restart_at else []
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
        """End the process and wait until it has ended."""
        if self._process is not None:
            self._process.bury()
            self._process.wait()
            self._process, self.ready = None, False

    def _restart(self, now: float) -> list[EngineDown]:
        self._last_sign = now
        try:
            self._process = EngineProcess(self._params, self._command)
        except OSError as error:
            return [self._go_down(f"the engine process cannot be started: {error}")]
        log.warning("engine restarted, pid %d", self._process.pid)
        return []

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


def _arguments(sock: socket.socket) -> list[str]:
    # the stub is tritonserver's child
    return ["--socket-fd", str(sock.fileno()), "--stub-pid", str(os.getpid()), "--server-pid", str(os.getppid())]
