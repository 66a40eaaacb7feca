"""tools/bench_serving with tiny settings and the real tritonserver, and what is read from clients' answers."""

import json
import sys
from importlib.util import find_spec

import pytest
import serving_load

from specbackend.serving.client import Answer
from tests.test_tools import load_tool


def answer(started: float, *responses: tuple[float, list[int] | int]) -> Answer:
    """Of responses at these times with these token ids."""
    times, ids = zip(*responses, strict=True)
    return Answer(started=started, times=list(times), responses=[{"output_ids": each} for each in ids])


def test_latencies_of_answers():
    answers = [answer(1.0, (1.5, 7), (1.75, [8, 9]), (1.875, [])), answer(1.25, (1.5, [7, 8]), (2.5, 9))]
    assert [serving_load.token_ids(each) for each in answers] == [[7, 8, 9], [7, 8, 9]]
    assert serving_load.first_token_seconds(answers) == [0.5, 0.25]
    assert serving_load.inter_token_seconds(answers) == [0.125, 0.125, 1.0]
    assert serving_load.span_seconds(answers) == 1.5


def test_percentiles():
    samples = [index / 1000 for index in reversed(range(201))]
    assert serving_load.percentiles_ms(samples) == {"p50_ms": pytest.approx(100), "p99_ms": pytest.approx(198)}
    assert serving_load.percentiles_ms([2.0]) == {"p50_ms": 2000, "p99_ms": 2000}


@pytest.fixture
def bench(monkeypatch):
    """tools/bench_serving as a function of its arguments."""
    module = load_tool("bench_serving", monkeypatch)

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["bench_serving", *map(str, arguments)])
        return module.main()

    call.module = module
    return call


TINY = ("--rounds", 2, "--requests", 3, "--concurrencies", 1, 2, "--max-new-tokens", 6, "--num-threads", 1)


@pytest.mark.skipif(find_spec("pytriton") is None, reason="needs the tritonserver wheel")
def test_server_beside_the_engine(bench, tmp_path, capsys):
    assert bench(*TINY, "--json", tmp_path / "figures.json") == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    one, two = figures["rows"]
    assert [(row["concurrency"], row["requests"], row["equal"]) for row in (one, two)] == [(1, 8, 8), (2, 16, 16)]
    for row in (one, two):
        assert row["tokens"] == 6 * row["requests"]
        assert row["server_tok_per_s"] == row["tokens"] / row["server_seconds"]
        assert row["overhead"] == pytest.approx(1 - row["server_tok_per_s"] / row["engine_tok_per_s"])
        for name in ("first_token", "inter_token"):
            assert 0 < row[name]["p50_ms"] <= row[name]["p99_ms"]
    assert figures["engine"]["speculative_algorithm"] == "EAGLE3" and figures["engine"]["num_threads"] == "1"
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(figures["rows"])


@pytest.mark.skipif(find_spec("pytriton") is None, reason="needs the tritonserver wheel")
def test_a_different_answer_is_told(bench, monkeypatch, capsys):
    module, right = bench.module, bench.module.offline_answers

    def one_is_wrong(turn, engine):
        first, *others = right(turn, engine)
        return [[first[0] + 1, *first[1:]], *others]

    monkeypatch.setattr(module, "offline_answers", one_is_wrong)
    assert bench(*TINY[2:], "--rounds", 1) == 1
    assert "3/4" in capsys.readouterr().out


def test_parameters_of_the_engine(bench, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_serving", "--model-path", "target", "--dtype", "bfloat16"])
    params = bench.module.engine_params(bench.module.parse_args())
    assert params.pop("num_threads") >= 1
    assert params == {"model_path": "target", "dtype": "bfloat16", "disable_radix_cache": True}
