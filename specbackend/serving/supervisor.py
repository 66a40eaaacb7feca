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
        self._restart_at = 0.0
        self._num_failures = 0  # since the last step
        self._reason = ""  # why the process is about to end, if known
        self._last_sign = 0.0  # of life
        self._busy = False
        self.ready = False

    @property
    def pid(self) -> int | None:
        return self._process and self._process.pid

    def start(self) -> Ready:
        """The first start: wait until the engine has loaded. Raises EngineError with the engine's own message."""
        self._process = EngineProcess(self._params, self._command)
        while True:
            wait_readable([self])  # loading takes as long as it takes
            for event in self.receive():
                if isinstance(event, EngineDown):
                    raise EngineError(event.reason)
                if isinstance(event, Ready):
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
        self._last_sign = time.monotonic()
        for message in messages:
            if isinstance(message, Ready):
                self.ready = True
            elif isinstance(message, Step):
                self._num_failures = 0
            elif isinstance(message, Failed):
                self._kill(message.message)  # it ends by itself, but slower
        return messages

    def tend(self, now: float, busy: bool) -> None:
        """Restart an engine that is gone; kill a ready one that is busy and says nothing."""
        if not (busy and self._busy):
            self._last_sign = now  # an idle engine says nothing, however long
        self._busy = busy
        if self._process is None:
            if now >= self._restart_at and self._ended.exited:  # before that the device's memory is not free
                self._restart(now)
        elif self.ready and now > self._last_sign + self._watchdog_timeout:
            self._kill(f"finished no step in {self._watchdog_timeout:g} s (watchdog_timeout)")

    def close(self) -> None:
        """End the process and wait until it has ended."""
        if self._process is not None:
            self._process.bury()
            self._process.wait()
            self._process, self.ready = None, False

    def _restart(self, now: float) -> None:
        self._restart_at = now + LONGEST_DELAY_S  # should not even the process start
        self._process = EngineProcess(self._params, self._command)
        log.warning("engine restarted, pid %d", self._process.pid)

    def _kill(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._process.kill()

    def _bury(self) -> EngineDown:
        exit_text, was_ready = self._process.bury(), self.ready
        reason, self._reason = self._reason or f"the engine process {exit_text}", ""
        self._process, self._ended, self.ready = None, self._process, False
        self._restart_at = time.monotonic() + self._delay()
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
