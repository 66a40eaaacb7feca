"""The gateway in front of the session's tritonserver. The tests of a client's view use OpenAI's own package."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec

import pytest

from specbackend.serving.client import read_metrics
from tests.conftest import DEMO_TARGET

MODEL = "demo"
DEADLINE_S = 30.0


@pytest.fixture(scope="session")
def settings(request):
    """For a gateway in front of the session's server."""
    if find_spec("pytriton") is None:
        pytest.skip("needs the tritonserver wheel")
    from specbackend.gateway.settings import GatewaySettings

    server = request.getfixturevalue("server")
    return GatewaySettings(
        str(DEMO_TARGET), grpc_url=server.grpc_url, metrics_url=server.metrics_url, served_model_name=MODEL
    )


@pytest.fixture(scope="session")
def url(settings) -> Iterator[str]:
    with running(settings) as url:
        yield url


@pytest.fixture(scope="session")
def client(url):
    return client_of(url)


def client_of(url: str, **options):
    from openai import OpenAI

    return OpenAI(**{"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, **options})


@contextmanager
def running(settings, **changes) -> Iterator[str]:
    """A gateway in a thread; its address."""
    from specbackend.gateway.server import make_server

    with socket.socket() as listener:
        listener.bind((settings.host, 0))
        server = make_server(replace(settings, port=listener.getsockname()[1], **changes))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            assert wait_until(lambda: server.started)
            yield f"http://{settings.host}:{server.config.port}"
        finally:
            server.should_exit = True
            thread.join(DEADLINE_S)


def wait_until(condition) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def num_running(metrics_url: str) -> int:
    """Requests that hold slots in the engine; 0 until there is anything to say."""
    values = read_metrics(metrics_url)
    return int(next((value for name, value in values.items() if name.startswith("sglang:num_running_reqs")), 0))


def num_aborted(metrics_url: str) -> int:
    """Answers that were cut off, so far."""
    name, reason = "vllm:request_success_total", 'finished_reason="abort"'
    values = read_metrics(metrics_url)
    return sum(int(value) for key, value in values.items() if key.startswith(name) and reason in key)
