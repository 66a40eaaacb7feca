"""tools/bench_adapter with tiny settings and the real tritonserver, and the engine that it uses."""

import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import perf_analyzer
import pytest
from paced.engine import PacedEngine, repeated

from specbackend.request import FinishReason, Request
from specbackend.sampling_params import SamplingParams
from tests.test_tools import load_tool

REQUESTS, RESPONSES = 2, 24  # of each stream; to each


@pytest.fixture
def module(monkeypatch):
    return load_tool("bench_adapter", monkeypatch)


def test_paced_engine_repeats_the_prompt():
    engine = PacedEngine(model_path="none")
    for name, length in (("a", 7), ("b", 3), ("c", 50)):
        engine.submit(Request(name, [1, 2, 3, 4], SamplingParams(max_new_tokens=length)))
    engine.cancel("c")
    first, second, third = engine.step(), engine.step(), engine.step()
    assert [(update.request_id, update.token_ids) for update in first] == [("a", [1, 2, 3]), ("b", [1, 2, 3])]
    assert [(update.token_ids, update.finish_reason) for update in second] == [([4, 1, 2], None)]
    assert [(update.token_ids, update.finish_reason) for update in third] == [([3], FinishReason.LENGTH)]
    assert first[1].finish_reason is FinishReason.LENGTH and not engine.has_work
    assert repeated([1, 2, 3, 4], 7) == [1, 2, 3, 4, 1, 2, 3]


def test_cpu_time_is_that_of_the_process(module):
    before = time.process_time()
    sum(range(1_000_000))
    counted = module.cpu_seconds(os.getpid())
    assert before - 2 / module.TICKS_PER_SECOND <= counted <= time.process_time()  # user and system are cut to ticks


def test_every_request_has_a_response(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_adapter", "--responses", "16"])
    with pytest.raises(SystemExit):
        module.parse_args()
    assert "--responses: must be above 16" in capsys.readouterr().err


@pytest.fixture
def run(module, monkeypatch, tmp_path):
    """The tool with these flags, to which the third answer to a concurrency is wrong: its rows, and whose CPU time it
    asked for."""
    if find_spec("pytriton") is None:
        pytest.skip("needs the tritonserver wheel")
    make_questions, watched = module.make_questions, []

    def a_second_later(pid):
        watched.append(Path(f"/proc/{pid}/comm").read_text().strip())
        return len(watched)

    def the_third_is_wrong(*args):
        questions, texts = make_questions(*args)
        return questions, [text[::-1] if index == 2 else text for index, text in enumerate(texts)]

    monkeypatch.setattr(module, "cpu_seconds", a_second_later)
    monkeypatch.setattr(module, "make_questions", the_third_is_wrong)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # put back what the tool sets

    def run(*flags: object) -> tuple[list[dict], list[str]]:
        settings = ("--requests", REQUESTS, "--responses", RESPONSES, "--json", tmp_path / "found", *flags)
        monkeypatch.setattr(sys, "argv", ["bench_adapter", *map(str, settings)])
        assert module.main() == 1
        return json.loads((tmp_path / "found").read_text())["rows"], watched

    return run


def test_costs_and_a_different_answer(run, capsys):
    [one, two], watched = run("--concurrencies", 1, 2)
    assert [(row["concurrency"], row["requests"], row["equal"]) for row in (one, two)] == [(1, 2, 2), (2, 4, 3)]
    for row in (one, two):
        assert row["requests"] < row["responses"] <= row["requests"] * (RESPONSES + 16)
        assert row["server_us_per_response"] == row["stub_us_per_response"] == pytest.approx(2e6 / row["responses"])
        assert row["bare_stub_us_per_response"] > 0
        for name in ("all_at_once", "first_token", "between_responses"):
            assert 0 < row[name]["p50_ms"] <= row[name]["p99_ms"]
    assert watched == ["tritonserver", "triton_python_b"] * 8  # before and after, of both models, twice
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[2:]] == ["2/2", "3/4"]


def test_perf_analyzer_asks(run, monkeypatch):
    """And once more, if its profile is broken, without the cost of what is lost."""
    measured, whole, lost = perf_analyzer.measured, [True, False], []

    def now_and_then(command, profile):
        try:
            found = measured(command, profile)
            if whole and not whole.pop():
                raise perf_analyzer.BrokenProfile("cut off")
        except perf_analyzer.BrokenProfile as error:  # which it may be of itself, too
            lost.append(error)
            raise
        return found

    monkeypatch.setattr(perf_analyzer, "measured", now_and_then)
    [row], watched = run("--concurrencies", 2, "--perf-analyzer")
    assert lost
    before_those_that_are_lost, around_the_others = len(lost), 4
    assert watched == ["tritonserver", "triton_python_b"] * (before_those_that_are_lost + around_the_others)
    assert (row["equal"], row["requests"]) == (3, 4)
    assert row["stub_us_per_response"] == pytest.approx(2e6 / row["responses"])
    assert 0 < row["first_token"]["p50_ms"] <= row["first_token"]["p99_ms"]
