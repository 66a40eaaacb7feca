"""tools/serve with --openai-port: tritonserver and the gateway end together. tritonserver is a fake that is ready."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from specbackend.serving.tritonserver import choose_ports
from tests.conftest import DEMO_TARGET, ROOT
from tests.gateway.conftest import wait_until
from tests.test_tools import load_tool

FAKE = """#!{python}
import http.server, os, sys, pathlib, subprocess
pathlib.Path({pids!r}).write_text(f"{{os.getpid()}} {{subprocess.Popen(['sleep', '1000']).pid}}")
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = next(int(each.partition("=")[2]) for each in sys.argv if each.startswith("--http-port="))
http.server.HTTPServer(("127.0.0.1", port), Ready).serve_forever()
"""
# As tools/serve, in the environment that the tests have.
RUN = "import runpy, setup_env; setup_env.enter = lambda script: None; runpy.run_path({script!r}, run_name='__main__')"


@pytest.fixture
def started(tmp_path):
    """The process, its gateway's address, and the pids of a tritonserver and its child."""
    fake, pids = tmp_path / "tritonserver", tmp_path / "pids"
    fake.write_text(FAKE.format(python=sys.executable, pids=str(pids)))
    fake.chmod(0o755)
    http, grpc, metrics, port = choose_ports("127.0.0.1", (0, 0, 0, 0))
    flags = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}", f"--openai-port={port}"]
    command = [sys.executable, "-c", RUN.format(script=str(ROOT / "tools" / "serve")), *flags]
    env = {**os.environ, "TRITONSERVER": str(fake), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tools'}"}
    process = subprocess.Popen([*command, "--model-path", str(DEMO_TARGET), "--api-key=key"], env=env, cwd=tmp_path)
    try:
        url = f"http://127.0.0.1:{port}"
        assert wait_until(lambda: process.poll() is None and answers(url))
        yield process, url, [int(pid) for pid in pids.read_text().split()]
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(ROOT / "build" / f"model_repository_{http}", ignore_errors=True)
        (ROOT / "build" / f"tritonserver_{http}.log").unlink(missing_ok=True)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 503  # nobody is behind gRPC
    except httpx.TransportError:
        return False


def is_alive(pid: int) -> bool:
    """Zombies are not."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_both(started, sent):
    process, url, pids = started
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer key"}).json()["data"][0]["id"] == "llm"
    assert all(map(is_alive, pids))
    process.send_signal(sent)
    assert process.wait(30) == 0
    assert not any(map(is_alive, pids))


def test_the_gateway_ends_with_its_tritonserver(started):
    process, _, pids = started
    os.kill(pids[0], signal.SIGKILL)
    assert process.wait(30) == 1
    assert not any(map(is_alive, pids))


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Call tools/serve; returns the addresses of the tritonserver and the gateway that it would start."""
    tool = load_tool("serve", monkeypatch)
    monkeypatch.setattr(tool.setup_env, "ROOT", tmp_path)
    started = []
    monkeypatch.setattr(
        "specbackend.gateway.server.serve_beside",
        lambda triton, settings: started.append((triton.address, settings.host)) or 0,
    )

    monkeypatch.setattr("os.execve", lambda *command: pytest.fail("became tritonserver"))

    def call(*flags: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["serve", "--model-path", str(DEMO_TARGET), *flags])
        assert tool.main() == 0
        return started.pop()

    return call


def test_with_a_key_no_other_port_is_open_to_the_network(serve):
    assert serve("--openai-port=9000", "--api-key=key") == ("127.0.0.1", "0.0.0.0")
    assert serve("--openai-port=9000") == ("0.0.0.0", "0.0.0.0")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--api-key=key"], "--api-key needs --openai-port"),
        (["--max-open-requests=3"], "--max-open-requests needs --openai-port"),
        (["--openai-port=9000", "--api-key="], "api_key: must not be empty"),
        (["--openai-port=9000", "--max-open-requests=0"], "max_open_requests: must be at least 1"),
    ],
)
def test_flags_that_would_protect_nothing(serve, capsys, flags, message):
    with pytest.raises(SystemExit):
        serve(*flags)
    assert message in capsys.readouterr().err
