"""/v1/chat/completions: from the answers to OpenAI's objects."""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from specbackend.gateway.answers import Delta, Usage, ask, join
from specbackend.gateway.inputs import chat_question, check_tools, is_guided, new_id, num_answers
from specbackend.gateway.logprobs import of_chat
from specbackend.gateway.message import Message, MessageParsers, guide
from specbackend.gateway.protocol import ChatRequest
from specbackend.gateway.triton import TritonServer
from specbackend.tokenizer import Tokenizer


class Chat:
    """One request and its objects. Reading the request takes a while where prompts are long: not for the event loop."""

    def __init__(self, tokenizer: Tokenizer, parsers: MessageParsers, request: ChatRequest):
        check_tools(request)
        self._request = request
        self._parsers = parsers
        format = parsers.format(request)
        shows_marks = format is not None and format.has_special_tokens
        question = chat_question(tokenizer, request, guide(request), shows_marks)
        self._is_guided = is_guided(question.sampling)
        self._questions = [question]
        self._n = num_answers(request.sampling())
        self._usage = Usage(self._questions, request.stream_options)
        self._messages: dict[int, Message] = {}  # by the answer's index
        self._id, self._created = f"chatcmpl-{new_id()}", int(time.time())

    async def chunks(self, server: TritonServer) -> AsyncIterator[dict[str, Any]]:
        async with aclosing(self._steps(server)) as steps:
            async for delta, step in steps:
                if step or delta.finish_reason or delta.logprobs or delta.spec_trace:
                    choice = {"index": delta.index, "delta": step, **self._rest(delta)}
                    yield {**self._head("chat.completion.chunk"), "choices": [choice], **self._usage.in_chunk()}
        if self._usage.ends_stream:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage.to_dict()}

    async def body(self, server: TritonServer) -> dict[str, Any]:
        rest: dict[int, dict[str, Any]] = {}
        async with aclosing(self._steps(server)) as steps:
            async for delta, _ in steps:
                join(rest.setdefault(delta.index, {}), self._rest(delta))
        choices = [{"index": i, "message": self._messages[i].whole, **rest[i]} for i in sorted(rest)]
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage.to_dict()}

    async def _steps(self, server: TritonServer) -> AsyncIterator[tuple[Delta, dict[str, Any]]]:
        """Each delta, and what it adds to its message."""
        async with aclosing(ask(server, self._questions, self._n)) as deltas:
            async for delta in deltas:
                self._usage.add(delta)
                message = self._messages.get(delta.index)
                if message is None:
                    message = self._messages[delta.index] = self._parsers.message(self._request, self._is_guided)
                yield delta, message.push(delta.text, last=delta.finish_reason is not None)

    def _rest(self, delta: Delta) -> dict[str, Any]:
        """Of a choice, beside its message."""
        logprobs = of_chat(delta.logprobs, self._request.top_logprobs or 0) if delta.logprobs else None
        reason = delta.finish_reason
        if reason == "stop" and self._messages[delta.index].has_tool_calls:
            reason = "tool_calls"
        trace = {} if delta.spec_trace is None else {"spec_trace": delta.spec_trace}
        return {"logprobs": logprobs, "finish_reason": reason, **trace}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._request.model}
