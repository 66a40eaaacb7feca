"""The radix_cache model in the real tritonserver: it answers, keeps its sidecar, and stands in nobody's way."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferInput

from specbackend.radix.client import RadixClient
from specbackend.radix.keys import Layout
from specbackend.radix.process import own_socket
from specbackend.serving.client import generate_http, read_metrics
from specbackend.serving.tritonserver import TritonServer, processes_of
from specbackend.tokenizer import Tokenizer
from tests.conftest import DEMO_TARGET
from tests.e2e.conftest import engine_pid, make_repository
from tests.radix.sidecars import PATIENT_S, store, wait_until

LAYOUT = Layout(b"f", bytes_per_token=100, block_tokens=4, successor=True, model_path=str(DEMO_TARGET))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("radix_cache")
    prompts = folder / "prompts.jsonl"
    lines = [{"question": "How many eggs?"}, {"prompt": "Tom has 3 apples"}, {"prompt": "far too long " * 10000}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    repository = make_repository(folder / "models", enable_hierarchical_cache=True)
    params = {"size": "64MiB", "warm_up_prompts": str(prompts), "REPORT_CUSTOM_METRICS": True}
    (repository / "radix_cache" / "1" / "model.json").write_text(json.dumps(params))
    with TritonServer(repository, log_path=folder / "server.log") as running:
        yield running


def ask(server: TritonServer, **inputs) -> tuple[int, dict]:
    status, body = generate_http(server.http_url, "radix_cache", inputs)
    return status, json.loads(body["result"]) if status == 200 else body


def sidecar_pid(server: TritonServer) -> int:
    command_lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes_of(server.server_id)}
    [pid] = [pid for pid, line in command_lines.items() if b"specbackend.radix.server" in line]
    return pid


def test_what_engines_store_shows(server):
    client = RadixClient(own_socket(server.process.pid), LAYOUT, PATIENT_S)
    ids = Tokenizer(DEMO_TARGET).encode("Tom has 3 apples and buys 4 more.")
    assert store(client, LAYOUT.token_keys(ids)) == (len(ids) - 1) // 4
    client.close()
    status, stats = ask(server, action="stats")
    assert (status, stats["published_blocks"], stats["arena_bytes"]) == (200, (len(ids) - 1) // 4, 64 << 20)
    _, found = ask(server, action="lookup", text_input="Tom has 3 apples and buys 4 more.")
    assert found["models"] == [
        {"model_path": str(DEMO_TARGET), "prompt_tokens": len(ids), "cached_tokens": (len(ids) - 1) // 4 * 4}
    ]
    assert ask(server, action="audit") == (200, {"leaks": []})
    name = 'specbackend:radix_published_blocks{model="radix_cache"'
    wait_until(lambda: any(value for key, value in read_metrics(server.metrics_url).items() if key.startswith(name)))
    status, flushed = ask(server, action="flush")
    assert (status, [engine["pid"] for engine in flushed["engines"]]) == (200, [engine_pid(server)])
    assert ask(server, action="stats")[1]["published_blocks"] == 0


def test_ids_by_infer(server):
    client = InferenceServerClient(server.http_url)
    inputs = [InferInput("action", [1, 1], "BYTES"), InferInput("input_ids", [1, 9], "INT32")]
    inputs[0].set_data_from_numpy(np.array([[b"lookup"]], np.object_))
    inputs[1].set_data_from_numpy(np.arange(9, dtype=np.int32)[None])
    assert "models" in json.loads(client.infer("radix_cache", inputs).as_numpy("result").item())


def test_errors_have_their_status(server):
    status, body = ask(server, action="burn")
    assert status == 400 and "action: must be one of stats" in body["error"]


def test_warm_up_asks_llm(server):
    """The third prompt is too long, which llm says."""
    status, result = ask(server, action="warm_up")
    assert (status, result["prompts"], result["failed"]) == (200, 3, 1)
    assert "text_input" in result["first_failure"]


def test_an_engine_finds_what_the_one_before_it_has_stored(server):
    text = "Tom has 3 apples and buys 4 more. How many apples does he have?"
    ask(server, action="flush")
    before = ask_llm(server, text)
    wait_until(lambda: cached_tokens(server, text))
    os.kill(engine_pid(server), signal.SIGKILL)
    wait_until(lambda: server.is_ready() and ask_llm(server, text))
    hits = ask(server, action="stats")[1]["hit_blocks"]
    assert ask_llm(server, text) == before
    assert ask(server, action="stats")[1]["hit_blocks"] > hits


def cached_tokens(server: TritonServer, text: str) -> int:
    """Of the engine's model; others of these tests have the same path."""
    return max(model["cached_tokens"] for model in ask(server, action="lookup", text_input=text)[1]["models"])


def ask_llm(server: TritonServer, text: str) -> str | None:
    """None: there is no engine at the moment."""
    inputs = {"text_input": text, "max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    status, body = generate_http(server.http_url, "llm", inputs)
    return body["text_output"] if status == 200 else None


def test_a_killed_sidecar_is_started_again_and_llm_does_not_care(server):
    before = sidecar_pid(server)
    os.kill(before, signal.SIGKILL)
    status, _ = generate_http(server.http_url, "llm", {"text_input": "Tom has 3 apples", "max_tokens": 8})
    assert status == 200
    wait_until(lambda: "error" not in ask(server, action="stats")[1])
    assert sidecar_pid(server) != before
    assert server.is_ready()


def test_nothing_is_left(tmp_path):
    """However the server ends."""
    for end in (signal.SIGTERM, signal.SIGKILL):
        repository = make_repository(tmp_path / end.name)
        with TritonServer(repository, log_path=tmp_path / "server.log") as server:
            path = own_socket(server.process.pid)
            assert path.exists()
            server.process.send_signal(end)
            server.process.wait(PATIENT_S)
            wait_until(lambda path=path: not path.exists())
            wait_until(lambda server=server: not processes_of(server.server_id))
