"""Finding, starting and ending tritonserver. The tests with a server run the real one on a trivial Python model."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

from specbackend.serving import tritonserver
from specbackend.serving.tritonserver import TritonServer, TritonServerError, find_tritonserver, processes_of

needs_server = pytest.mark.skipif(find_spec("pytriton") is None, reason="needs the tritonserver wheel")

CONFIG = """
backend: "python"
input [{ name: "text_input", data_type: TYPE_STRING, dims: [1] }]
output [{ name: "text_output", data_type: TYPE_STRING, dims: [1] }]
instance_group [{ kind: KIND_MODEL }]
"""

ECHO = """
import subprocess
import sys
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        subprocess.Popen(["sleep", "600"], start_new_session=True)  # an engine that nobody ends
        print("prefix", sys.prefix, flush=True)

    def execute(self, requests):
        texts = (pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy() for request in requests)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("text_output", text)]) for text in texts]
"""

BROKEN = """
class TritonPythonModel:
    def initialize(self, args):
        raise ValueError("model_path: no such checkpoint")
"""


def make_repository(root: Path, code: str) -> Path:
    (root / "echo" / "1").mkdir(parents=True)
    (root / "echo" / "config.pbtxt").write_text(CONFIG)
    (root / "echo" / "1" / "model.py").write_text(textwrap.dedent(code))
    return root


def make_program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\nexit 0\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def shared_memory_of(server_id: str) -> list[Path]:
    return list(tritonserver.SHM.glob(f"{server_id}*"))


def wait_until(condition, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


# --- where it is found -------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A program at each place but the wheel's; PATH holds nothing else."""
    named = make_program(tmp_path / "named" / "my-tritonserver")
    on_path = make_program(tmp_path / "path" / "bin" / "tritonserver")
    container = make_program(tmp_path / "container" / "bin" / "tritonserver")
    (tmp_path / "container" / "backends").mkdir()
    monkeypatch.setenv("TRITONSERVER", str(named))
    monkeypatch.setenv("PATH", str(on_path.parent))
    monkeypatch.setattr(tritonserver, "CONTAINER_BINARY", container)
    return named, on_path, container


def test_order_of_places(places, monkeypatch):
    named, on_path, container = places
    assert find_tritonserver().binary == named
    monkeypatch.delenv("TRITONSERVER")
    assert find_tritonserver().binary == on_path
    monkeypatch.setenv("PATH", "")
    assert find_tritonserver().binary == container
    assert find_tritonserver().backends == container.parent.parent / "backends"


@needs_server
def test_the_wheel_comes_last(places, monkeypatch):
    monkeypatch.delenv("TRITONSERVER")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(tritonserver, "CONTAINER_BINARY", Path("/nonexistent"))
    found = find_tritonserver()
    assert "pytriton" in found.binary.parts
    assert found.stub.exists()
    tritonserver.check_runnable(found)


def test_wrong_variable_is_named(monkeypatch):
    monkeypatch.setenv("TRITONSERVER", "/nonexistent")
    with pytest.raises(TritonServerError, match="TRITONSERVER=/nonexistent"):
        find_tritonserver()


def test_none_found_says_what_to_do(places, monkeypatch):
    monkeypatch.delenv("TRITONSERVER")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(tritonserver, "CONTAINER_BINARY", Path("/nonexistent"))
    monkeypatch.setattr(tritonserver.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TritonServerError, match="pip install"):
        find_tritonserver()


def test_our_python_comes_first_on_the_servers_path(places, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin")
    path = find_tritonserver().environment()["PATH"].split(os.pathsep)
    assert path == [str(Path(sys.prefix) / "bin"), "/usr/bin"]


# --- what is said when it cannot start ---------------------------------------------------------------------------


def test_missing_libpython_is_named(tmp_path):
    library = tritonserver.LIBPYTHON
    binary = make_program(tmp_path / "bin" / "tritonserver")
    binary.write_text(f"#!/bin/sh\necho 'error while loading shared libraries: {library}: cannot open' >&2\nexit 127\n")
    with pytest.raises(TritonServerError, match=rf"{library} is missing.*apt install"):
        tritonserver.check_runnable(tritonserver.Installation(binary))


def test_small_shared_memory(monkeypatch):
    monkeypatch.setattr(tritonserver, "SHM_NEEDED_MB", 1 << 40)
    with pytest.raises(TritonServerError, match="--shm-size"):
        tritonserver.check_shared_memory()


def test_taken_port_names_its_owner():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(TritonServerError, match=rf"port {port} is taken by .*\(pid {os.getpid()}\)"):
            tritonserver.choose_ports("127.0.0.1", [0, port, 0])


def test_free_ports_differ():
    ports = tritonserver.choose_ports("127.0.0.1", [0, 0, 0])
    assert len(set(ports)) == 3
    assert all(ports)


@needs_server
def test_model_that_fails_to_load(tmp_path):
    server = TritonServer(make_repository(tmp_path / "models", BROKEN), log_path=tmp_path / "server.log")
    with pytest.raises(TritonServerError, match=r"model echo failed to load.*no such checkpoint") as caught, server:
        pytest.fail("the server must not become ready")
    assert str(tmp_path / "server.log") in str(caught.value)
    assert processes_of(server.server_id) == []


@needs_server
def test_model_that_fails_to_load_is_named_after_the_end_too(tmp_path):
    """The server ends a moment after it: who looks late learns as much."""
    server = TritonServer(make_repository(tmp_path / "models", BROKEN))
    server.start()
    server.process.wait(60)
    with pytest.raises(TritonServerError, match=r"model echo failed to load.*no such checkpoint"):
        server.wait_ready(timeout_s=10)
    server.stop()


@needs_server
def test_server_that_ends_while_loading(tmp_path):
    server = TritonServer(make_repository(tmp_path / "models", ECHO))
    server.start()
    server.process.kill()
    with pytest.raises(TritonServerError, match="tritonserver ended with code -9"):
        server.wait_ready(timeout_s=10)
    server.stop()
    assert processes_of(server.server_id) == []


# --- a running one -----------------------------------------------------------------------------------------------


@needs_server
def test_serves_and_leaves_nothing_behind(tmp_path):
    with TritonServer(make_repository(tmp_path / "models", ECHO)) as server:
        url = f"http://{server.http_url}/v2/models/echo/generate"
        request = urllib.request.Request(url, json.dumps({"text_input": "héllo"}).encode())
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert json.loads(opener.open(request, timeout=10).read())["text_output"] == "héllo"
        assert f"prefix {sys.prefix}" in server.log()
        assert len(processes_of(server.server_id)) == 3  # server, stub, and what the model started
        assert shared_memory_of(server.server_id)
        with pytest.raises(TritonServerError, match="is taken by tritonserver"):
            TritonServer(server.model_repository, http_port=server.ports[0]).start()
    assert processes_of(server.server_id) == []
    assert shared_memory_of(server.server_id) == []


@needs_server
def test_killed_server_is_cleaned_up(tmp_path):
    with TritonServer(make_repository(tmp_path / "models", ECHO)) as server:
        server.process.kill()
        server.process.wait()
        assert shared_memory_of(server.server_id)
    assert processes_of(server.server_id) == []
    assert shared_memory_of(server.server_id) == []


@needs_server
def test_server_ends_with_a_killed_launcher(tmp_path):
    repository = make_repository(tmp_path / "models", ECHO)
    code = (
        "import time; from specbackend.serving.tritonserver import TritonServer\n"
        f"with TritonServer({str(repository)!r}) as server: print(server.server_id, flush=True); time.sleep(60)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    server_id = launcher.stdout.readline().strip()
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    assert wait_until(lambda: len(processes_of(server_id)) == 1)  # what the model started knows nothing of it
    tritonserver.end_processes_of(server_id, grace_s=0)
    assert wait_until(lambda: processes_of(server_id) == [])
    tritonserver.remove_stale_shared_memory()
    assert shared_memory_of(server_id) == []


def test_shared_memory_of_a_living_server_stays():
    with tritonserver.held_shm_lock("specbackend_test_living"):
        tritonserver.remove_stale_shared_memory()
        assert shared_memory_of("specbackend_test_living")
    tritonserver.remove_stale_shared_memory()
    assert shared_memory_of("specbackend_test_living") == []
