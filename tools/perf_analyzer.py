"""NVIDIA's perf_analyzer as a client: it asks, and what its profile says of each request becomes an answer."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

# What it needs and tritonclient's wheel does not bring; the tritonserver wheel does, under names of its own.
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
TIMEOUT_S = 600  # it waits for ever for a server that has ended
ATTEMPTS = 3
LOG_TAIL = 5  # lines shown when it fails
OUTPUTS = ("text_output", "output_ids")  # that are read

T = TypeVar("T")


class PerfAnalyzerError(RuntimeError):
    """No perf_analyzer, or one that failed. The message says why."""


class BrokenProfile(PerfAnalyzerError):
    """What it wrote is not whole: with 2.50 that happens now and then, and once more helps."""


def insisting(ask: Callable[..., T]) -> Callable[..., T]:
    """Asks again where a profile is broken, and raises the last of ATTEMPTS that are."""

    @wraps(ask)
    def insist(*args: Any) -> T:
        for _ in range(ATTEMPTS - 1):
            with suppress(BrokenProfile):
                return ask(*args)
        return ask(*args)

    return insist


def ask_once(url: str, model: str, questions: Sequence[Any], in_flight: int) -> list[Any]:
    """As specbackend.serving.client.ask_all; the answers have OUTPUTS. Raises PerfAnalyzerError."""
    with tempfile.TemporaryDirectory() as folder:
        data, profile = Path(folder) / "questions.json", Path(folder) / "profile.json"
        data.write_text(json.dumps({"data": [listed(question.inputs) for question in questions]}))
        server = ["-m", model, "-u", url, "-i", "grpc", "--streaming", "--async"]
        load = ["--concurrency-range", str(in_flight), "--request-count", str(len(questions))]
        files = ["--input-data", str(data), "--profile-export-file", str(profile)]
        command = [find_program(), *server, *load, *files, "--stability-percentage", "999"]  # one measurement will do
        return in_order(questions, measured(command, profile)["experiments"][0]["requests"])


ask_all = insisting(ask_once)


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
    """What it writes into the profile."""
    run(command)
    try:
        return json.loads(profile.read_bytes())
    except ValueError as error:
        raise BrokenProfile(f"{command[0]} has written no whole profile: {error}") from error


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
    """For outputs that were not asked for, a profile has noise."""
    from specbackend.serving.client import Answer

    answer = Answer(started=request["timestamp"] / 1e9)
    for outputs, timestamp in zip(request["response_outputs"], request["response_timestamps"], strict=True):
        answer.add({name: outputs[name] for name in OUTPUTS}, timestamp / 1e9)
    return answer


def listed(inputs: Mapping[str, Any]) -> dict[str, list]:
    return {name: [value] for name, value in inputs.items()}
