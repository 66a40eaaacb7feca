"""The radix_cache model: a window onto a real sidecar, whoever started it, and an answer where there is none."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from specbackend.errors import ConfigError
from specbackend.radix.client import RadixClient
from specbackend.radix.keys import Layout
from specbackend.serving import engine_socket, radix_cache, radix_metrics
from specbackend.serving.radix_cache import RadixCache
from specbackend.tokenizer import Tokenizer
from tests.fakes import FakeError, FakePbUtils, FakeRequest
from tests.radix.sidecars import PATIENT_S, running, store, wait_until
from tests.serving.conftest import SLOW_ENGINE


class FakeInferenceRequest:
    """Answers what `answer` says of the prompt."""

    asked: list

    def __init__(self, model_name, requested_output_names, inputs):
        self._text = {tensor.name(): tensor.as_numpy() for tensor in inputs}["text_input"].item().decode()
        FakeInferenceRequest.asked.append((model_name, self._text))

    def exec(self, decoupled: bool) -> Iterator:
        assert decoupled
        failed = self._text == "bad"
        yield SimpleNamespace(has_error=lambda: failed, error=lambda: SimpleNamespace(message=lambda: "no slots"))
        yield SimpleNamespace(has_error=lambda: False)


class PbUtils(FakePbUtils):
    InferenceRequest = FakeInferenceRequest


@pytest.fixture
def start(tmp_path, monkeypatch) -> Iterator[Callable[..., RadixCache]]:
    monkeypatch.setattr(radix_cache, "own_socket", lambda pid: tmp_path / "private" / f"radix-{pid}.sock")
    started = []

    def make(**params) -> RadixCache:
        config = {"parameters": {name: {"string_value": str(value)} for name, value in params.items()}}
        place = {"model_repository": str(tmp_path / "models" / "radix_cache"), "model_version": "1"}
        started.append(RadixCache(PbUtils, {"model_config": json.dumps(config), "model_name": "radix_cache", **place}))
        return started[-1]

    yield make
    for model in started:
        model.finalize()


def ask(model: RadixCache, **inputs):
    """The parsed result, or the error."""
    arrays = {
        name: np.array([value], np.int32) if isinstance(value, list) else np.array([[value.encode()]], np.object_)
        for name, value in inputs.items()
    }
    [response] = model.execute([FakeRequest(**arrays)])
    return response.error or json.loads(response.outputs["result"].item())


def layout_of(checkpoint) -> Layout:
    return Layout(b"f", bytes_per_token=100, block_tokens=4, successor=False, model_path=str(checkpoint))


def test_it_starts_a_sidecar_of_its_own(start, tmp_path, checkpoint):
    model = start(size="4MiB")
    [path] = (tmp_path / "private").iterdir()
    assert path.name == f"radix-{os.getppid()}.sock"
    layout, ids = layout_of(checkpoint), Tokenizer(checkpoint).encode("a prompt of some length")
    client = RadixClient(path, layout, PATIENT_S)
    assert store(client, layout.token_keys(ids[:12])) == 3
    client.close()

    stats = ask(model)
    assert (stats["published_blocks"], stats["arena_bytes"]) == (3, 4 << 20)
    assert stats["layouts"] == [
        {"model_path": str(checkpoint), "fingerprint": "66", "bytes_per_token": 100, "block_tokens": 4}
    ]
    expected = {"models": [{"model_path": str(checkpoint), "prompt_tokens": len(ids), "cached_tokens": 12}]}
    assert ask(model, action="lookup", text_input="a prompt of some length") == expected
    assert ask(model, action="lookup", input_ids=ids) == expected
    salted = ask(model, action="lookup", input_ids=ids, cache_salt="salt")
    assert salted["models"][0]["cached_tokens"] == 0
    assert ask(model, action="audit") == {"leaks": []}
    assert ask(model, action="flush") == {"engines": []}
    assert ask(model, action="lookup", input_ids=ids)["models"][0]["cached_tokens"] == 0
    model.finalize()
    assert list((tmp_path / "private").iterdir()) == []


def test_a_killed_sidecar_is_an_answer_and_comes_back(start):
    model = start(size="4MiB")
    model._sidecar.send_signal(signal.SIGSTOP)
    model._sidecar.send_signal(signal.SIGKILL)
    error = ask(model)
    assert not isinstance(error, FakeError) or error.code == FakeError.UNAVAILABLE
    wait_until(lambda: not isinstance(ask(model), FakeError))


def test_engines_are_asked_and_flushed_with_and_without_a_sidecar(start, start_adapter, checkpoint, tmp_path):
    model = start(socket="radix.sock")
    assert ask(model, action="tree") == {"engines": []}
    adapters = start_adapter(), start_adapter(), start_adapter(random_seed=1)
    pids = {adapter._responder._supervisor.pid for adapter in adapters}
    engines = ask(model, action="tree")["engines"]
    assert {engine["pid"] for engine in engines} == pids and len(engines) == 2
    assert sorted(engine["adapters"] for engine in engines) == [1, 2]
    assert [node["num_tokens"] for node in engines[0]["nodes"]] == [2, 5]
    assert ask(model, action="engines")["engines"] == [{**engine, "nodes": []} for engine in engines]
    for action, facts in (("stats", {"num_tokens": 7, "nodes": []}), ("flush", {"freed_tokens": 5})):
        answer = ask(model, action=action)
        assert "does not answer" in answer["error"]
        assert [facts.items() <= engine.items() for engine in answer["engines"]] == [True, True]
    with running(tmp_path / "radix.sock"):
        assert ask(model)["arena_bytes"] == 32 << 16 and len(ask(model)["engines"]) == 2
        assert len(ask(model, action="flush")["engines"]) == 2


def test_an_engine_that_does_not_answer_is_named(start, start_adapter, monkeypatch):
    monkeypatch.setattr(engine_socket, "ANSWER_TIMEOUT_S", 0.5)
    model, adapter = start(socket="radix.sock"), start_adapter(SLOW_ENGINE)
    request = FakeRequest(text_input="hang")
    adapter.execute([request])
    wait_until(lambda: "error" in ask(model, action="tree")["engines"][0])
    [engine] = ask(model, action="tree")["engines"]
    pid = adapter._responder._supervisor.pid
    assert engine == {"pid": pid, "error": "the engine does not answer"}
    os.kill(pid, signal.SIGKILL)
    request.sender.wait()


def test_it_looks_at_the_sidecar_that_it_is_told(start, tmp_path):
    path = tmp_path / "radix.sock"
    model = start(socket="radix.sock")  # relative to the folder that holds the repository
    error = ask(model, action="stats")
    assert error.code == FakeError.UNAVAILABLE and "does not answer" in str(error)
    with running(path):
        assert ask(model)["arena_bytes"] == 32 << 16
        model.finalize()
        assert ask(model)["arena_bytes"] == 32 << 16  # it is not ours to end


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"sizes": "1GiB"}, "unknown parameter sizes; known: socket, size, snapshot, "),
        ({"size": "much"}, "size: 'much' is no size"),
        ({"socket": "s", "size": "1GiB"}, "size: is the sidecar's own"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(start, params, message):
    with pytest.raises(ConfigError) as error:
        start(**params)
    assert str(error.value).startswith(message)


def test_a_sidecar_that_cannot_start_stops_nobody(start, tmp_path, monkeypatch):
    monkeypatch.setattr(radix_cache, "READY_S", 0.5)
    model = start(size="64KiB", valkey="nonsense://")
    assert ask(model).code == FakeError.UNAVAILABLE


def test_a_folder_of_somebody_else_stops_nobody(start, tmp_path, monkeypatch, caplog):
    (tmp_path / "private").symlink_to("/proc/1")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert ask(start()).code == FakeError.UNAVAILABLE
    assert "belongs to somebody else" in caplog.text


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"action": "burn"}, "action: must be one of stats, "),
        ({"action": "warm_up"}, "action: warm_up needs the server's parameter warm_up_prompts"),
        ({"action": "lookup"}, "text_input: is required"),
        ({"action": "lookup", "text_input": "x" * 1000}, "text_input: has "),
    ],
)
def test_bad_requests_are_answered(start, tmp_path, checkpoint, inputs, message):
    with running(tmp_path / "radix.sock"):
        model, client = (
            start(socket="radix.sock"),
            RadixClient(tmp_path / "radix.sock", layout_of(checkpoint), PATIENT_S),
        )
        client.cached_tokens([1] * 5)  # so that there is a model to look up for
        error = ask(model, **inputs)
        client.close()
    assert error.code == FakeError.INVALID_ARG and str(error).startswith(message)


def test_warm_up_asks_the_engine(start, tmp_path):
    FakeInferenceRequest.asked = []
    lines = [{"prompt": "first"}, {"question": "bad"}, {"turns": ["third", "more"]}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    model = start(socket="radix.sock", warm_up_prompts="prompts.jsonl", warm_up_model="ensemble")
    assert ask(model, action="warm_up") == {"prompts": 3, "failed": 1, "first_failure": "no slots"}
    assert FakeInferenceRequest.asked == [("ensemble", "first"), ("ensemble", "bad"), ("ensemble", "third")]
    (tmp_path / "prompts.jsonl").write_text("{}")
    assert "warm_up_prompts cannot be read" in str(ask(model, action="warm_up"))


def test_metrics(start, tmp_path, monkeypatch):
    monkeypatch.setattr(radix_metrics, "PUBLISH_INTERVAL_S", 0.01)
    monkeypatch.setattr(FakePbUtils, "metric_families", [])
    start(socket="radix.sock", REPORT_CUSTOM_METRICS="true")

    def value(name: str) -> float | None:
        metrics = [m for f in FakePbUtils.metric_families if f.name == name for m in f.metrics.values()]
        return metrics[0].value if metrics else None

    layout = Layout(b"f", bytes_per_token=100, block_tokens=4, successor=False)
    for num_blocks, total in ((3, 3), (2, 5)):  # the second sidecar counts from 0
        with running(tmp_path / "radix.sock"):
            client = RadixClient(tmp_path / "radix.sock", layout, PATIENT_S)
            store(client, layout.keys(range(4 * num_blocks)))
            wait_until(lambda num_blocks=num_blocks: value("specbackend:radix_published_blocks") == num_blocks)
            wait_until(lambda total=total: value("specbackend:radix_committed_blocks_total") == total)
            client.close()
            time.sleep(0.1)  # some publications more, with nothing new
            assert value("specbackend:radix_committed_blocks_total") == total
    threads = {t for f in FakePbUtils.metric_families for m in f.metrics.values() for t in m.threads}
    assert len(threads) == 1
