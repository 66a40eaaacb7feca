"""tools/bench_serving with tiny settings and the real tritonserver, and what is read from clients' answers.

perf_analyzer is the real one, too.
"""

import json
import sys
from importlib.util import find_spec

import perf_analyzer
import pytest
import serving_load

from specbackend.serving.client import Answer
from tests.test_tools import load_tool


def answer(started: float, *responses: tuple[float, list[int] | int]) -> Answer:
    """Of responses at these times with these token ids."""
    made = Answer(started=started)
    for at, ids in responses:
        made.add({"text_output": "x", "output_ids": ids}, at)
    return made


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


SECOND = 1_000_000_000  # in perf_analyzer's time
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


def in_flight_of(command: list[str]) -> str:
    return command[command.index("--concurrency-range") + 1]


@pytest.mark.skipif(find_spec("pytriton") is None, reason="needs the tritonserver wheel")
def test_a_different_answer_to_perf_analyzer_is_told(bench, monkeypatch, capsys):
    module, right = bench.module, bench.module.offline_answers

    def one_is_wrong(turn, engine):
        first, *others = right(turn, engine)
        return [[first[0] + 1, *first[1:]], *others]

    monkeypatch.setattr(module, "offline_answers", one_is_wrong)
    measured, in_flight = perf_analyzer.measured, []

    def noted(command, profile):
        written = measured(command, profile)
        in_flight.append(in_flight_of(command))  # those that are not whole are asked for again
        return written

    monkeypatch.setattr(perf_analyzer, "measured", noted)
    assert bench(*TINY[2:], "--rounds", 1, "--perf-analyzer") == 1
    assert in_flight == ["1", "2", "1", "2"]  # warm-up, round
    one, two = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert (one[0], one[-1], two[0], two[-1]) == ("1", "3/4", "2", "7/8")


def profiled(prompt: str, started: int, *responses: tuple[int, list[int] | int]) -> dict:
    """A request as perf_analyzer writes it down: nanoseconds, one value or a list, and noise for what was not sent."""
    times, ids = zip(*responses, strict=True)
    outputs = [{"text_output": "x", "num_spec_steps": 1304156109, "output_ids": each} for each in ids]
    inputs = {"text_input": prompt, "max_tokens": 8}
    return {"timestamp": started, "request_inputs": inputs, "response_timestamps": times, "response_outputs": outputs}


def test_answers_in_a_profile():
    b = profiled("b", 3 * SECOND, (4 * SECOND, 5))
    a = profiled("a", 1 * SECOND, (2 * SECOND, 7), (3 * SECOND, [8, 9]))
    questions = [serving_load.greedy_question(prompt, 8) for prompt in "ab"]
    assert perf_analyzer.in_order(questions, [b, a]) == [answer(1.0, (2.0, 7), (3.0, [8, 9])), answer(3.0, (4.0, 5))]


@pytest.mark.parametrize("failures", [0, 1, 2, 3])
@pytest.mark.parametrize("broken", [b"", b'{"experiments": [{"requests": [', b'{"experiments": "\xc3'])
def test_a_profile_that_is_not_whole_is_made_again(broken, failures, monkeypatch, tmp_path):
    profile, runs = tmp_path / "profile.json", []

    def run(command):
        runs.append(command)
        profile.write_bytes(b"{}" if len(runs) > failures else broken)

    monkeypatch.setattr(perf_analyzer, "run", run)
    measured = perf_analyzer.insisting(perf_analyzer.measured)
    if failures == perf_analyzer.ATTEMPTS:
        with pytest.raises(perf_analyzer.PerfAnalyzerError, match="program has written no whole profile"):
            measured(["program"], profile)
    else:
        assert measured(["program"], profile) == {} and len(runs) == failures + 1


def test_perf_analyzer_that_fails_or_is_missing(monkeypatch, tmp_path):
    question = serving_load.greedy_question("a", 8)

    def failure() -> str:
        with pytest.raises(perf_analyzer.PerfAnalyzerError) as caught:
            perf_analyzer.ask_all("localhost:1", "llm", [question], 1)
        return str(caught.value)

    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert "set PERF_ANALYZER" in failure()
    monkeypatch.setenv("PERF_ANALYZER", str(tmp_path / "none"))
    assert "No such file" in failure()
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho cannot connect >&2; exit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PERF_ANALYZER", str(program))
    assert failure() == f"{program} ended with code 3\ncannot connect"


def test_parameters_of_the_engine(bench, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_serving", "--model-path", "target", "--dtype", "bfloat16"])
    params = bench.module.engine_params(bench.module.parse_args())
    assert params.pop("num_threads") >= 1
    assert params == {"model_path": "target", "dtype": "bfloat16", "disable_radix_cache": True}
