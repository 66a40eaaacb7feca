"""A model that uses an engine, in a process of its own: `python -m tests.serving.face FOLDER PARAMS COMMAND...`.

Prints a line of JSON whenever its engine is ready (its pid) or has ended (why). Ends with its input.
"""

import json
import socket
import sys
import tempfile
import time
from pathlib import Path

from specbackend.serving import supervisor as supervisor_module
from specbackend.serving.engine_socket import connect
from specbackend.serving.errors import EngineError
from specbackend.serving.protocol import Ready
from specbackend.serving.supervisor import EngineDown, EngineSupervisor, wait_readable


def main() -> None:
    tempfile.tempdir = sys.argv[1]
    supervisor_module.connect = connect_slowly
    supervisor = EngineSupervisor(json.loads(sys.argv[2]), 60.0, sys.argv[3:])
    try:
        supervisor.start()
    except EngineError as error:
        return say(error=str(error))
    say(pid=supervisor.pid)
    while sys.stdin.fileno() not in (readable := wait(supervisor)):
        events = supervisor.receive() if supervisor.fileno() in readable else []
        for event in [*events, *supervisor.tend(time.monotonic(), busy=False)]:
            if isinstance(event, EngineDown):
                say(down=event.reason)
            if isinstance(event, Ready):
                say(pid=supervisor.pid)


def connect_slowly(path: Path) -> socket.socket | None:
    """Leaves time for another face to start the engine that this one has looked for."""
    found = connect(path)
    time.sleep(0.1)
    return found


def wait(supervisor: EngineSupervisor) -> list[int]:
    files = [sys.stdin] if supervisor.fileno() is None else [sys.stdin, supervisor]
    return wait_readable(files, 0.05)


def say(**values) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
