"""Conversations: OpenAI's messages as a client sends them, checked, and rendered by the checkpoint's chat template."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from specbackend.errors import InvalidRequest
from specbackend.serving.errors import Unsupported
from specbackend.tokenizer import Tokenizer

# A template's own variables, and Python's for it; the others are for chat_template_kwargs to set.
RESERVED = ("self", "messages", "tools", "add_generation_prompt", "continue_final_message")


def render_json_chat(
    tokenizer: Tokenizer,
    messages: str,
    tools: str | None = None,
    chat_template_kwargs: str | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | None = None,
) -> str:
    """`render_chat` of JSON texts, as Triton's tensors hold them."""
    return render_chat(
        tokenizer,
        _read("messages", messages, list, "a list of messages"),
        _read("tools", tools or "[]", list, "a list of tools"),
        _read("chat_template_kwargs", chat_template_kwargs or "{}", dict, "an object"),
        add_generation_prompt,
        continue_final_message,
    )


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Any],
    tools: Sequence[Any],
    chat_template_kwargs: Mapping[str, Any],
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | None = None,
) -> str:
    """The prompt, which already holds its special tokens. The first three hold JSON's values.

    Raises InvalidRequest and Unsupported, naming the argument at fault: `messages`, if it is the template that objects.
    """
    conversation = check_messages(messages)
    if not all(isinstance(tool, dict) for tool in tools):
        raise InvalidRequest("tools", "must be objects")
    if reserved := sorted(chat_template_kwargs.keys() & set(RESERVED)):
        raise InvalidRequest("chat_template_kwargs", f"cannot set {', '.join(reserved)}")
    if continue_final_message and add_generation_prompt:
        raise InvalidRequest("continue_final_message", "contradicts add_generation_prompt: one answer or the other")
    begins_answer = not continue_final_message if add_generation_prompt is None else add_generation_prompt
    try:
        return tokenizer.apply_chat_template(
            conversation, list(tools) or None, begins_answer, bool(continue_final_message), **chat_template_kwargs
        )
    except Exception as error:  # the template is the checkpoint's own program
        raise InvalidRequest("messages", f"cannot be put into the chat template: {error}") from error


def check_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """OpenAI's messages, as chat templates want them: content is text, a tool call's arguments an object."""
    if not messages:
        raise InvalidRequest("messages", "is empty")
    return [_message(f"message {index}", message) for index, message in enumerate(messages)]


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InvalidRequest("messages", f"{where} must be an object with a role, which is a string")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise InvalidRequest("messages", f"{where}: tool_calls must be a list")
    if message.get("content") is None and not calls:
        raise InvalidRequest("messages", f"{where} has no content")
    checked = {**message, "content": _text(where, message.get("content") or "")}
    return {**checked, "tool_calls": [_tool_call(where, call) for call in calls]} if calls else checked


def _text(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest("messages", f"{where}: content must be a string or a list of text parts")
    return "\n".join(_part_text(where, part) for part in content)


def _part_text(where: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind in (None, "text"):
        raise InvalidRequest("messages", f"{where}: a text part must have a type and a text")
    raise Unsupported("messages", f"{where} has a part of type {kind}, only text is supported")


def _tool_call(where: str, call: Any) -> dict[str, Any]:
    """Clients send a call's arguments as they got them, as JSON text; templates write them as JSON themselves.

    What the model broke off is no JSON: the template gets the text.
    """
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest("messages", f"{where}: a tool call must have a function with a name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str) and _is_json(arguments):
        arguments = _read("messages", arguments, dict, f"{where}: a tool call's arguments, an object")
    return {**call, "function": {**function, "arguments": arguments}}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _read(name: str, text: str, kind: type, words: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(name, f"must be JSON of {words}: {error}") from None
    if not isinstance(value, kind):
        raise InvalidRequest(name, f"must be JSON of {words}")
    return value
