"""Two models of one tritonserver with equal engine parameters: one engine behind both, whoever ends."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from tritonclient.grpc import InferenceServerClient

from specbackend.serving.client import Answer, generate_http, stream_grpc
from specbackend.serving.tritonserver import TritonServer, processes_of
from tests.e2e.conftest import engine_pid, make_repository
from tests.radix.sidecars import wait_until

MODELS = ("llm", "llm_too")
LONG = {"text_input": "How many", "max_tokens": 900, "end_id": -1, "stream": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared_engine")
    models = make_repository(folder / "models")
    shutil.copytree(models / "llm", models / "llm_too")
    args = ["--model-control-mode=explicit", "--load-model=*"]
    with TritonServer(models, log_path=folder / "server.log", args=args) as running:
        yield running


def on_both(server: TritonServer, inputs: dict, count: int, meanwhile: Callable[[], None]) -> list[Answer]:
    """So many requests to each at once."""
    with ThreadPoolExecutor(2 * count) as pool:
        answers = [pool.submit(stream_grpc, server.grpc_url, model, inputs) for model in MODELS * count]
        meanwhile()
        return [answer.result(60) for answer in answers]


def stub_of(server: TritonServer, model: str) -> int:
    folder = str(server.model_repository / model / "1").encode()
    [pid] = [pid for pid in processes_of(server.server_id) if folder in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return pid


def check_both_serve(server: TritonServer) -> None:
    inputs = {"text_input": "How many eggs", "max_tokens": 20}
    statuses, bodies = zip(*(generate_http(server.http_url, model, inputs) for model in MODELS), strict=True)
    assert statuses == (200, 200)
    assert bodies[0]["text_output"] == bodies[1]["text_output"] != ""


def test_both_have_one_engine_and_the_same_answers(server):
    engine = engine_pid(server)  # fails if there are two
    answers = on_both(server, {**LONG, "max_tokens": 60}, 6, lambda: None)
    assert [answer.error for answer in answers] == [None] * 12
    assert len({answer.text for answer in answers}) == 1
    status, body = generate_http(server.http_url, "radix_cache", {"action": "tree"})
    [facts] = json.loads(body["result"])["engines"]
    assert (status, facts["pid"], facts["adapters"], facts["locked_tokens"]) == (200, engine, 2, 0)
    assert sum(node["num_tokens"] for node in facts["nodes"]) == facts["num_tokens"] >= 60
    status, body = generate_http(server.http_url, "radix_cache", {"action": "flush"})
    assert json.loads(body["result"])["engines"] == [{"pid": engine, "freed_tokens": facts["num_tokens"]}]


def test_a_killed_engine_fails_requests_of_both_and_one_takes_its_place(server):
    before = engine_pid(server)

    def kill() -> None:
        time.sleep(0.7)
        os.kill(before, signal.SIGKILL)

    answers = on_both(server, LONG, 2, kill)
    assert all("the engine is lost and will be found or started anew" in answer.error for answer in answers)
    check_both_serve(server)
    assert engine_pid(server) != before


def test_a_reload_with_equal_parameters_keeps_the_engine(server):
    engine = engine_pid(server)
    path = server.model_repository / "llm_too" / "1" / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "REPORT_CUSTOM_METRICS": False}))

    def reload() -> None:
        with closing(InferenceServerClient(server.grpc_url)) as client:
            client.load_model("llm_too")

    stub = stub_of(server, "llm_too")
    answers = on_both(server, {**LONG, "max_tokens": 200}, 2, reload)
    assert [answer.error for answer in answers] == [None] * 4
    wait_until(lambda: stub not in processes_of(server.server_id))
    check_both_serve(server)
    assert engine_pid(server) == engine


def test_the_end_of_a_stub_is_its_own_and_that_of_the_server_is_all_ones(server):
    engine = engine_pid(server)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stream_grpc, server.grpc_url, "llm_too", {**LONG, "max_tokens": 200})
        os.kill(stub_of(server, "llm"), signal.SIGKILL)  # which Triton does not start again
        assert answer.result(60).error is None
    time.sleep(1)
    assert generate_http(server.http_url, "llm_too", {"text_input": "How many", "max_tokens": 3})[0] == 200
    assert engine_pid(server) == engine
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not processes_of(server.server_id), 2)
