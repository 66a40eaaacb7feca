"""The example for many hosts, run: what starts alike goes to one server, and a server's end moves only its own."""

import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.radix.sidecars import PATIENT_S, wait_until

CONFIG = Path(__file__).parents[2] / "tools" / "nginx.conf"
MISSING = "THE ROUTING EXAMPLE IS NOT TESTED: no nginx on PATH (apt install nginx)"
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
PROMPTS = [f"You are assistant number {i}. " for i in range(40)]

if NGINX is None:
    warnings.warn(MISSING, stacklevel=1)
pytestmark = pytest.mark.skipif(NGINX is None, reason=MISSING)


class Named(BaseHTTPRequestHandler):
    """Answers with its server's port."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def do_GET(self):
        name = str(self.server.server_port).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(name)))
        self.end_headers()
        self.wfile.write(name)

    def log_message(self, *_):
        pass


def start_server(port: int = 0) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", port), Named)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


def stop_server(server: ThreadingHTTPServer) -> None:
    server.shutdown()
    server.server_close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture
def servers() -> Iterator[list[ThreadingHTTPServer]]:
    started = [start_server() for _ in range(2)]
    yield started
    for server in started:
        stop_server(server)


@pytest.fixture
def port(servers, tmp_path) -> Iterator[int]:
    """Of an nginx before the servers."""
    port = free_port()
    text = CONFIG.read_text().replace(":8080", f":{port}").replace("fail_timeout=5s", "fail_timeout=1s")
    for server, shipped in zip(servers, (8000, 8010), strict=True):
        assert f"127.0.0.1:{shipped} " in text
        text = text.replace(f"127.0.0.1:{shipped} ", f"127.0.0.1:{server.server_port} ")
    (tmp_path / "nginx.conf").write_text(text)
    files = f"daemon off; pid {tmp_path}/pid; error_log stderr;"
    process = subprocess.Popen([NGINX, "-p", tmp_path, "-c", tmp_path / "nginx.conf", "-g", files])

    def listens() -> bool:
        assert process.poll() is None, "nginx does not like the configuration"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(listens)
    yield port
    process.terminate()
    process.wait(PATIENT_S)


def ask(port: int, prompt: str, headers: dict | None = None, **others) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENT_S)
    connection.request("POST", "/v2/models/llm/generate", json.dumps({**others, "text_input": prompt}), headers or {})
    response = connection.getresponse()
    assert response.status == 200
    name = response.read().decode()
    connection.close()
    return name


def places(port: int) -> dict[str, str]:
    return {prompt: ask(port, prompt.ljust(256) + "and so on") for prompt in PROMPTS}


def test_equal_starts_go_to_one_server_and_different_ones_to_both(port):
    first = places(port)
    assert len(set(first.values())) == 2
    for prompt, name in first.items():
        assert ask(port, prompt.ljust(256) + "and otherwise", max_tokens=5, stream=True) == name


def test_a_key_of_the_clients_own_counts_more(port):
    assert len({ask(port, prompt, {"X-Prefix-Key": "conversation 7"}) for prompt in PROMPTS}) == 1
    assert len({ask(port, PROMPTS[0], {"X-Prefix-Key": str(number)}) for number in range(40)}) == 2


def test_long_prompts_are_routed_too(port):
    for prompt in PROMPTS[:8]:
        assert ask(port, prompt.ljust(256) + "x" * 3_000_000) == ask(port, prompt.ljust(256) + "y")


def test_the_end_of_one_server_moves_only_what_was_its(port, servers):
    before = places(port)
    gone, stays = (str(server.server_port) for server in servers)
    stop_server(servers[0])
    assert set(places(port).values()) == {stays}
    servers[0] = start_server(int(gone))
    wait_until(lambda: places(port) == before)
