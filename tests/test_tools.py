"""The command-line tools: what tools/serve makes of its flags, what tools/demo prints."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from specbackend.config import EngineConfig
from specbackend.serving import tritonserver

ROOT = Path(__file__).parents[1]
DEMO_DRAFT = ROOT / "tools" / "demo_checkpoints" / "llama-gsm8k-eagle3" / "model.safetensors"
SPECULATIVE = ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", "draft"]


def load_tool(name: str, monkeypatch):
    """A tool as a module, in the environment that runs the tests."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    loader = SourceFileLoader(f"tool_{name}", str(ROOT / "tools" / name))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    monkeypatch.setitem(sys.modules, loader.name, module)  # dataclasses look their module up
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # no tools/democ
    loader.exec_module(module)
    monkeypatch.setattr(module.setup_env, "enter", lambda script: None)
    return module


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Call tools/serve with arguments; the repositories it makes lie in tmp_path."""
    module = load_tool("serve", monkeypatch)
    monkeypatch.setattr(module.setup_env, "ROOT", tmp_path)

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["serve", *arguments])
        return module.main()

    return call


def parameters_of(config_path: Path) -> dict[str, str]:
    config = text_format.Parse(config_path.read_text(), ModelConfig())
    return {name: value.string_value for name, value in config.parameters.items()}


def test_help_lists_every_parameter(serve, capsys):
    with pytest.raises(SystemExit):
        serve("--help")
    output = capsys.readouterr().out
    for field in fields(EngineConfig):
        assert f"--{field.name.replace('_', '-')} " in output
    for port in ("http", "grpc", "metrics"):
        assert f"--{port}-port" in output


def test_repository_has_the_parameters(serve, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--model-path", "target", *SPECULATIVE, "--disable-radix-cache", "--http-port", "8123"]
    assert serve(*flags, "--print-repository") == 0
    repository = tmp_path / "build" / "model_repository_8123"
    assert capsys.readouterr().out == f"{repository}\n"
    shipped = ROOT / "model_repository"
    assert {path.name for path in repository.iterdir()} == {path.name for path in shipped.iterdir()}
    in_engine = {
        "model_path": str(tmp_path / "target"),
        "speculative_algorithm": "EAGLE3",
        "speculative_draft_model_path": str(tmp_path / "draft"),
        "disable_radix_cache": "true",
    }
    engine_names = {field.name for field in fields(EngineConfig)}
    for model in ("llm", "vllm_model"):
        params = parameters_of(repository / model / "config.pbtxt")
        assert {name: value for name, value in params.items() if name in engine_names} == in_engine
    preprocessing = parameters_of(repository / "preprocessing" / "config.pbtxt")
    assert preprocessing == parameters_of(shipped / "preprocessing" / "config.pbtxt") | {
        "model_path": str(tmp_path / "target")
    }


@pytest.mark.parametrize("flags", [[], ["--enable-metrics"], ["--openai-port", "9123"]], ids=str)
def test_who_reports_its_numbers(flags, serve, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert serve("--model-path", "target", *flags, "--http-port", "8123", "--print-repository") == 0
    for model in ("llm", "vllm_model"):
        params = parameters_of(tmp_path / "build" / "model_repository_8123" / model / "config.pbtxt")
        assert params["REPORT_CUSTOM_METRICS"] == ("true" if flags else "false")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--speculative-num-steps", "3"], "speculative_num_steps: is set, but speculative_algorithm is not"),
        (["--page-size", "16"], "page_size"),
        (["--tp-size", "0"], "tp_size"),
        (["--no-such-flag", "1"], "--no-such-flag"),
    ],
)
def test_wrong_parameters_are_named(serve, capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        serve("--model-path", "target", *flags)
    assert caught.value.code != 0
    assert message in capsys.readouterr().err


def test_serve_becomes_tritonserver(serve, monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(tritonserver, "find_tritonserver", lambda: tritonserver.Installation(Path("/tritonserver")))
    monkeypatch.setattr(tritonserver, "choose_ports", lambda address, ports: ports)
    monkeypatch.setattr("os.execve", lambda program, command, env: started.extend(command))
    serve("--model-path", "target", "--grpc-port", "9001", "--", "--log-verbose=1")
    assert started[0] == "/tritonserver"
    assert f"--model-repository={tmp_path / 'build' / 'model_repository_8000'}" in started
    assert {"--http-port=8000", "--grpc-port=9001", "--metrics-port=8002"} <= set(started)
    assert started[-1] == "--log-verbose=1"


def test_demos_closing_line(monkeypatch):
    demo = load_tool("demo", monkeypatch)
    fast = [demo.Answer(tuple(range(21)), 20, 0.1, 7), demo.Answer(tuple(range(21)), 20, 0.1, 7)]
    plain = [demo.Answer(tuple(range(21)), 20, 0.2, 21)] * 2
    assert demo.summary(fast, plain) == (
        "2 questions: with speculation 200 tok/s, without 100 tok/s: 2.00x, accept length 3.00"
    )


@pytest.mark.skipif(not DEMO_DRAFT.exists(), reason="needs the demo checkpoints")
def test_demo():
    command = [sys.executable, ROOT / "tools" / "demo", "--max-tokens", "48"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stdout + result.stderr
    closing = (
        r"4 questions: with speculation \d+ tok/s, without \d+ tok/s: [\d.]+x, accept length [\d.]+, outputs equal"
    )
    assert re.fullmatch(closing, result.stdout.splitlines()[-1])


@pytest.mark.skipif(find_spec("pytriton") is None, reason="needs the tritonserver wheel")
def test_stress_server(monkeypatch, capsys):
    tool, sizes = load_tool("stress_server", monkeypatch), ("--requests", "9", "--concurrency", "4", "--prompts", "4")
    monkeypatch.setattr(sys, "argv", ["stress_server", *sizes, "--max-tokens", "24", "--num-threads", "1"])
    assert tool.main() == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["lost_slots"] == 0
    for face in ("grpc", "generate_stream"):
        counts = [summary[face][outcome] for outcome in ("equal", "cancelled", "different", "failed")]
        assert counts == [6, 3, 0, 0]


def test_bench_decode_of_all_algorithms(tmp_path):
    command = [sys.executable, ROOT / "tools" / "bench_decode", "--all-algorithms", "--num-prompts", "2"]
    command += ["--max-new-tokens", "8", "--batch-size", "2", "--num-threads", "1", "--temperature", "1"]
    result = subprocess.run(
        [*command, "--json", tmp_path / "figures.json"], capture_output=True, text=True, timeout=180
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == "outputs equal: True"
    figures = json.loads((tmp_path / "figures.json").read_text())
    algorithms = [row["algorithm"] for row in figures["algorithms"]]
    assert {"plain", "EAGLE3", "EAGLE", "EAGLE + token map", "NEXTN, MiMo", "NGRAM"} < set(algorithms)
    assert [line.split("  ")[0] for line in lines[1:-1]] == algorithms
    assert all(row["tokens"] > 0 for row in figures["algorithms"])
