"""One call on its way: from the engine's updates to the outputs of its responses. Knows neither sockets nor Triton."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

from specbackend.request import FinishReason, TokenLogprob, Update
from specbackend.sampling_params import SamplingParams
from specbackend.serving.calls import Call
from specbackend.serving.faces import LLM, Face
from specbackend.spec_trace import LEAST_LOGPROB, StepTrace, first_tokens
from specbackend.text import Piece, TextStream

Outputs = dict[str, object]  # by name
OF_THE_CALL = ("num_input_tokens",)  # the same for each of its answers, so one value is sent for all
NULL = "null"  # JSON's


@dataclass(slots=True)
class Unsent:
    """What the next response will carry."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    # as JSON, if asked for: written step by step it holds up nobody, whole it would be seconds of the response thread
    logprob_texts: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    num_updates: int = 0
    first: bool = False  # in front of it, nothing was sent

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.num_updates += 1


class Maker(NamedTuple):
    """How an output comes about; looked up once, as there may be a response for every token."""

    name: str
    make: "Callable[[Answer, Unsent], object] | None"  # None: with the last outputs only
    until_end: object  # its value before, and where there is none; None: it is left out


class TokenTexts:
    """What single tokens look like. Remembered, for every token may be named over and over."""

    def __init__(self, decode: Callable[..., str]):
        self.text = lru_cache(1 << 17)(lambda token: decode([token], skip_special_tokens=False))

    def to_json(self, each: TokenLogprob) -> str:
        """As the vLLM backend has it: the token at a place and the likeliest ones there."""
        ranked = {token: (logprob, rank) for rank, (token, logprob) in enumerate(each.top, start=1)}
        ranked = {each.token_id: (each.logprob, each.rank), **ranked}
        entries = {
            token: {"logprob": max(logprob, LEAST_LOGPROB), "rank": rank, "decoded_token": self.text(token)}
            for token, (logprob, rank) in ranked.items()
        }
        return json.dumps(entries)


@dataclass(frozen=True)
class Server:
    """What is the same for all calls."""

    decode: Callable[..., str]  # takes token ids and skip_special_tokens
    stream_interval: int = 1
    face: Face = LLM

    @cached_property
    def texts(self) -> TokenTexts:
        return TokenTexts(self.decode)


@dataclass(frozen=True)
class AnswerRecord:
    """What became of one answer. Times are since the call arrived."""

    finish_reason: FinishReason | None  # None: it goes on
    prompt_tokens: int
    completion_tokens: int
    first_token_seconds: float
    seconds: float  # to the last token

    @property
    def seconds_per_token(self) -> float | None:
        """After the first token."""
        more = self.completion_tokens - 1
        return (self.seconds - self.first_token_seconds) / more if more > 0 else None


class Answer:
    """One answer to a call as it grows. `finish_reason` is set with its last outputs."""

    def __init__(self, index: int, call: Call, server: Server):
        self.index = index
        self.params = call.params.of_answer(index)
        self.finish_reason: FinishReason | None = None
        self._call = call
        self._server = server
        self._text = TextStream(server.decode, self.params, call.input_ids if call.echo else ())
        self._unsent = Unsent(text=call.echo, first=True)
        self._makers = [self._maker(name) for name in call.outputs]
        self._update = Update("", [], prompt_tokens=len(call.input_ids))
        self._prompt_logprobs: list[TokenLogprob] = []  # of all but the first
        self._cum_logprob = 0.0
        self._first_token_ns = self._last_token_ns = 0

    def advance(self, update: Update) -> Outputs | None:
        """Take an update. Returns the outputs to send now, None if there is nothing to send yet."""
        self._note_time()
        self._update = update
        piece = self._text.push(update.token_ids, last=update.finished, has_end_token=update.has_end_token)
        self._unsent.add(piece)
        if update.logprobs or update.prompt_logprobs or update.spec_trace:
            self._take_details(update, len(piece.token_ids))
        self.finish_reason = FinishReason.STOP if piece.stopped else update.finish_reason
        if self.finish_reason or self._is_due():
            return self._take_outputs()
        return None

    def _take_details(self, update: Update, num_tokens: int) -> None:
        """Of so many tokens: a stop string may cut off the others."""
        self._prompt_logprobs += update.prompt_logprobs
        self._unsent.logprobs += update.logprobs[:num_tokens]
        if "logprobs" in self._call.outputs:
            self._unsent.logprob_texts += map(self._server.texts.to_json, update.logprobs[:num_tokens])
        self._unsent.steps += map(self._step_text, first_tokens(update.spec_trace, num_tokens))

    def abort(self) -> Outputs:
        """End here; returns the last outputs."""
        self.finish_reason = FinishReason.ABORT
        self._unsent.add(self._text.push([], last=True))
        return self._take_outputs()

    def record(self) -> AnswerRecord:
        first, last = ((ns - self._call.arrival_ns) / 1e9 for ns in (self._first_token_ns, self._last_token_ns))
        update = self._update
        return AnswerRecord(self.finish_reason, update.prompt_tokens, update.completion_tokens, first, last)

    def _is_due(self) -> bool:
        interval = 1 if self._unsent.first else self._server.stream_interval
        return self._call.stream and bool(self._unsent.text) and self._unsent.num_updates >= interval

    def _note_time(self) -> None:
        self._last_token_ns = time.monotonic_ns()
        self._first_token_ns = self._first_token_ns or self._last_token_ns

    def _take_outputs(self) -> Outputs:
        unsent, self._unsent = self._unsent, Unsent()
        self._cum_logprob += sum(each.logprob for each in unsent.logprobs)
        return self._outputs(unsent)

    def without_news(self) -> Outputs:
        """Its place in a response that is about another answer."""
        return self._outputs(Unsent())

    def _maker(self, name: str) -> Maker:
        spec = self._server.face.output[name]
        make = make_null if name in self._call.nulls else NEWS.get(name)
        return Maker(name, make, spec.until_end)

    def _outputs(self, unsent: Unsent) -> Outputs:
        at_end = self._at_end() if self.finish_reason else {}
        outputs = {}
        for name, make, until_end in self._makers:
            value = make(self, unsent) if make else at_end.get(name)
            value = until_end if value is None else value
            if value is not None:
                outputs[name] = value
        return outputs

    def _at_end(self) -> Outputs:
        reasons = {"finish_reason": self.finish_reason.value, "stop_reason": self._stop_reason()}
        return {**reasons, **self._perf_metrics()}

    def num_prompt_tokens(self, unsent: Unsent) -> int:
        return len(self._call.input_ids)

    def cum_logprob(self, unsent: Unsent) -> float:
        """Of all tokens so far."""
        return self._cum_logprob

    def prompt_logprobs(self, unsent: Unsent) -> str | None:
        """With the first response."""
        return json_list([NULL, *map(self._server.texts.to_json, self._prompt_logprobs)]) if unsent.first else None

    def _step_text(self, step: StepTrace) -> str:
        return json.dumps(step.to_dict(self._call.arrival_ns, self._server.texts.text))

    def _stop_reason(self) -> str:
        """The stop string or the token of stop_token_ids that ended the text; an eos is none, as in TensorRT-LLM."""
        if self._text.stop_string is not None:
            return self._text.stop_string
        last = self._update.token_ids[-1:] if self._update.has_end_token else []
        return str(last[0]) if last and last[0] in self.params.stop_token_ids else "None"

    def _perf_metrics(self) -> Outputs:
        prompt, cached = self._update.prompt_tokens, self._update.cached_tokens
        tokens, steps, drafted = (
            self._update.completion_tokens,
            self._update.spec_verify_ct,
            self._update.draft_tokens,
        )
        accepted = sum(length * count for length, count in enumerate(self._update.accept_counts))
        return {
            "num_cached_tokens": cached,
            **dict.fromkeys(("kv_cache_reused_blocks", "kv_cache_reused_block"), cached),
            "kv_cache_missed_block": prompt - cached,
            "kv_cache_hit_rate": cached / max(prompt, 1),
            "kv_cache_alloc_new_blocks": prompt - cached + tokens,
            "kv_cache_alloc_total_blocks": prompt + tokens,
            "acceptance_length": tokens / max(steps, 1),
            "acceptance_rate": accepted / max(drafted, 1),
            "total_accepted_draft_tokens": accepted,
            "total_draft_tokens": drafted,
            "num_spec_steps": steps,
            "acceptance_histogram": self._update.accept_counts,
            "arrival_time_ns": self._call.arrival_ns,
            "first_scheduled_time_ns": self._update.first_scheduled_ns,
            "first_token_time_ns": self._first_token_ns,
            "last_token_time_ns": self._last_token_ns,
        }


def make_null(answer: Answer, unsent: Unsent) -> str:
    return NULL


# Outputs that may be in every response. Only those that are asked for are made: a response costs some 100 us in all.
NEWS: dict[str, Callable[[Answer, Unsent], object]] = {
    "text_output": lambda answer, unsent: unsent.text,
    "output_ids": lambda answer, unsent: unsent.token_ids,
    "num_input_tokens": Answer.num_prompt_tokens,
    "num_output_tokens": lambda answer, unsent: len(unsent.token_ids),
    "sequence_length": lambda answer, unsent: len(unsent.token_ids),
    "sequence_index": lambda answer, unsent: answer.index,
    "batch_index": lambda answer, unsent: 0,
    "output_log_probs": lambda answer, unsent: [[each.logprob for each in unsent.logprobs]],
    "cum_log_probs": Answer.cum_logprob,
    "cumulative_logprob": Answer.cum_logprob,
    "logprobs": lambda answer, unsent: json_list(unsent.logprob_texts),
    "prompt_logprobs": Answer.prompt_logprobs,
    "spec_trace": lambda answer, unsent: json_list(unsent.steps),
}


class Generation:
    """All answers to one call. Each is a request to the engine, whose id begins with the call's.

    With `stream` a response is about one answer, else one response has them all, side by side, as in the streams of
    faces that want it so.
    """

    def __init__(self, call_id: str, call: Call, server: Server):
        self.call_id = call_id  # our own: clients' ids may collide
        self.call = call
        self._face = server.face
        self._answers = {f"{call_id}.{index}": Answer(index, call, server) for index in range(call.params.n)}
        self._finished: dict[int, Outputs] = {}  # without `stream`: the outputs, by the answer's index

    @staticmethod
    def call_id_of(request_id: str) -> str:
        return request_id.partition(".")[0]

    @property
    def open(self) -> dict[str, SamplingParams]:
        """The requests to the engine that are not answered to the end, by id."""
        return {
            request_id: self._answers[request_id].params for request_id in self._answers if self.is_open(request_id)
        }

    @property
    def is_over(self) -> bool:
        return not any(map(self.is_open, self._answers))

    def is_open(self, request_id: str) -> bool:
        return self._answers[request_id].finish_reason is None

    def advance(self, update: Update) -> Outputs | None:
        """Take an update of an open request. Returns the outputs to send now; those of the last are the call's last."""
        answer = self._answers[update.request_id]
        outputs = answer.advance(update)
        return outputs if outputs is None else self._gather(answer.index, outputs)

    def record(self, request_id: str) -> AnswerRecord:
        return self._answers[request_id].record()

    def abort(self) -> list[Outputs]:
        """End here; returns the outputs of the last responses."""
        left = [self._answers[request_id] for request_id in self.open]
        responses = [self._gather(answer.index, answer.abort()) for answer in left]
        return [outputs for outputs in responses if outputs is not None]

    def _gather(self, index: int, outputs: Outputs) -> Outputs | None:
        """Without `stream`, keep an answer's outputs until all are there."""
        if len(self._answers) == 1 or (self.call.stream and not self._face.side_by_side):
            return outputs
        if self.call.stream:
            answers = self._answers.values()
            return _side_by_side([outputs if each.index == index else each.without_news() for each in answers])
        self._finished[index] = outputs
        return _side_by_side([self._finished[index] for index in range(len(self._answers))]) if self.is_over else None


def json_list(texts: list[str]) -> str:
    """Of values that are JSON already."""
    return f"[{', '.join(texts)}]"


def _side_by_side(rows: list[Outputs]) -> Outputs:
    """The outputs of all answers in one response: those that all of them have."""
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: rows[0][name] if name in OF_THE_CALL else _column([row[name] for row in rows]) for name in names}


def _column(values: list) -> list:
    """One value of each answer. Counts may be lists, which an answer that has not begun does not have."""
    if not isinstance(values[0], list):
        return values
    longest = max(map(len, values))
    return [value + [0] * (longest - len(value)) for value in values]
