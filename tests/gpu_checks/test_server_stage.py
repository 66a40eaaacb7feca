"""The stage that serves: each step alone, and all of it with the installed tritonserver in the bundle's place."""

import json
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from gpu_checks import server_stage
from gpu_checks.server_stage import ServedCase, Steps, check_server, make_repository

from specbackend.serving.tritonserver import Installation, find_tritonserver
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET, ROOT

PARAMS = {
    "model_path": str(DEMO_TARGET),
    "speculative_algorithm": "EAGLE3",
    "speculative_draft_model_path": str(DEMO_EAGLE3),
    "device": "cpu",
    "max_total_tokens": 12000,
    "num_threads": 1,
}


def steps(out, left_s=10.0):
    return Steps(out, time.monotonic() + left_s)


def test_a_step_that_fails_leaves_what_it_found_and_its_reason():
    out = {}

    def fail(found):
        found["before"] = 1
        raise ValueError("the reason")

    assert steps(out).run("one", 5, fail) is None
    assert steps(out).run("two", 5, lambda found: "result") == "result"
    assert out["one"]["before"] == 1 and out["one"]["error"] == "ValueError: the reason"
    assert "error" not in out["two"] and out["two"]["seconds"] >= 0


@pytest.mark.parametrize("limit_s, left_s", [(0.1, 10.0), (10.0, 0.1)])
def test_a_step_ends_at_its_limit_or_the_deadline(limit_s, left_s):
    out, start = {}, time.monotonic()
    assert steps(out, left_s).run("long", limit_s, lambda found: time.sleep(3)) is None
    assert time.monotonic() - start < 2
    assert "not over within" in out["long"]["error"]


def test_nothing_begins_after_the_deadline():
    out = {}
    assert steps(out, -1).run("late", 5, lambda found: "result") is None
    assert out == {"late": {"error": "no time was left"}}


def test_no_parameter_of_the_shipped_repository_remains(tmp_path):
    folder = make_repository(tmp_path / "models", {"model_path": str(DEMO_TARGET), "device": "cpu"})
    params = json.loads((folder / "llm" / "1" / "model.json").read_text())
    assert params["speculative_algorithm"] is None and params["speculative_draft_model_path"] is None
    assert params["device"] == "cpu" and params["REPORT_CUSTOM_METRICS"] is True


def test_a_bundle_that_is_not_there_is_a_finding(tmp_path):
    out = {}
    check_server(ServedCase(PARAMS, [], [], 8), tmp_path / "none", tmp_path, out, deadline_s=20)
    assert "FileNotFoundError" in out["unpack"]["error"] and "ready" not in out


def test_parameters_that_are_refused_are_a_finding(tmp_path, monkeypatch):
    parts = SimpleNamespace(packages=ROOT, installation=Installation(Path("/bin/true")))
    monkeypatch.setattr(server_stage, "unpack", lambda bundle, folder: parts)
    out = {}
    check_server(ServedCase({**PARAMS, "no_such": 1}, [], [], 8), tmp_path, tmp_path, out, deadline_s=20)
    assert "no_such" in out["start"]["error"] and "ready" not in out


@pytest.fixture
def case(demo_prompts):
    from specbackend.engine import Engine
    from specbackend.tokenizer import Tokenizer

    tokenizer = Tokenizer(DEMO_TARGET)
    answers = Engine(**PARAMS).generate(
        input_ids=demo_prompts[:4], sampling_params={"temperature": 0, "max_new_tokens": 24}
    )
    prompts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in demo_prompts[:8]]
    return ServedCase(PARAMS, prompts, [answer["output_ids"] for answer in answers], max_tokens=24)


@pytest.mark.skipif(find_spec("pytriton") is None, reason="needs the tritonserver wheel")
def test_all_of_it(case, tmp_path, monkeypatch):
    """One expected answer is wrong at its fourth token, which has to be told; else nothing may go wrong."""
    parts = SimpleNamespace(packages=ROOT, installation=find_tritonserver())
    monkeypatch.setattr(server_stage, "unpack", lambda bundle, folder: parts)
    monkeypatch.setattr(server_stage, "LOAD_S", 1.0)
    monkeypatch.setattr(server_stage, "CONCURRENCIES", (1, 4))
    wrong = [*case.expected[1][:3], 7, *case.expected[1][4:]]
    case = replace(case, expected=[case.expected[0], wrong, *case.expected[2:]])
    out = {}
    check_server(case, tmp_path, tmp_path / "out", out, deadline_s=120)

    assert {name: found["error"] for name, found in out.items() if "error" in found} == {}
    assert out["equal_answers"]["equal"] == 3
    assert out["equal_answers"]["first_difference_by_prompt"] == {"1": 3}
    for concurrency in (1, 4):
        load = out[f"load_{concurrency}"]
        assert load["requests"] >= concurrency and load["tokens_per_s"] > 0
        assert 1 < load["acceptance_length"] <= 6
    assert out["http"]["equal"] and out["http"]["generate"]["status"] == out["http"]["ensemble"]["status"] == 200
    assert out["cancel"]["left_early"] == 8 and out["cancel"]["slots_in_use_after"] == 0
    assert any("spec_accept_length" in name for name in out["metrics"])
    assert out["stop"]["processes_left"] == out["stop"]["shared_memory_left"] == 0
    assert "successfully loaded 'llm'" in (tmp_path / "out" / server_stage.LOG).read_text()
    json.dumps(out)
