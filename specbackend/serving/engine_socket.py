"""Where the models of one tritonserver find their engines, and how somebody who has none of them asks one."""

import hashlib
import json
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from specbackend.radix.process import is_ours, own_socket
from specbackend.serving.protocol import CacheTree, Channel, Facts, Failed, FlushCache, Hello, Leave

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 2.0


def engine_socket(server_pid: int, params: Mapping, command: Sequence[str]) -> Path:
    """Of the one engine that is started like this for the models of a tritonserver."""
    text = json.dumps([params, list(command)], sort_keys=True)
    return _sockets_folder(server_pid) / f"engine-{server_pid}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.sock"


def engine_sockets(server_pid: int) -> list[Path]:
    """Of all engines of a tritonserver, and maybe of some that were killed. What others have put there is none."""
    folder = _sockets_folder(server_pid)
    return sorted(folder.glob(f"engine-{server_pid}-*.sock")) if is_ours(folder) else []


def connect(path: Path) -> socket.socket | None:
    """None: no engine listens there. Raises OSError if nothing can."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(CONNECT_TIMEOUT_S)
    try:
        sock.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except OSError:
        sock.close()
        raise
    return sock


def dismiss_unused(server_pid: int) -> None:
    """Have engines end that no model uses any more: they hold memory of the device."""
    for path in engine_sockets(server_pid):
        with suppress(OSError):
            if sock := connect(path):
                with sock:
                    Channel(sock).send(Leave())


def ask_engines(server_pid: int, question: FlushCache | CacheTree) -> list[dict]:
    """The facts of each engine that lives, its pid among them; `error` in the place of facts if it is silent."""
    answers = [_ask(path, question) for path in engine_sockets(server_pid)]
    return [answer for answer in answers if answer]


def _ask(path: Path, question: FlushCache | CacheTree) -> dict:
    """Nothing, if no engine listens there. One that cannot be understood does not answer."""
    facts: dict = {}
    with suppress(OSError, EOFError, TypeError, ValueError, LookupError):
        sock = connect(path)
        if sock is None:
            return {}
        with sock:
            facts = {"error": "the engine does not answer"}
            for message in _converse(sock, question):
                match message:
                    case Hello(pid):
                        facts = {"pid": pid, **facts}
                    case Failed(text):
                        return {**facts, "error": text}
                    case Facts(values):
                        return {"pid": facts["pid"], **values}
    return facts


def _converse(sock: socket.socket, question: FlushCache | CacheTree):
    """What the engine says, until it is late."""
    channel, deadline = Channel(sock), time.monotonic() + ANSWER_TIMEOUT_S
    channel.send(question)
    while (left := deadline - time.monotonic()) > 0:
        sock.settimeout(left)
        yield from channel.receive()


def _sockets_folder(server_pid: int) -> Path:
    return own_socket(server_pid).parent
