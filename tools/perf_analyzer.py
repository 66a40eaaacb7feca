"""NVIDIA's perf_analyzer as a client: it asks, and what its profile says of each request becomes an answer."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# What it needs and tritonclient's wheel does not bring; the tritonserver wheel does, under names of its own.
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
TIMEOUT_S = 600  # it waits for ever for a server that has ended
ATTEMPTS = 3
LOG_TAIL = 5  # lines shown when it fails


class PerfAnalyzerError(RuntimeError):
    """No perf_analyzer, or one that failed. The message says why."""


def ask_all(url: str, model: str, questions: Sequence[Any], in_flight: int) -> list[Any]:
    """As specbackend.serving.client.ask_all; the answers have `output_ids`, no text. Raises PerfAnalyzerError."""
    with tempfile.TemporaryDirectory() as folder:
        data, profile = Path(folder) / "questions.json", Path(folder) / "profile.json"
        data.write_text(json.dumps({"data": [listed(question.inputs) for question in questions]}))
        server = ["-m", model, "-u", url, "-i", "grpc", "--streaming", "--async"]
        load = ["--concurrency-range", str(in_flight), "--request-count", str(len(questions))]
        files = ["--input-data", str(data), "--profile-export-file", str(profile)]
        command = [find_program(), *server, *load, *files, "--stability-percentage", "999"]  # one measurement will do
        return in_order(questions, measured(command, profile)["experiments"][0]["requests"])


def find_program() -> str:
    """$PERF_ANALYZER, or what pip put beside this Python."""
    found = os.environ.get("PERF_ANALYZER") or shutil.which("perf_analyzer", path=str(Path(sys.prefix) / "bin"))
    if not found:
        raise PerfAnalyzerError("no perf_analyzer: set PERF_ANALYZER, or install tritonclient from its manylinux wheel")
    return found


def environment() -> dict[str, str]:
    """This process's, in which the loader finds the libraries through links in the virtual environment, too."""
    links = Path(sys.prefix) / "perf_analyzer"
    if wheel := find_spec("pytriton"):
        brought = Path(wheel.origin).parents[1] / "nvidia_pytriton.libs"
        links.mkdir(exist_ok=True)
        for name, pattern in LIBRARIES.items():
            if not (links / name).exists():  # or it leads to where the environment was
                (links / name).unlink(missing_ok=True)
                (links / name).symlink_to(next(brought.glob(pattern)))
    known = os.environ.get("LD_LIBRARY_PATH")
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [known, str(links)]))}


def measured(command: Sequence[str], profile: Path) -> dict[str, Any]:
    """What it writes into the profile: now and then nothing, or the beginning of it, in 2.50."""
    for _ in range(ATTEMPTS):
        run(command)
        with suppress(ValueError):
            return json.loads(profile.read_bytes())
    raise PerfAnalyzerError(f"{command[0]} has written no whole profile, {ATTEMPTS} times")


def run(command: Sequence[str]) -> None:
    try:
        result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PerfAnalyzerError(f"{command[0]}: {error}") from error
    if result.returncode:
        tail = "\n".join((result.stdout + result.stderr).splitlines()[-LOG_TAIL:])
        raise PerfAnalyzerError(f"{command[0]} ended with code {result.returncode}\n{tail}")


def in_order(questions: Iterable[Any], requests: Iterable[Mapping[str, Any]]) -> list[Any]:
    """The answers in the questions' order, from a profile's requests, which are in any; equal questions may swap."""
    by_prompt = defaultdict(list)
    for request in requests:
        by_prompt[request["request_inputs"]["text_input"]].append(to_answer(request))
    return [by_prompt[question.inputs["text_input"]].pop() for question in questions]


def to_answer(request: Mapping[str, Any]) -> Any:
    """With the ids alone: for outputs that a response does not have, a profile has noise."""
    from specbackend.serving.client import Answer

    responses = [{"output_ids": outputs["output_ids"]} for outputs in request["response_outputs"]]
    times = [timestamp / 1e9 for timestamp in request["response_timestamps"]]
    return Answer(responses=responses, started=request["timestamp"] / 1e9, times=times)


def listed(inputs: Mapping[str, Any]) -> dict[str, list]:
    return {name: [value] for name, value in inputs.items()}
