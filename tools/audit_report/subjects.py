"""Whom the audit asks: a running server, or an engine in this process."""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import tritonclient.grpc as grpc_client

from specbackend.serving.client import Question, ask_all

Prompt = str | list[int]
OUTPUTS = ("output_ids", "num_spec_steps")
FLAGS = {"return_output_ids": True, "return_perf_metrics": True}  # through an ensemble, outputs are asked for by flags


class AuditError(Exception):
    """What the audit is told cannot be used. The message says why."""


@dataclass(frozen=True)
class Answer:
    output_ids: list[int]
    num_steps: int  # of decoding, drafted or plain


class Subject(Protocol):
    def answer(self, prompts: Sequence[Prompt], params: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Answer all prompts, many at a time. `params` are sampling parameters under our own names."""

    def facts(self) -> dict[str, str]:
        """What figures must be quoted with."""


class ServerSubject:
    """A tritonserver with our model repository."""

    def __init__(self, url: str, model: str, in_flight: int):
        self.url, self.model, self.in_flight = url, model, in_flight

    def answer(self, prompts: Sequence[Prompt], params: Sequence[Mapping[str, Any]]) -> list[Answer]:
        questions = map(question_of, prompts, params)
        answers = ask_all(self.url, self.model, questions, self.in_flight, OUTPUTS)
        return [_answer_of(answer.responses[-1]) for answer in answers]

    def facts(self) -> dict[str, str]:
        with closing(grpc_client.InferenceServerClient(self.url)) as client:
            server = client.get_server_metadata()
        return {"server": f"{server.name} {server.version}, model {self.model}"}


class EngineSubject:
    """An engine in this process. Text is put into the chat template, where the tokenizer has one."""

    def __init__(self, params: Mapping[str, Any]):
        from specbackend.engine import Engine

        self.engine = Engine(**{"speculative_adaptive": False} | dict(params))  # each step is to be audited
        self._params = dict(params)

    def answer(self, prompts: Sequence[Prompt], params: Sequence[Mapping[str, Any]]) -> list[Answer]:
        ids, most, answers = [self._ids(prompt) for prompt in prompts], self.engine.config.max_queued_requests, []
        for start in range(0, len(ids), most):
            part = slice(start, start + most)
            answers += self.engine.generate(input_ids=ids[part], sampling_params=[dict(each) for each in params[part]])
        return [Answer(answer["output_ids"], answer["meta_info"]["spec_verify_ct"]) for answer in answers]

    def facts(self) -> dict[str, str]:
        import torch

        given = ", ".join(f"{name} {value}" for name, value in self._params.items())
        machine = f"{self.engine.device}, {str(self.engine.dtype).removeprefix('torch.')}"
        return {"engine": f"in-process on {machine}: {given}", "torch": torch.__version__}

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        tokenizer = self.engine.tokenizer
        if tokenizer.has_chat_template:
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        return tokenizer.encode(prompt, add_special_tokens=not tokenizer.has_chat_template)


def read_prompts(path: Path) -> list[Prompt]:
    """JSON lines with `input_ids`, `prompt`, `question` or `turns`."""
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        entry = json.loads(line)
        texts = (entry.get("prompt"), entry.get("question"), *entry.get("turns", [])[:1])
        prompt = next(filter(None, (entry.get("input_ids"), *texts)), None)
        if prompt is None:
            raise AuditError(f"line {number} of {path} has neither input_ids, prompt, question nor turns")
        prompts.append(prompt)
    return prompts


def question_of(prompt: Prompt, params: Mapping[str, Any]) -> Question:
    """All but the prompt and stop strings fits into parameters of the request; lists and objects go as JSON."""
    inputs = {"text_input" if isinstance(prompt, str) else "input_ids": prompt}
    parameters = {"temperature": 1.0, **params}  # the server's own default is greedy
    if stop := parameters.pop("stop", None):
        inputs["stop_words"] = [stop] if isinstance(stop, str) else list(stop)
    sent = {name: value for name, value in parameters.items() if value is not None}
    as_json = {name: json.dumps(v) if isinstance(v, (list, dict)) else v for name, v in sent.items()}
    return Question(inputs, {**as_json, **FLAGS})


def _answer_of(outputs: Mapping[str, Any]) -> Answer:
    ids = outputs["output_ids"]
    return Answer(ids if isinstance(ids, list) else [ids], outputs["num_spec_steps"])
