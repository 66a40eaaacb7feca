"""A server under load: greedy streams over gRPC, and what their clients saw.

Imports the client where it is called: on a machine for checks it comes out of a bundle first.
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from specbackend.config import EngineConfig

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "tools" / "demo_checkpoints"
DEMO_PARAMS = {
    "model_path": str(DEMO / "llama-gsm8k"),
    "speculative_algorithm": "EAGLE3",
    "speculative_draft_model_path": str(DEMO / "llama-gsm8k-eagle3"),
    "dtype": "float32",
}


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Those of tools/serve."""
    group = parser.add_argument_group("engine")
    for each in fields(EngineConfig):
        group.add_argument("--" + each.name.replace("_", "-"))


def engine_params(args: argparse.Namespace) -> dict[str, Any]:
    """Those that were given; without model_path the demo's, too. One core is the server's and its clients'."""
    given = {each.name: getattr(args, each.name) for each in fields(EngineConfig)}
    given = {name: value for name, value in given.items() if value is not None}
    num_threads = {"num_threads": max(1, len(os.sched_getaffinity(0)) - 1)}
    return num_threads | (given if "model_path" in given else DEMO_PARAMS | given)


def make_repository(folder: Path, params: Mapping[str, Any]) -> Path:
    """The shipped model repository with these parameters instead of its own, and the gauges."""
    shutil.copytree(ROOT / "model_repository", folder, ignore=shutil.ignore_patterns("__pycache__", "model.json"))
    engine = EngineConfig.from_params(params).resolve_paths(ROOT).to_params()
    for face in ("llm", "vllm_model"):
        (folder / face / "1" / "model.json").write_text(json.dumps({**engine, "REPORT_CUSTOM_METRICS": True}))
    (folder / "preprocessing" / "1" / "model.json").write_text(json.dumps({"model_path": engine["model_path"]}))
    return folder


def greedy_question(prompt: str, max_tokens: int) -> Any:
    from specbackend.serving.client import Question

    inputs = {"text_input": prompt, "max_tokens": max_tokens, "temperature": 0.0, "stream": True}
    return Question({**inputs, "return_output_ids": True, "return_perf_metrics": True})


def token_ids(answer: Any) -> list[int]:
    return [token for response in answer.responses for token in new_tokens(response)]


def new_tokens(response: Mapping[str, Any]) -> list[int]:
    ids = response["output_ids"]
    return ids if isinstance(ids, list) else [ids]


def span_seconds(answers: Sequence[Any]) -> float:
    """From the first question to the last response, without the making of the connection."""
    return max(answer.times[-1] for answer in answers) - min(answer.started for answer in answers)


def first_token_seconds(answers: Iterable[Any]) -> list[float]:
    return [answer.times[0] - answer.started for answer in answers]


def inter_token_seconds(answers: Iterable[Any]) -> list[float]:
    """One for each token behind the first response: those that come together share the time since the last ones."""
    samples = []
    for answer in answers:
        for response, last, now in zip(answer.responses[1:], answer.times, answer.times[1:], strict=False):
            if count := len(new_tokens(response)):
                samples += [(now - last) / count] * count
    return samples


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """p50 and p99, of one sample or more."""
    ordered = sorted(seconds)
    return {f"p{share}_ms": 1000 * ordered[int(share / 100 * (len(ordered) - 1))] for share in (50, 99)}
