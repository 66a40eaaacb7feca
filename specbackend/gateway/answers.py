"""The answers to one request of a client: what llm says of each of them, as it comes."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from specbackend.gateway.protocol import StreamOptions
from specbackend.gateway.triton import Question, TritonServer

T = TypeVar("T")
LOGPROBS = list[dict[str, dict[str, Any]] | None]  # for each place {id: {"logprob", "rank", "decoded_token"}}, JSON's
ALWAYS_ASKED = ("return_finish_reason", "return_num_output_tokens", "return_perf_metrics")


@dataclass(frozen=True)
class Counts:
    """Of a finished answer."""

    cached_tokens: int = 0
    accepted_draft_tokens: int = 0
    draft_tokens: int = 0
    spec_steps: int = 0
    acceptance_length: float = 0.0
    acceptance_rate: float = 0.0


@dataclass(frozen=True)
class Delta:
    """What one response adds to one answer."""

    prompt: int  # which of the request's
    index: int  # of the answer, over all prompts
    text: str
    num_tokens: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: LOGPROBS | None = None
    prompt_logprobs: LOGPROBS | None = None
    finish_reason: str | None = None
    counts: Counts | None = None  # with the finish reason
    spec_trace: list[dict] | None = None


class Usage:
    """Tokens of a request, counted as its deltas come."""

    def __init__(self, questions: Sequence[Question], options: StreamOptions | None):
        self._options = options or StreamOptions()
        self.prompt_tokens = sum(len(question.input_ids) for question in questions)
        self.completion_tokens = self.accepted = self.rejected = 0
        self._cached: dict[int, int] = {}  # by prompt: of its first answer, as the others find that one's prompt

    def add(self, delta: Delta) -> None:
        self.completion_tokens += delta.num_tokens
        if delta.counts:
            self._cached[delta.prompt] = min(delta.counts.cached_tokens, self._cached.get(delta.prompt, 1 << 62))
            self.accepted += delta.counts.accepted_draft_tokens
            self.rejected += max(delta.counts.draft_tokens - delta.counts.accepted_draft_tokens, 0)

    @property
    def ends_stream(self) -> bool:
        return bool(self._options.include_usage)

    def in_chunk(self) -> dict[str, Any]:
        """What a chunk with choices says of it."""
        if not self.ends_stream:
            return {}
        return {"usage": self.to_dict() if self._options.continuous_usage_stats else None}

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
            "completion_tokens_details": {
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.rejected,
            },
        }


async def ask(server: TritonServer, questions: Sequence[Question], n: int = 1) -> AsyncIterator[Delta]:
    """All prompts at once, `n` answers to each. The first error ends all of them."""
    streams = [server.generate(question) for question in questions]
    async with aclosing(_merged(streams)) as responses:
        async for prompt, outputs in responses:
            yield _read_delta(prompt, n, outputs)


def join(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Add what a stream would say next of an answer to what it has said."""
    for name, value in part.items():
        known = whole.get(name)
        if isinstance(value, dict) and known is not None:
            join(known, value)
        elif isinstance(value, str | list) and name != "finish_reason" and known is not None:
            whole[name] = known + value
        elif value is not None or name not in whole:
            whole[name] = value


def _read_delta(prompt: int, n: int, outputs: dict[str, Any]) -> Delta:
    finished = "finish_reason" in outputs
    return Delta(
        prompt=prompt,
        index=prompt * n + outputs.get("sequence_index", 0),
        text=outputs["text_output"],
        num_tokens=outputs["num_output_tokens"],
        token_ids=_as_list(outputs.get("output_ids", [])),
        logprobs=_read_json(outputs.get("logprobs")),
        prompt_logprobs=_read_json(outputs.get("prompt_logprobs")),
        finish_reason=outputs.get("finish_reason"),
        counts=_read_counts(outputs) if finished else None,
        spec_trace=_read_json(outputs.get("spec_trace")),
    )


def _read_counts(outputs: dict[str, Any]) -> Counts:
    return Counts(
        cached_tokens=outputs["num_cached_tokens"],
        accepted_draft_tokens=outputs["total_accepted_draft_tokens"],
        draft_tokens=outputs["total_draft_tokens"],
        spec_steps=outputs["num_spec_steps"],
        acceptance_length=outputs["acceptance_length"],
        acceptance_rate=outputs["acceptance_rate"],
    )


def _read_json(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


async def _merged(streams: Sequence[AsyncIterator[T]]) -> AsyncIterator[tuple[int, T]]:
    """What all streams bring, as it comes, each with its stream's number. All end with this one, or with an error."""
    arrived: asyncio.Queue = asyncio.Queue()

    async def drain(number: int, stream: AsyncIterator[T]) -> None:
        async with aclosing(stream):
            async for item in stream:
                arrived.put_nowait((number, item))

    tasks = [asyncio.ensure_future(drain(*each)) for each in enumerate(streams)]
    for task in tasks:
        task.add_done_callback(arrived.put_nowait)
    try:
        for _ in tasks:
            while not isinstance(item := await arrived.get(), asyncio.Future):
                yield item
            item.result()  # raises what ended it
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
