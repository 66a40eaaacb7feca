"""The engine process's end of its socket: who is connected, what they say, and when there is nobody left to work for.

One thread receives from all and watches tritonserver; the engine's own thread sends. Whoever connects is an adapter
once it has said Start. The others only ask.
"""

import math
import os
import queue
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from specbackend.radix.server import locked
from specbackend.serving.protocol import Channel, Failed, Hello, Leave, Message, Start

SEND_TIMEOUT_S = 10.0  # for one that does not read; all others wait meanwhile, and then it is dropped
REFUSED_PAUSE_S = 0.5
PEER = struct.Struct("3i")  # pid, uid, gid


def as_timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))


SEND_TIMEOUT = as_timeval(SEND_TIMEOUT_S)


class Connection:
    """Raises ProcessLookupError if whoever has connected is gone."""

    def __init__(self, number: int, sock: socket.socket):
        self.number = number
        self.is_adapter = number == 0  # whoever has started this process had connected before
        self._socket, self._channel = sock, Channel(sock)
        self._sending = threading.Lock()  # or another connection could have the descriptor before all is sent
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, SEND_TIMEOUT)
        pid, _, _ = PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
        self._process = os.pidfd_open(pid)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """If it does not arrive, that is the connection's end, of which the thread that receives will tell."""
        with self._sending:
            try:
                self._channel.send(message)
            except OSError:
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def receive(self) -> list[Message]:
        """What has come, maybe nothing. Raises EOFError or OSError at the end, anything else for what means nothing."""
        messages = self._channel.receive()
        self.is_adapter |= any(isinstance(message, Start) for message in messages)
        return messages

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, signal.SIGKILL)

    @property
    def is_closed(self) -> bool:
        return self._socket.fileno() < 0

    def close(self) -> None:
        if self.is_closed:
            return
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # which ends a send
        with self._sending:
            self._socket.close()
        os.close(self._process)


@dataclass(frozen=True)
class Gone:
    """The connection has ended. Nothing follows; whoever gets this closes it, unless it only asked: then it is."""


@dataclass(frozen=True)
class Heard:
    connection: Connection
    message: Message | Gone


class Connections:
    """Ends this process with tritonserver, and when there has been no adapter for `linger_s`.

    heard: what was said, in order.
    """

    def __init__(self, listener: socket.socket, server_pid: int, linger_s: float):
        self.heard: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        self._listener, self._path = listener, Path(listener.getsockname())
        listener.setblocking(False)
        self._linger_s = linger_s
        self._alone_since = time.monotonic()
        self._open: dict[int, Connection] = {}  # by descriptor
        self._num_accepted = 0
        self._poll = select.poll()
        try:
            self._server = os.pidfd_open(server_pid)
        except ProcessLookupError:
            self._end_with_server()
        self._poll.register(self._server, select.POLLIN)  # a pidfd becomes readable when its process ends
        self._poll.register(listener, select.POLLIN)
        threading.Thread(target=self._run, name="connections", daemon=True).start()

    def fail(self, reason: str) -> None:
        """Tell everybody why this process is about to end. From now on whoever connects does so to the next one."""
        self._path.unlink(missing_ok=True)
        for connection in list(self._open.values()):
            connection.send(Failed(reason))

    def _run(self) -> None:
        try:
            while True:
                self._turn()
        except Exception:  # a bug; but an engine that hears nothing helps nobody
            traceback.print_exc()
            os._exit(1)

    def _turn(self) -> None:
        for fd, _ in self._poll.poll(self._milliseconds_left()):
            if fd == self._server:
                self._end_with_server()
            elif fd == self._listener.fileno():
                self._accept()
            else:
                self._receive(fd)
        if self._milliseconds_left() == 0:
            self._end_alone()

    def _milliseconds_left(self) -> float | None:
        """Until this process has been alone for long enough; None if it is not alone."""
        if any(connection.is_adapter for connection in self._open.values()):
            return None
        return max(0.0, 1000 * (self._alone_since + self._linger_s - time.monotonic()))

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # too many files, which may change
            print(f"engine process: nobody can connect: {error}", file=sys.stderr)
            time.sleep(REFUSED_PAUSE_S)
            return
        try:
            connection = Connection(self._num_accepted, sock)
        except OSError:
            sock.close()
            return
        self._num_accepted += 1
        connection.send(Hello(os.getpid()))
        self._poll.register(sock, select.POLLIN)
        self._open[sock.fileno()] = connection

    def _receive(self, fd: int) -> None:
        connection = self._open[fd]
        try:
            for message in connection.receive():
                if isinstance(message, Leave):
                    self._alone_since = -math.inf
                else:
                    self.heard.put(Heard(connection, message))
        except (EOFError, OSError):
            self._drop(fd)
        except Exception:  # what follows on this connection would mean nothing either
            traceback.print_exc()
            self._drop(fd)

    def _drop(self, fd: int) -> None:
        connection = self._open.pop(fd)
        self._poll.unregister(fd)
        if connection.is_adapter:
            self._alone_since = time.monotonic()
        else:
            connection.close()  # while the engine loads, nobody hears of it
        self.heard.put(Heard(connection, Gone()))

    def _end_alone(self) -> None:
        """From whatever the engine is doing, unless somebody has just connected."""
        with suppress(FileNotFoundError), locked(self._path.parent):
            if self._poll.poll(0):
                return
            self._path.unlink(missing_ok=True)
        os._exit(0)

    def _end_with_server(self) -> None:
        """Leave no process behind: a stub does not notice the end of its server while it is inside a send."""
        self._accept()  # if this comes so early that the first is still waiting
        for connection in self._open.values():
            if connection.is_adapter:
                connection.kill()
        self._path.unlink(missing_ok=True)
        os._exit(1)
