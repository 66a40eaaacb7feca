"""A chat's message as it grows: what is thought, what is said, and calls of tools."""

import math
from dataclasses import dataclass
from typing import Any

from specbackend.errors import ConfigError
from specbackend.gateway.errors import refused
from specbackend.gateway.protocol import ChatRequest, NamedTool
from specbackend.gateway.reasoning import ReasoningDelta, ReasoningParser
from specbackend.gateway.tool_parsers import (
    GUIDED,
    TOOL_CALL_PARSERS,
    Format,
    MessageDelta,
    ToolCallDelta,
    ToolCallParser,
    tool_choice_schema,
)


class Message:
    """Of one answer. `whole` is the message so far, as the body of an answer has it."""

    def __init__(self, reasoning: ReasoningParser | None = None, tools: ToolCallParser | None = None):
        self.whole: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        self._reasoning, self._tools = reasoning, tools
        self._is_new = True

    @property
    def has_tool_calls(self) -> bool:
        return "tool_calls" in self.whole

    def push(self, text: str, last: bool = False) -> dict[str, Any]:
        """What is new, as a chunk of a stream says it; nothing may be."""
        thought = self._told_apart(text, last)
        said = self._parsed(thought.content, last)
        step = {"role": "assistant", "content": ""} if self._is_new else {}
        self._is_new = False
        for name, piece in (("reasoning_content", thought.reasoning_content), ("content", said.content)):
            if piece:
                step[name] = piece
                self.whole[name] = (self.whole.get(name) or "") + piece
        if said.tool_calls:
            step["tool_calls"] = [self._take_call(call) for call in said.tool_calls]
        elif last and not self.has_tool_calls:
            self.whole["content"] = self.whole["content"] or ""
        return step

    def _told_apart(self, text: str, last: bool) -> ReasoningDelta:
        if self._reasoning is None:
            return ReasoningDelta(content=text)
        delta = self._reasoning.push(text)
        if not last:
            return delta
        rest = self._reasoning.finish()
        return ReasoningDelta(delta.reasoning_content + rest.reasoning_content, delta.content + rest.content)

    def _parsed(self, text: str, last: bool) -> MessageDelta:
        if self._tools is None:
            return MessageDelta(text)
        delta = self._tools.push(text)
        if not last:
            return delta
        rest = self._tools.finish()
        return MessageDelta(delta.content + rest.content, delta.tool_calls + rest.tool_calls)

    def _take_call(self, delta: ToolCallDelta) -> dict[str, Any]:
        calls = self.whole.setdefault("tool_calls", [])
        if delta.name is None:
            calls[delta.index]["function"]["arguments"] += delta.arguments
            return {"index": delta.index, "function": {"arguments": delta.arguments}}
        call = {"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": delta.arguments}}
        calls.append({**call, "function": dict(call["function"])})
        return {"index": delta.index, **call}


@dataclass(frozen=True)
class MessageParsers:
    """How this model marks what it thinks and how it calls tools, under SGLang's names; None: not at all.

    Raises ConfigError for names that are unknown.
    """

    reasoning: str | None = None
    tool_calls: str | None = None

    def __post_init__(self) -> None:
        if self.reasoning is not None:
            ReasoningParser(self.reasoning)
        if self.tool_calls not in (None, *TOOL_CALL_PARSERS):
            known = ", ".join(TOOL_CALL_PARSERS)
            raise ConfigError(f"tool_call_parser: must be one of {known}, got {self.tool_calls!r}")

    def format(self, request: ChatRequest) -> Format | None:
        """In which calls of tools are looked for; None: in none. Raises ApiError for calls that nobody would see."""
        if must_call(request):
            return GUIDED
        if not request.tools or request.tool_choice == "none":
            return None
        if self.tool_calls is None:
            raise refused("tool_choice", "auto needs the gateway's --tool-call-parser: none, required or a tool do not")
        return TOOL_CALL_PARSERS[self.tool_calls]

    def message(self, request: ChatRequest, is_guided: bool) -> Message:
        """An empty one. What is guided has its form from the first token on, so it does not begin within a thought."""
        thinks = self.reasoning is not None and request.separate_reasoning is not False
        reasoning = ReasoningParser(self.reasoning, may_begin_within=not is_guided) if thinks else None
        format = self.format(request)
        most_calls = 1 if request.parallel_tool_calls is False else math.inf
        return Message(reasoning, format and ToolCallParser(format, most_calls))


def must_call(request: ChatRequest) -> bool:
    return request.tool_choice == "required" or isinstance(request.tool_choice, NamedTool)


def guide(request: ChatRequest) -> str | None:
    """The JSON schema of an answer that has to call tools."""
    if not must_call(request):
        return None
    name = request.tool_choice.function.name if isinstance(request.tool_choice, NamedTool) else None
    tools = [tool.model_dump(exclude_unset=True) for tool in request.tools]
    return tool_choice_schema(tools, name, request.parallel_tool_calls is not False)
