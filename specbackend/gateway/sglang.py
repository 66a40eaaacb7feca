"""SGLang's own routes, for clients that know it."""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from specbackend.gateway.answers import Delta, ask
from specbackend.gateway.errors import refused
from specbackend.gateway.inputs import llm_parameters, new_id, num_answers, prompt_ids
from specbackend.gateway.logprobs import Place, likeliest, picked
from specbackend.gateway.protocol import GenerateRequest
from specbackend.gateway.triton import Question, TritonServer
from specbackend.tokenizer import Tokenizer

LOGPROB_FIELDS = ("return_logprob", "logprob_start_len", "top_logprobs_num")
MAX_NEW_TOKENS = 128  # if nothing is said


class Generate:
    """One POST /generate and its objects. Reading it takes a while where prompts are long: not for the event loop."""

    def __init__(self, tokenizer: Tokenizer, request: GenerateRequest):
        self._request = request
        prompt = request.input_ids if request.text is None else request.text
        if prompt is None or (request.text is not None and request.input_ids is not None):
            raise refused("text", "send either text or input_ids")
        self._is_list = isinstance(prompt, list) and not isinstance(prompt[0], int)
        prompts = prompt_ids(tokenizer, "input_ids" if request.text is None else "text", prompt)
        rows = [_row(request, index, len(prompts), self._is_list) for index in range(len(prompts))]
        self._sampling = [_sampling(row) for row in rows]
        counts = {num_answers(sampling) for sampling in self._sampling}
        if len(counts) > 1:
            raise refused("sampling_params", "n must be the same for all prompts")
        [self._n] = counts
        self._ids = [row["rid"] or new_id() for row in rows]
        names = {"input_ids": "text"} if request.input_ids is None else {}
        parameters = llm_parameters(
            request.stream, self._n, request.return_spec_trace, more=["return_output_ids", "return_num_input_tokens"]
        )
        self._questions = [
            Question(ids, sampling, parameters, names, rid)
            for ids, sampling, rid in zip(prompts, self._sampling, self._ids, strict=True)
        ]
        self._answers: dict[int, SglangAnswer] = {}

    @property
    def is_list(self) -> bool:
        """Whether the answer is a list, or a stream's objects say whose they are."""
        return self._is_list or self._n > 1

    async def chunks(self, server: TritonServer) -> AsyncIterator[dict[str, Any]]:
        async with aclosing(ask(server, self._questions, self._n)) as deltas:
            async for delta in deltas:
                whole = self._add(delta).to_dict()
                yield {**whole, "index": delta.index} if self.is_list else whole

    async def body(self, server: TritonServer) -> dict[str, Any] | list[dict[str, Any]]:
        async with aclosing(ask(server, self._questions, self._n)) as deltas:
            async for delta in deltas:
                self._add(delta)
        answers = [self._answers[index].to_dict() for index in sorted(self._answers)]
        return answers if self.is_list else answers[0]

    def _add(self, delta: Delta) -> "SglangAnswer":
        if delta.index not in self._answers:
            question = self._questions[delta.prompt]
            self._answers[delta.index] = SglangAnswer(question, self._request.return_text_in_logprobs)
        self._answers[delta.index].add(delta)
        return self._answers[delta.index]


class SglangAnswer:
    """One answer as it grows: SGLang's streams say all of it each time."""

    def __init__(self, question: Question, with_texts: bool):
        self._question = question
        self._with_texts = with_texts
        self._text, self._output_ids, self._num_tokens = "", [], 0
        self._logprobs: dict[str, list] = {}  # by SGLang's names
        self._trace: list[dict] = []
        self._last: Delta | None = None
        self._started = time.monotonic()

    def add(self, delta: Delta) -> None:
        self._text += delta.text
        self._output_ids += delta.token_ids
        self._num_tokens += delta.num_tokens
        if self._question.sampling.get("return_logprob"):
            self._add_logprobs("output", delta.logprobs or [])
            if delta.prompt_logprobs:
                self._add_logprobs("input", delta.prompt_logprobs)
        self._trace += delta.spec_trace or []
        self._last = delta

    def to_dict(self) -> dict[str, Any]:
        return {"text": self._text, "output_ids": self._output_ids, "meta_info": self._meta()}

    def _meta(self) -> dict[str, Any]:
        meta = {
            "id": self._question.request_id,
            "finish_reason": self._finish_reason(),
            "prompt_tokens": len(self._question.input_ids),
            "completion_tokens": self._num_tokens,
            "e2e_latency": time.monotonic() - self._started,
        }
        if counts := self._last.counts:
            meta |= {
                "cached_tokens": counts.cached_tokens,
                "spec_verify_ct": counts.spec_steps,
                "spec_accept_length": counts.acceptance_length,
                "spec_accept_rate": counts.acceptance_rate,
                "spec_num_correct_drafts": counts.accepted_draft_tokens,
                "spec_num_proposed_drafts": counts.draft_tokens,
            }
        if self._question.parameters.get("return_spec_trace"):
            meta["spec_trace"] = self._trace
        return meta | self._logprobs

    def _finish_reason(self) -> dict[str, Any] | None:
        match self._last.finish_reason:
            case None:
                return None
            case "length":
                return {"type": "length", "length": self._num_tokens}
            case reason:
                return {"type": reason}

    def _add_logprobs(self, side: str, places: list[Place | None]) -> None:
        """A place that is None is the first of the prompt: nothing is said before it."""
        top = self._question.sampling.get("top_logprobs_num", 0)
        picks = [
            [None, self._question.input_ids[0], None] if place is None else self._triple(*picked(place))
            for place in places
        ]
        self._logprobs.setdefault(f"{side}_token_logprobs", []).extend(picks)
        if top:
            tops = [place and [self._triple(*each) for each in likeliest(place, top)] for place in places]
            self._logprobs.setdefault(f"{side}_top_logprobs", []).extend(tops)

    def _triple(self, token: int, entry: dict[str, Any]) -> list:
        return [entry["logprob"], token, entry["decoded_token"] if self._with_texts else None]


def _row(request: GenerateRequest, index: int, count: int, is_list: bool) -> dict[str, Any]:
    """What is said of one prompt: a list has an element for each of several."""
    row = {}
    for name in ("sampling_params", "rid", "extra_key", *LOGPROB_FIELDS):
        value = getattr(request, name)
        if isinstance(value, list):
            if not is_list or len(value) != count:
                raise refused(name, f"has {len(value)} elements for {count} prompts")
            value = value[index]
        row[name] = value
    return {**row, "priority": request.priority}


def _sampling(row: dict[str, Any]) -> dict[str, Any]:
    given = row["sampling_params"] or {}
    beside = {name: row[name] for name in ("extra_key", "priority", *LOGPROB_FIELDS) if row[name] is not None}
    if twice := given.keys() & beside.keys():
        raise refused(min(twice), "is said twice: in sampling_params and beside")
    default = {} if "max_tokens" in given else {"max_new_tokens": MAX_NEW_TOKENS}
    return {**default, **given, **beside}
