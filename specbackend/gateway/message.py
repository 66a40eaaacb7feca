"""A chat's message as it grows: what is thought, what is said, and calls of tools."""

from dataclasses import dataclass
from typing import Any

from specbackend.gateway.protocol import ChatRequest


class Message:
    """Of one answer. `whole` is the message so far, as the body of an answer has it."""

    def __init__(self):
        self.whole: dict[str, Any] = {"role": "assistant", "content": None}
        self._is_new = True

    @property
    def has_tool_calls(self) -> bool:
        return bool(self.whole.get("tool_calls"))

    def push(self, text: str, last: bool = False) -> dict[str, Any]:
        """What is new, as a chunk of a stream says it; nothing may be."""
        step = {"role": "assistant", "content": ""} if self._is_new else {}
        self._is_new = False
        if text:
            step["content"] = text
        self._add("content", step.get("content", ""))
        return step

    def _add(self, name: str, text: str) -> None:
        self.whole[name] = (self.whole[name] or "") + text


@dataclass(frozen=True)
class MessageParsers:
    """How this model marks what it thinks and how it calls tools, under SGLang's names; None: not at all."""

    reasoning: str | None = None
    tool_calls: str | None = None

    def guide(self, request: ChatRequest) -> str | None:
        """The JSON schema of an answer that has to call tools."""
        return None

    def message(self, request: ChatRequest) -> Message:
        return Message()
