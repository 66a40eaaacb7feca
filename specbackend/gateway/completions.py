"""/v1/completions: from the answers to OpenAI's objects."""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from specbackend.gateway.answers import Delta, Usage, ask, join
from specbackend.gateway.inputs import asks_for_nothing, completion_questions, new_id, num_answers
from specbackend.gateway.logprobs import CompletionLogprobs
from specbackend.gateway.protocol import CompletionRequest
from specbackend.gateway.triton import TritonServer
from specbackend.tokenizer import Tokenizer


class Completion:
    """One request and its objects. Reading the request takes a while where prompts are long: not for the event loop."""

    def __init__(self, tokenizer: Tokenizer, request: CompletionRequest):
        self._tokenizer = tokenizer
        self._request = request
        self._questions = completion_questions(tokenizer, request)
        self._asks_for_nothing = asks_for_nothing(request)
        self._n = num_answers(request.sampling())
        self._usage = Usage(self._questions, request.stream_options)
        self._logprobs: dict[int, CompletionLogprobs] = {}  # by the answer's index
        self._head = {
            "id": f"cmpl-{new_id()}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }

    async def chunks(self, server: TritonServer) -> AsyncIterator[dict[str, Any]]:
        async with aclosing(self._deltas(server)) as deltas:
            async for delta in deltas:
                choice = self._choice(delta)
                yield {**self._head, "choices": [choice], **self._usage.in_chunk()}
        if self._usage.ends_stream:
            yield {**self._head, "choices": [], "usage": self._usage.to_dict()}

    async def body(self, server: TritonServer) -> dict[str, Any]:
        choices: dict[int, dict[str, Any]] = {}
        async with aclosing(self._deltas(server)) as deltas:
            async for delta in deltas:
                join(choices.setdefault(delta.index, {}), self._choice(delta))
        return {**self._head, "choices": [choices[index] for index in sorted(choices)], "usage": self._usage.to_dict()}

    async def _deltas(self, server: TritonServer) -> AsyncIterator[Delta]:
        async with aclosing(ask(server, self._questions, self._n)) as deltas:
            async for delta in deltas:
                yield _of_prompt(delta) if self._asks_for_nothing else delta

    def _choice(self, delta: Delta) -> dict[str, Any]:
        self._usage.add(delta)
        first = delta.index not in self._logprobs
        logprobs = self._logprobs.setdefault(delta.index, CompletionLogprobs(self._request.logprobs or 0))
        text, places, alone = delta.text, delta.logprobs, [None] * len(delta.logprobs or ())
        if first and self._request.echo:
            text = self._echo(delta.prompt) + text
            if places is not None:
                prompt_ids = self._questions[delta.prompt].input_ids
                first_text = self._tokenizer.decode(prompt_ids[:1], skip_special_tokens=False)
                places = [*delta.prompt_logprobs, *places]
                alone = [first_text, *alone, *[None] * (len(prompt_ids) - 1)]
        return {
            "index": delta.index,
            "text": text,
            "logprobs": None if places is None else logprobs.add(places, alone),
            "finish_reason": delta.finish_reason,
            **({} if delta.spec_trace is None else {"spec_trace": delta.spec_trace}),
        }

    def _echo(self, prompt: int) -> str:
        """The prompt as the client wrote it."""
        prompts = self._request.prompt
        if isinstance(prompts, str):
            return prompts
        if isinstance(prompts[0], int):
            return self._tokenizer.decode(prompts)
        return prompts[prompt] if isinstance(prompts[prompt], str) else self._tokenizer.decode(prompts[prompt])


def _of_prompt(delta: Delta) -> Delta:
    """What it says of the prompt, without the token that nobody asked for."""
    reason = delta.finish_reason and "length"
    return replace(delta, text="", num_tokens=0, logprobs=delta.logprobs and [], finish_reason=reason, spec_trace=None)
