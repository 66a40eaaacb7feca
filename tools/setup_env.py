"""Makes the project's environment, `.venv/`, from nothing but a Python, and moves the calling script into it.

Runs before there is an environment, on whatever `python3` is: standard library only, no syntax newer than Python 3.8.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "setup.log"
STAMP = VENV / "setup.stamp"  # what the environment was made from; absent until it is whole
UNFINISHED = VENV / "setup.unfinished"  # an install was cut off here: nothing in the environment can be trusted
REQUIREMENTS = ROOT / "requirements"
VERSIONS = ("3.11", "3.12", "3.10")  # in order of preference
GLIBC = (2, 35)  # what the tritonserver wheel was built for
LOG_TAIL = 15  # lines shown when a step fails

Steps = "list[tuple[str, list[str]]]"


class SetupError(Exception):
    """The environment cannot be made. The message says why and what to do."""


def enter(script: str) -> None:
    """Go on with `script` and its arguments in the project's environment, which is made or repaired first."""
    try:
        is_new = ensure()
    except SetupError as error:
        sys.exit(f"set-up failed: {error}")
    except KeyboardInterrupt:
        sys.exit("set-up interrupted; the next run starts it afresh")
    if is_new or not os.path.samefile(sys.prefix, VENV):  # a Python that was there before it finds nothing new
        os.environ.pop("PYTHONHOME", None)
        os.execv(str(PYTHON), [str(PYTHON), script, *sys.argv[1:]])


def ensure() -> bool:
    """Return when the environment is what the pins say: whether it was not before.

    A second set-up at the same time waits for the first.
    """
    if is_current():
        return False
    with open(__file__) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_current():
            build()
    return True


def is_current() -> bool:
    version = venv_version()
    return version is not None and STAMP.exists() and STAMP.read_text() == fingerprint(version)


def fingerprint(version: str) -> str:
    """Of all that the environment depends on, its place included: an editable install breaks when it is moved."""
    files = [*sorted(REQUIREMENTS.glob("*.txt")), ROOT / "pyproject.toml"]
    content = b"\0".join([version.encode(), str(ROOT).encode(), *(path.read_bytes() for path in files)])
    return hashlib.sha256(content).hexdigest()


def venv_version() -> str | None:
    """The Python version of the environment, None if there is no environment that runs."""
    return python_version(str(PYTHON)) if PYTHON.exists() else None


def python_version(python: str, modules: str = "sys") -> str | None:
    """'3.11' if `python` runs and has the modules, else None."""
    code = f"import sys, {modules}; print('%d.%d' % sys.version_info[:2])"
    result = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


def build() -> None:
    check_platform()
    if UNFINISHED.exists() or venv_version() not in VERSIONS:
        shutil.rmtree(VENV, ignore_errors=True)
    if venv_version() is None and (hint := torch_hint()):
        print(hint, file=sys.stderr)
    progress = Progress()
    VENV.mkdir(exist_ok=True)
    UNFINISHED.touch()
    LOG.write_bytes(b"")
    try:
        if venv_version() is None:
            run_step(progress, "virtual environment", [find_python(), "-m", "venv", str(VENV)])
        for title, command in install_steps():
            run_step(progress, title, command)
    except SetupError:
        UNFINISHED.unlink()  # pip has undone its step: the next run can go on from here
        raise
    STAMP.write_text(fingerprint(venv_version()))
    UNFINISHED.unlink()
    progress.close(f"environment ready in {progress.seconds():.0f} s")


def install_steps() -> Steps:
    pip = [str(PYTHON), "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    torch_index = os.environ.get("SPECBACKEND_TORCH_INDEX")
    return [
        ("PyTorch", [*pip, "-r", requirements("torch"), *(["--index-url", torch_index] if torch_index else [])]),
        ("packages", [*pip, "-r", requirements("packages")]),
        ("tritonserver", [*pip, "--no-deps", "-r", requirements("tritonserver")]),
        ("specbackend", [*pip, "--no-deps", "--no-build-isolation", "-e", str(ROOT)]),
        ("check of tritonserver", [str(PYTHON), "-m", "specbackend.serving.tritonserver"]),
    ]


def torch_hint() -> str | None:
    """Where there is no GPU, most of what PyTorch's ordinary package brings is of no use."""
    if os.environ.get("SPECBACKEND_TORCH_INDEX") or Path("/dev/nvidiactl").exists():
        return None
    return (
        "no NVIDIA GPU found: if your package index gives PyTorch with CUDA (3 GB), set SPECBACKEND_TORCH_INDEX "
        "to PyTorch's index of CPU packages"
    )


def requirements(name: str) -> str:
    return str(REQUIREMENTS / f"{name}.txt")


def check_platform() -> None:
    """The embedded tritonserver is a Linux x86-64 program."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise SetupError(f"needs Linux on x86-64, this is {platform.system()} on {platform.machine()}")
    libc, version = platform.libc_ver()
    if libc != "glibc" or tuple(map(int, version.split(".")[:2])) < GLIBC:
        raise SetupError(
            f"needs glibc {GLIBC[0]}.{GLIBC[1]} or newer (Ubuntu 22.04, Debian 12), found {libc or 'none'} {version}"
        )


def find_python() -> str:
    """A Python of a supported version that can make environments: the running one if it will do, else from PATH."""
    names = [sys.executable, *(f"python{version}" for version in VERSIONS)]
    found = [path for path in map(shutil.which, names) if path and python_version(path) in VERSIONS]
    for path in found:
        if python_version(path, "venv, ensurepip"):
            return path
    if found:
        version = python_version(found[0])
        raise SetupError(
            f"{found[0]} cannot make virtual environments (Debian and Ubuntu: apt install python{version}-venv)"
        )
    raise SetupError(
        f"needs Python {', '.join(sorted(VERSIONS))} on PATH; {sys.executable} is {platform.python_version()}"
    )


def run_step(progress: Progress, title: str, command: list[str]) -> None:
    """Run one command with its output in the log and its latest line on the screen."""
    progress.begin(title)
    with open(LOG, "ab") as log:
        log.write(f"\n$ {' '.join(command)}\n".encode())
        start = log.tell()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while chunk := read_chunk(process.stdout.fileno(), progress):
            log.write(chunk)
            log.flush()
            progress.show(chunk.decode(errors="replace").strip().rpartition("\n")[2])
    if process.wait():
        with open(LOG, "rb") as log:
            log.seek(start)
            tail = log.read().decode(errors="replace").strip().splitlines()[-LOG_TAIL:]
        progress.close()
        raise SetupError("\n".join([f"{title} (whole log: {LOG})", *(line[:500] for line in tail)]))


def read_chunk(descriptor: int, progress: Progress) -> bytes:
    """Wait for output while the clock on the screen goes on; empty at the end of the output."""
    while not select.select([descriptor], [], [], 0.5)[0]:
        progress.refresh()
    return os.read(descriptor, 1 << 16)


class Progress:
    """One live line on a terminal; elsewhere a line per step."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.is_live = sys.stderr.isatty()
        self.title = self.detail = ""

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def begin(self, title: str) -> None:
        self.title, self.detail = title, ""
        if self.is_live:
            self.refresh()
        else:
            print(f"[{self.seconds():3.0f} s] set-up: {title}", file=sys.stderr, flush=True)

    def show(self, detail: str) -> None:
        self.detail = detail.strip()
        self.refresh()

    def refresh(self) -> None:
        if self.is_live:
            line = f"[{self.seconds():3.0f} s] set-up: {self.title}  {self.detail}"
            print("\r\033[K" + line[: shutil.get_terminal_size().columns - 1], end="", file=sys.stderr, flush=True)

    def close(self, message: str = "") -> None:
        if self.is_live:
            print("\r\033[K", end="", file=sys.stderr)
        if message:
            print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    enter(__file__)
