"""What `Engine.generate` takes and gives, in the words of SGLang's."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from specbackend.errors import InvalidRequest
from specbackend.request import FinishReason, TokenLogprob, Update
from specbackend.sampling_params import RETURN_LOGPROB, SamplingParams, in_our_words
from specbackend.spec_trace import first_tokens
from specbackend.text import TextStream
from specbackend.tokenizer import Tokenizer
from specbackend.words import with_token_ids


@dataclass(frozen=True)
class Question:
    """A prompt, and what is asked of its answers."""

    input_ids: list[int]
    params: SamplingParams
    names: dict[str, str]  # what the caller calls our parameters
    logprob_start: int = 0  # the prompt's logprobs are wanted from here on

    @contextmanager
    def in_callers_words(self) -> Iterator[None]:
        """A refusal names what the caller wrote."""
        with _renamed(self.names):
            yield


def read_questions(
    tokenizer: Tokenizer, prompts: list[list[int]], sampling_params: Any, **logprobs: Any
) -> list[Question]:
    """One for each prompt. The parameters are one for all prompts, or a list. Raises InvalidRequest."""
    rows = _rows(sampling_params or {}, len(prompts))
    columns = {name: _rows(value, len(prompts)) for name, value in logprobs.items()}
    questions = []
    for index, (input_ids, row) in enumerate(zip(prompts, rows, strict=True)):
        said = {name: column[index] for name, column in columns.items() if column[index] != RETURN_LOGPROB[name]}
        questions.append(_read_question(tokenizer, list(input_ids), {**row, **said}))
    return questions


def _read_question(tokenizer: Tokenizer, input_ids: list[int], given: dict) -> Question:
    params = with_token_ids(tokenizer, given)
    start = params.get("logprob_start_len")
    within = isinstance(start, int) and 0 < start < len(input_ids)
    if within:
        params["logprob_start_len"] = 0
    names = {own: name for name, own, _ in in_our_words(params)}
    if given.get("bad_words"):
        names["bad_words_ids"] = "bad_words"
    with _renamed(names):
        return Question(input_ids, SamplingParams.from_dict(params), names, start if within else 0)


@contextmanager
def _renamed(names: dict[str, str]) -> Iterator[None]:
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(names.get(error.field, error.field), error.message) from None


def _rows(value: Any, count: int) -> list:
    return value if isinstance(value, list) else [value] * count


class OfflineAnswer:
    """One answer as it grows."""

    def __init__(self, index: int, question: Question, tokenizer: Tokenizer, with_texts: bool):
        self.index, self.text, self.output_ids, self.stopped = index, "", [], False
        self.question = question
        self._tokenizer = tokenizer
        self._with_texts = with_texts  # of the tokens that have logprobs
        self._stream = TextStream(tokenizer.decode, question.params)
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        self._steps: list[dict] = []
        self._update: Update | None = None
        self._arrival_ns, self._seconds = time.monotonic_ns(), 0.0

    def take(self, update: Update) -> None:
        if update.failure:
            raise InvalidRequest(update.failure.field, update.failure.message)
        piece = self._stream.push(update.token_ids, last=update.finished, has_end_token=update.has_end_token)
        self.text += piece.text
        self.output_ids += piece.token_ids
        self._logprobs += update.logprobs[: len(piece.token_ids)]
        self._prompt_logprobs += update.prompt_logprobs
        steps = first_tokens(update.spec_trace, len(piece.token_ids))
        self._steps += [step.to_dict(self._arrival_ns, self._text_of) for step in steps]
        self.stopped = self.stopped or piece.stopped
        self._update = update
        self._seconds = (time.monotonic_ns() - self._arrival_ns) / 1e9

    def to_dict(self) -> dict:
        update = self._update
        reason = FinishReason.STOP if self.stopped else update.finish_reason
        return {
            "text": self.text,
            "output_ids": list(self.output_ids),
            "meta_info": {
                "index": self.index,
                "prompt_tokens": update.prompt_tokens,
                "completion_tokens": len(self.output_ids),
                "cached_tokens": update.cached_tokens,
                "cached_tokens_details": {
                    "device": update.cached_tokens - update.host_cached_tokens,
                    "host": update.host_cached_tokens,
                },
                "finish_reason": reason.value if reason else None,
                "spec_verify_ct": update.spec_verify_ct,
                "accept_length": update.completion_tokens / max(update.spec_verify_ct, 1),
                "e2e_latency": self._seconds,
                **dict(self._logprob_lists()),
                **({"spec_trace": list(self._steps)} if self.question.params.return_spec_trace else {}),
            },
        }

    def _logprob_lists(self) -> Iterator[tuple[str, list]]:
        """SGLang's names and tuples: (logprob, token id, text or None)."""
        params = self.question.params
        if params.logprobs is not None:
            yield "output_token_logprobs", [self._entry(each.token_id, each.logprob) for each in self._logprobs]
        if params.logprobs:
            yield "output_top_logprobs", [self._top(each) for each in self._logprobs]
        start = self.question.logprob_start
        first, rest = self.question.input_ids[start], self._prompt_logprobs[start:]
        if params.prompt_logprobs is not None:  # nothing is said before the first, so it has none
            entries = [self._entry(each.token_id, each.logprob) for each in rest]
            yield "input_token_logprobs", [self._entry(first, None), *entries]
        if params.prompt_logprobs:
            yield "input_top_logprobs", [None, *map(self._top, rest)]

    def _top(self, each: TokenLogprob) -> list[tuple]:
        return [self._entry(token, logprob) for token, logprob in each.top]

    def _entry(self, token: int, logprob: float | None) -> tuple[float | None, int, str | None]:
        return logprob, token, self._text_of(token) if self._with_texts else None

    def _text_of(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False)
