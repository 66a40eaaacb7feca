"""The bench's side of a peer: start its worker, ask, and keep it quiet while it isn't asked."""

import ctypes
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from peers.worker import Answers, Prompts

TOOLS = Path(__file__).resolve().parent.parent
PR_SET_PDEATHSIG = 1
EXIT_S = 10  # until a worker without anything to do has ended
LOG_LINES = 5  # of a dead worker's stderr


class PeerError(Exception):
    """A peer cannot do what it was asked. The message is its own."""


class PeerProcess:
    """A worker as a context manager. Between two requests it stands still: threads that spin while they wait for work
    would take their cores from the others.
    """

    def __init__(self, python: Path | str, worker: Path | str, env: Mapping[str, str]):
        paths = (str(TOOLS), str(TOOLS.parent), os.environ.get("PYTHONPATH"))
        self._command: Sequence[str] = (str(python), str(worker))
        self._env = {**os.environ, **env, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def __enter__(self) -> "PeerProcess":
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            self._command,
            env=self._env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            preexec_fn=_die_with_parent,  # one that is stopped would outlive a killed bench
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGCONT)
        with suppress(BrokenPipeError):  # it is dead, and its last request still in the buffer
            self._process.stdin.close()
        try:
            self._process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def load(self, name: str, settings: dict) -> str:
        """Make a contestant. Returns the peer's version. Raises PeerError."""
        return self._ask({"load": name, "settings": settings})["version"]

    def generate(self, name: str, prompts: Prompts, max_new_tokens: int) -> Answers:
        """Greedy answers, timed by the worker. Raises PeerError."""
        return Answers(**self._ask({"generate": name, "prompts": prompts, "max_new_tokens": max_new_tokens}))

    def _ask(self, request: dict) -> dict:
        self._process.send_signal(signal.SIGCONT)
        try:
            print(json.dumps(request, default=str), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"ended with code {self._process.wait()}: {self._log_tail()}")
        self._process.send_signal(signal.SIGSTOP)
        reply = json.loads(line)
        if "error" in reply:
            raise PeerError(reply["error"])
        return reply

    def _log_tail(self) -> str:
        self._log.seek(0)
        return " | ".join(self._log.read().splitlines()[-LOG_LINES:])


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
