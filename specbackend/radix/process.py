"""A sidecar of one's own: a child process that is started again when it ends, and ends with its parent."""

import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from specbackend.radix.server import is_served

COMMAND = (sys.executable or "python3", "-m", "specbackend.radix.server")
FIRST_DELAY_S, LONGEST_DELAY_S = 0.1, 30.0  # before restarts, twice as long after each that did not live
LIVED_S = 1.0  # what fails to start takes less
EXIT_LIMIT_S = 10.0

log = logging.getLogger(__name__)


def own_socket(server_pid: int) -> Path:
    """Where the models of one tritonserver meet if nobody says where."""
    return Path(tempfile.gettempdir()) / f"specbackend-{os.getuid()}" / f"radix-{server_pid}.sock"


def is_ours(folder: Path) -> bool:
    """Whether the folder is there, and nobody else's."""
    try:
        return folder.lstat().st_uid == os.getuid()
    except FileNotFoundError:
        return False


def make_private(folder: Path) -> None:
    """A folder in which only this user can put something. Raises PermissionError if somebody else was there first."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if not is_ours(folder):
        raise PermissionError(f"{folder}: belongs to somebody else")


class SidecarProcess:
    """Started at once, and again until it is closed. `options` are the server's own, see `--help` there."""

    def __init__(self, socket_path: Path, options: Sequence[str] = ()):
        self._path = socket_path
        self._command = [*COMMAND, "--socket", str(socket_path), "--follow", str(os.getpid()), *options]
        self._closing = threading.Event()
        self._process = self._start()
        self._keeper = threading.Thread(target=self._keep, name="radix sidecar", daemon=True)
        self._keeper.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait_ready(self, timeout_s: float) -> bool:
        """Whether it listens within this time."""
        deadline = time.monotonic() + timeout_s
        while not is_served(self._path):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def close(self) -> None:
        """End it. Does not wait for ever: a large snapshot may take longer."""
        self._closing.set()
        self._process.terminate()
        self._keeper.join(EXIT_LIMIT_S)

    def _start(self) -> subprocess.Popen:
        return subprocess.Popen(self._command, stdin=subprocess.DEVNULL, start_new_session=True)

    def _keep(self) -> None:
        delay = FIRST_DELAY_S
        while True:
            start = time.monotonic()
            code = self._process.wait()
            if self._closing.is_set():
                return
            log.error("the radix sidecar ended with code %d", code)
            delay = FIRST_DELAY_S if time.monotonic() - start > LIVED_S else min(2 * delay, LONGEST_DELAY_S)
            if self._closing.wait(delay):
                return
            self._process = self._start()
