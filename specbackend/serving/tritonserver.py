"""Finds a tritonserver and runs it: the container's, or the one embedded in the `nvidia-pytriton` wheel.

`python -m specbackend.serving.tritonserver` says which one would be used and checks that it can start.
"""

import contextlib
import ctypes
import errno
import fcntl
import http.client
import importlib.util
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CONTAINER_BINARY = Path("/opt/tritonserver/bin/tritonserver")
SHM = Path("/dev/shm")
SHM_PREFIX = "specbackend_"
SHM_NEEDED_MB = 32  # 1 MB per model instance and queue, and room to grow
SERVER_ID = "SPECBACKEND_SERVER_ID"  # in the environment of a server and of all its children
STUB = "triton_python_backend_stub"
PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
LIBPYTHON = f"libpython{PYTHON_VERSION}.so.1.0"
LOAD_FAILURE = re.compile(r"failed to load '(?P<model>[^']+)' version \d+: (?P<reason>.*)")
LOADER_FAILED = 127  # exit code of a program whose shared libraries are not all there
PR_SET_PDEATHSIG = 1
STACK_BYTES = 256 << 20  # reserved, not used: four times the largest body
LOG_TAIL = 12  # lines shown when the server fails
KILL_TIMEOUT_S = 5  # how long a killed process may take to be gone


class TritonServerError(RuntimeError):
    """No tritonserver that can run here, or one that did not start. The message says what to do."""


@dataclass(frozen=True)
class Installation:
    """A tritonserver and what it takes to run it."""

    binary: Path
    backends: Path | None = None  # None: the server's own default
    libraries: tuple[Path, ...] = ()  # where its shared libraries lie, unless the loader knows
    python_folder: Path = Path(sys.prefix) / "bin"  # of the `python3` whose packages the models have: ours

    def environment(self) -> dict[str, str]:
        """This process's environment with what the server needs added."""
        env = dict(os.environ)
        # Triton's Python backend has the packages of the first `python3` on PATH.
        _prepend(env, "PATH", self.python_folder)
        _prepend(env, "LD_LIBRARY_PATH", *self.libraries)
        return env

    @property
    def stub(self) -> Path | None:
        """The program that runs Python models, if it lies where it is expected."""
        path = self.backends / "python" / STUB if self.backends else None
        return path if path and path.exists() else None


def _prepend(env: dict[str, str], name: str, *folders: Path) -> None:
    value = os.pathsep.join([*map(str, folders), *filter(None, [env.get(name)])])
    if value:
        env[name] = value


def find_tritonserver() -> Installation:
    """Look at $TRITONSERVER, PATH, the container's place and the embedded wheel, in this order."""
    if named := os.environ.get("TRITONSERVER"):
        if not os.access(named, os.X_OK) or Path(named).is_dir():
            raise TritonServerError(f"TRITONSERVER={named}: is not a program")
        return _installed(Path(named))
    if on_path := shutil.which("tritonserver"):
        return _installed(Path(on_path))
    if os.access(CONTAINER_BINARY, os.X_OK):
        return _installed(CONTAINER_BINARY)
    if spec := importlib.util.find_spec("pytriton"):
        return _embedded(Path(spec.origin).parent)
    raise TritonServerError(
        "no tritonserver: set TRITONSERVER, put it on PATH, or `pip install --no-deps nvidia-pytriton==0.7.0`"
    )


def _installed(binary: Path) -> Installation:
    backends = binary.resolve().parent.parent / "backends"
    return Installation(binary, backends if backends.is_dir() else None)


def _embedded(package: Path) -> Installation:
    """Arrange the wheel's parts as a tritonserver expects them, with the stub of this Python, by links in the venv."""
    server, home = package / "tritonserver", Path(sys.prefix) / "tritonserver"
    stub = server / "python_backend_stubs" / PYTHON_VERSION / STUB
    if not stub.exists():
        raise TritonServerError(f"the embedded tritonserver has no Python backend for Python {PYTHON_VERSION}")
    backend = home / "backends" / "python"
    for part in (*(server / "backends" / "python").glob("*.*"), stub):
        _link(backend / part.name, part)
    if libpython := _find_libpython():
        _link(home / "lib" / LIBPYTHON, libpython)
    libraries = (home / "lib", package.parent / "nvidia_pytriton.libs")
    return Installation(server / "bin" / "tritonserver", home / "backends", libraries)


def _find_libpython() -> Path | None:
    """The shared library of exactly this Python; None if only the loader's default places may have it."""
    for folder in (sysconfig.get_config_var("LIBDIR"), Path(sys.base_prefix) / "lib"):
        if folder and (found := Path(folder) / LIBPYTHON).exists():
            return found
    return None


def _link(link: Path, target: Path) -> None:
    if link.is_symlink() and link.readlink() == target:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    fresh = link.with_name(f"{link.name}.{os.getpid()}")
    fresh.symlink_to(target)
    fresh.replace(link)  # atomic: another process may be starting a server


def check_runnable(installation: Installation) -> None:
    """Raise TritonServerError if a shared library is missing or the shared memory is too small."""
    for program in filter(None, (installation.binary, installation.stub)):
        # Both only complain about their arguments, if the loader lets them.
        result = subprocess.run([program, "--help"], env=installation.environment(), capture_output=True, text=True)
        if result.returncode == LOADER_FAILED:
            raise TritonServerError(_missing_library(program, result.stderr.strip()))
    check_shared_memory()


def _missing_library(program: Path, error: str) -> str:
    if LIBPYTHON not in error:
        return f"{program} cannot start: {error}"
    return (
        f"{LIBPYTHON} is missing, which tritonserver's Python backend needs: the Python in {sys.base_prefix} comes "
        f"without it. Debian and Ubuntu: apt install libpython{PYTHON_VERSION}. Else use a Python built with "
        f"--enable-shared"
    )


def check_shared_memory() -> None:
    """Raise TritonServerError if /dev/shm has no room for the Python backend's regions."""
    try:
        free_mb = shutil.disk_usage(SHM).free >> 20
    except OSError as error:
        raise TritonServerError(f"{SHM} is needed by tritonserver's Python backend: {error}") from error
    if free_mb < SHM_NEEDED_MB:
        raise TritonServerError(
            f"{SHM} has {free_mb} MB free, tritonserver's Python backend needs {SHM_NEEDED_MB} MB; "
            f"in a container, start it with --shm-size=1g"
        )


def server_command(
    installation: Installation,
    model_repository: Path,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    args: Sequence[str] = (),
) -> list[str]:
    """The command line. `args` come last, so that they win."""
    return [
        str(installation.binary),
        f"--model-repository={model_repository}",
        *([f"--backend-directory={installation.backends}"] if installation.backends else []),
        f"--http-port={http_port}",
        f"--grpc-port={grpc_port}",
        f"--metrics-port={metrics_port}",
        "--disable-auto-complete-config",  # the configs are complete; asking each model costs seconds
        # The engine process owns the device: the server itself needs neither its memory nor its counters.
        "--allow-gpu-metrics=false",
        "--pinned-memory-pool-byte-size=0",
        *args,
    ]


class TritonServer:
    """A tritonserver as a context manager: ready inside the `with`, and no process or shared memory of it after.

    Ports given as 0 are chosen. Start it in a thread that outlives it: the server ends when that thread does, so that
    a killed test run leaves none behind.
    """

    def __init__(
        self,
        model_repository: Path | str,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        args: Sequence[str] = (),
        log_path: Path | str | None = None,
        ready_timeout_s: float = 120.0,
        exit_timeout_s: int = 10,
        address: str = "127.0.0.1",
        installation: Installation | None = None,
    ):
        self.model_repository = Path(model_repository).resolve()
        self.address = address
        self.ports = (http_port, grpc_port, metrics_port)
        self.args = tuple(args)
        self.ready_timeout_s = ready_timeout_s
        self.exit_timeout_s = exit_timeout_s
        self.installation = installation
        self.server_id = SHM_PREFIX + uuid.uuid4().hex[:12]
        self.log_path = Path(log_path or Path(tempfile.gettempdir()) / f"{self.server_id}.log")
        self.process: subprocess.Popen | None = None

    @property
    def http_url(self) -> str:
        return f"{self.address}:{self.ports[0]}"

    @property
    def grpc_url(self) -> str:
        return f"{self.address}:{self.ports[1]}"

    @property
    def metrics_url(self) -> str:
        return f"{self.address}:{self.ports[2]}"

    def __enter__(self) -> "TritonServer":
        self.start()
        try:
            self.wait_ready(self.ready_timeout_s)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process; returns before it is ready."""
        if not self.model_repository.is_dir():
            raise TritonServerError(f"{self.model_repository}: no such model repository")
        installation = self.installation or find_tritonserver()
        check_shared_memory()
        remove_stale_shared_memory()
        self.ports = choose_ports(self.address, self.ports)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        own_args = (
            f"--http-address={self.address}",
            f"--grpc-address={self.address}",
            f"--exit-timeout-secs={self.exit_timeout_s}",
            f"--backend-config=python,shm-region-prefix-name={self.server_id}",
        )
        command = server_command(installation, self.model_repository, *self.ports, (*own_args, *self.args))
        with open(self.log_path, "wb") as log, held_shm_lock(self.server_id) as lock:
            self.process = subprocess.Popen(
                command,
                env={**installation.environment(), SERVER_ID: self.server_id},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock],
                start_new_session=True,  # a Ctrl-C at the terminal is ours to handle
                preexec_fn=_prepare_child,
            )

    def wait_ready(self, timeout_s: float) -> None:
        """Return when all models are ready; raise with the log's tail when one fails, or the server ends."""
        deadline = time.monotonic() + timeout_s
        while not self.is_ready():
            code = self.process.poll()  # before the log is read: of a server that has ended, all of it
            if failed := LOAD_FAILURE.search(self.log()):
                reason = readable(failed["reason"])
                raise TritonServerError(self._failure(f"model {failed['model']} failed to load: {reason}"))
            if code is not None:
                raise TritonServerError(self._failure(f"tritonserver ended with code {code}"))
            if time.monotonic() > deadline:
                raise TritonServerError(self._failure(f"tritonserver was not ready within {timeout_s:.0f} s"))
            time.sleep(0.05)

    def is_ready(self) -> bool:
        """Whether the server answers and all its models are loaded."""
        connection = http.client.HTTPConnection(self.address, self.ports[0], timeout=2)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def log(self) -> str:
        """What the server and its models have printed so far."""
        return self.log_path.read_text(errors="replace")

    def stop(self) -> None:
        """End the server, then whatever it left: stubs, engines, shared memory. Does nothing the second time."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(self.exit_timeout_s + 5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None
        end_processes_of(self.server_id)
        remove_stale_shared_memory()

    def _failure(self, what: str) -> str:
        lines = [line for line in readable(self.log()).splitlines() if line[0] not in "+|"]  # no tables
        return "\n".join([what, f"--- end of {self.log_path}", *lines[-LOG_TAIL:]])


def readable(logged: str) -> str:
    """Exceptions as the server logs them, on one line and with every import's frames, as text for people."""
    lines = logged.rstrip('"').replace("\\n", "\n").replace("\\'", "'").splitlines()
    return "\n".join(line for line in lines if line and "<frozen importlib" not in line)


def _prepare_child() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    raise_stack_limit()


def raise_stack_limit() -> None:
    """For the process that becomes tritonserver: this limit is what its threads get as stack.

    tritonserver copies a form-encoded body (what curl -d sends unless told otherwise) to the stack twice: 5 MB of it
    end the whole server where stacks have the usual 8 MB.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    soft = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


def choose_ports(address: str, wanted: Sequence[int]) -> tuple[int, ...]:
    """Replace zeros by free ports; raise TritonServerError if a wanted one is taken."""
    with contextlib.ExitStack() as stack:  # all are held until all are chosen, so that they differ
        chosen = []
        for port in wanted:
            listener = stack.enter_context(socket.socket())
            # A server that has just ended is no obstacle, one that listens is.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((address, port))
            except OSError as error:
                owner = port_owner(port) if error.errno == errno.EADDRINUSE else error.strerror
                raise TritonServerError(f"port {port} is taken by {owner}: stop it or choose another port") from error
            chosen.append(listener.getsockname()[1])
    return tuple(chosen)


def port_owner(port: int) -> str:
    """Name the process that listens on `port`, as far as this user may see it."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for row in Path(table).read_text().splitlines()[1:] if Path(table).exists() else ():
            fields = row.split()
            if fields[1].endswith(f":{port:04X}") and fields[3] == "0A":  # listening
                sockets.add(f"socket:[{fields[9]}]")
    for process in _processes():
        with contextlib.suppress(OSError):
            if any(os.readlink(descriptor) in sockets for descriptor in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
    return "another process"


def end_processes_of(server_id: str, grace_s: float = 3.0) -> None:
    """Wait for the children that an ended server left behind, then kill them."""
    deadline = time.monotonic() + grace_s  # an idle stub notices within 1.5 s that its server is gone
    while (left := processes_of(server_id)) and time.monotonic() < deadline + KILL_TIMEOUT_S:
        if time.monotonic() > deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def processes_of(server_id: str) -> list[int]:
    """Processes that carry this server's id in their environment."""
    mark, found = f"{SERVER_ID}={server_id}".encode(), []
    for process in _processes():
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def _processes() -> Iterator[Path]:
    return (path for path in Path("/proc").iterdir() if path.name.isdigit())


@contextlib.contextmanager
def held_shm_lock(server_id: str) -> Iterator[int]:
    """A locked file beside the server's shared memory. Who inherits the descriptor keeps the lock while it lives."""
    with open(SHM / f"{server_id}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def remove_stale_shared_memory() -> None:
    """Delete the regions of our servers that have ended: crashed ones leave them behind."""
    for path in SHM.glob(f"{SHM_PREFIX}*.lock"):
        with contextlib.suppress(OSError), open(path) as lock:  # OSError: the server lives, or is another user's
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for region in SHM.glob(f"{path.stem}*"):
                region.unlink()


def main() -> int:
    """Say which tritonserver would be used, and whether it can run."""
    try:
        installation = find_tritonserver()
        check_runnable(installation)
    except TritonServerError as error:
        print(error, file=sys.stderr)
        return 1
    print(installation.binary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
