"""Calls of tools in what models write, as OpenAI streams them, and the schema that makes a model write nothing else.

An answer is content and calls:  begin opening OBJECT separator OBJECT ... end  with OBJECT {"name", "arguments"}.
"""

import json
import math
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from specbackend.text import partial_length

ARGUMENTS = ("arguments", "parameters")
KEYS = ("name", *ARGUMENTS, "type", "id")
FIRST_KEY = re.compile(r'\{\s*(?:\Z|"(?P<key>[^"]*)(?P<quote>"?))')
STRING = r'"(?:[^"\\]|\\.)*"'
# A call up to its arguments, in the order in which models write it: from here on they can be passed on as they come.
HEADER = re.compile(
    rf'\{{\s*(?:"(?:type|id)"\s*:\s*{STRING}\s*,\s*)*"name"\s*:\s*(?P<name>{STRING})\s*,'
    rf'\s*"(?:{"|".join(ARGUMENTS)})"\s*:\s*(?=\{{)'
)


@dataclass(frozen=True)
class Format:
    """How a family of models writes calls."""

    begin: str = ""
    opening: str = ""
    separator: str = ""
    end: str = ""
    is_bare: bool = False  # calls may also begin the answer, without `begin`
    has_special_tokens: bool = False  # `begin` is one: it is seen with skip_special_tokens=False only
    make_id: Callable[[], str] = field(default=lambda: f"call_{secrets.token_hex(12)}", repr=False)


HERMES = Format("<tool_call>", end="</tool_call>")
LLAMA3 = Format("<|python_tag|>", separator=";", is_bare=True, has_special_tokens=True)
MISTRAL_ID = 9  # characters: its chat template takes no other
MISTRAL = Format(
    "[TOOL_CALLS]", "[", ",", "]", has_special_tokens=True, make_id=lambda: secrets.token_hex(MISTRAL_ID)[:MISTRAL_ID]
)
TOOL_CALL_PARSERS = {"hermes": HERMES, "qwen25": HERMES, "llama3": LLAMA3, "mistral": MISTRAL}  # SGLang's names
GUIDED = Format(opening="[", separator=",", end="]", is_bare=True)  # what `tool_choice_schema` makes any model write


@dataclass(frozen=True)
class ToolCallDelta:
    """What is new of one call. The first of a call has its id and name."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""  # a piece of JSON


@dataclass(frozen=True)
class MessageDelta:
    """What is new of a message."""

    content: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class ToolCallParser:
    """Takes the text of one answer in pieces; how they are cut makes no difference to what comes of it.

    What only looks like a call is content, as soon as it can be none. Once its name and the brace of its arguments are
    there it is one, and its arguments are passed on as the model writes them. Spaces around calls are dropped, and so
    are calls beyond `most_calls`.
    """

    def __init__(self, format: Format, most_calls: float = math.inf):
        self._format = format
        self._most_calls = most_calls
        self._held = ""  # not decided yet
        self._opened = ""  # in front of it: the marks of a call that may be none
        self._opening = format.opening  # what is missing before an object
        self._num_calls = 0
        self._braces = Braces()
        self._step: Callable[[bool], bool] = self._start if format.is_bare else self._content
        self._new_content: list[str] = []
        self._new_calls: list[ToolCallDelta] = []

    def push(self, text: str) -> MessageDelta:
        self._held += text
        return self._advance(last=False)

    def finish(self) -> MessageDelta:
        """The answer is over: nothing is held back any more."""
        return self._advance(last=True)

    def _advance(self, last: bool) -> MessageDelta:
        while self._step(last):  # a step says whether the next can go on
            pass
        calls = tuple(call for call in self._new_calls if call.index < self._most_calls)
        delta = MessageDelta("".join(self._new_content), calls)
        self._new_content, self._new_calls = [], []
        return delta

    def _start(self, last: bool) -> bool:
        text = self._held.lstrip()
        if not text and not last:
            return False
        is_call = text.startswith(self._opening or "{")
        return self._go_on(self._before_call if is_call else self._content)

    def _content(self, last: bool) -> bool:
        begin = self._format.begin
        text, mark, rest = self._held.partition(begin) if begin else (self._held, "", "")
        if last and not mark:
            is_text = text.strip() or not self._num_calls
            self._new_content.append(text if is_text else "")
            self._held = ""
            return False
        known = text[: len(text) - (0 if mark else partial_length(text, [begin]))].rstrip()
        self._new_content.append(known)
        self._held = text[len(known) :] + mark + rest
        if not mark:
            return False
        self._open(len(self._held) - len(rest))
        self._opening = self._format.opening
        return self._go_on(self._before_call)

    def _before_call(self, last: bool) -> bool:
        if match := re.match(rf"\s*{re.escape(self._opening)}\s*(?=\{{)", self._held):
            self._open(match.end())
            self._braces = Braces()
            return self._go_on(self._in_call)
        is_partial = self._opening.startswith(self._held.strip())
        return self._give_back() if last or not is_partial else False

    def _in_call(self, last: bool) -> bool:
        end = self._braces.end_in(self._held)
        header = HEADER.match(self._held)
        if header and isinstance(name := _loads(header["name"]), str):
            self._begin_call(name, header.end())
            self._braces = Braces()
            return self._go_on(self._in_arguments)
        if not _may_be_call(self._held):
            return self._give_back()
        if end is None and not last:
            return False
        call = _loads(self._held[:end])
        name, arguments = _name_and_arguments(call) if isinstance(call, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(arguments, (dict, str)):
            return self._give_back()
        self._begin_call(name, end)
        self._argue(arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
        return self._go_on(self._after_call)

    def _in_arguments(self, last: bool) -> bool:
        end = self._braces.end_in(self._held)
        self._argue(self._held[:end])
        self._held = "" if end is None else self._held[end:]
        if end is None:
            self._braces.text_is_taken()
            return False
        self._braces = Braces(depth=1)
        return self._go_on(self._behind_arguments)

    def _behind_arguments(self, last: bool) -> bool:
        """What else the object has is nobody's; where it has no end, what follows is content."""
        text = self._held.lstrip()
        is_open = not text or text.startswith((",", "}"))
        end = self._braces.end_in(self._held) if is_open else None
        if is_open and end is None and not last:
            return False
        self._held = self._held[end or 0 :]
        return self._go_on(self._after_call)

    def _after_call(self, last: bool) -> bool:
        separator, end = self._format.separator, self._format.end
        text = self._held.lstrip()
        skipped = len(self._held) - len(text)
        if separator and text.startswith(separator):
            self._open(skipped + len(separator))
            self._opening = ""
            return self._go_on(self._before_call)
        if end and text.startswith(end):
            self._held = text.removeprefix(end)
        elif not last and any(mark.startswith(text) for mark in (separator, end) if mark):
            return False
        return self._go_on(self._content)

    def _go_on(self, step: Callable[[bool], bool]) -> bool:
        self._step = step
        return True

    def _open(self, length: int) -> None:
        """The first characters that are held are marks, unless there is no call."""
        self._opened, self._held = self._opened + self._held[:length], self._held[length:]

    def _give_back(self) -> bool:
        self._new_content.append(self._opened)
        self._opened = ""
        return self._go_on(self._content)

    def _begin_call(self, name: str, length: int) -> None:
        """There is a call; the first characters that are held are done with."""
        self._new_calls.append(ToolCallDelta(self._num_calls, self._format.make_id(), name))
        self._num_calls += 1
        self._opened, self._held = "", self._held[length:]

    def _argue(self, piece: str) -> None:
        """The call that was begun last goes on."""
        index = self._num_calls - 1
        is_new = bool(self._new_calls) and self._new_calls[-1].index == index
        if piece:
            known = self._new_calls.pop() if is_new else ToolCallDelta(index)
            self._new_calls.append(replace(known, arguments=known.arguments + piece))


class Braces:
    """Finds the end of a JSON object in text that grows. `depth`: of the braces that are open in front of it."""

    def __init__(self, depth: int = 0):
        self._depth = depth
        self._read = 0  # characters
        self._in_string = self._is_escaped = False

    def end_in(self, text: str) -> int | None:
        """Where the object is over, None if it is not yet. `text` is the one of last time, and more."""
        for place in range(self._read, len(text)):
            self._take(text[place])
            if self._depth == 0 and text[place] == "}":
                return place + 1
        self._read = len(text)
        return None

    def text_is_taken(self) -> None:
        """The next text begins behind the last."""
        self._read = 0

    def _take(self, char: str) -> None:
        if self._in_string:
            self._in_string = self._is_escaped or char != '"'
            self._is_escaped = char == "\\" and not self._is_escaped
        elif char == '"':
            self._in_string = True
        else:
            self._depth += (char == "{") - (char == "}")


def _may_be_call(text: str) -> bool:
    match = FIRST_KEY.match(text)
    if match is None:
        return False
    key = match["key"] or ""
    return key in KEYS if match["quote"] else any(each.startswith(key) for each in KEYS)


def _loads(text: str) -> Any:
    """None for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _name_and_arguments(call: dict) -> tuple[Any, Any]:
    return call.get("name"), next((call[key] for key in ARGUMENTS if key in call), None)


def tool_choice_schema(
    tools: Sequence[dict[str, Any]], name: str | None = None, parallel_tool_calls: bool = True
) -> str:
    """The JSON schema of an answer that calls tools and says nothing else; `GUIDED` is its format.

    tools: JSON objects {"type": "function", "function": {"name", "parameters"}}.
    name: the one tool to call, once; None: any, at least one.
    """
    functions = [tool["function"] for tool in tools if name in (None, tool["function"]["name"])]
    calls = [_call_schema(function, f"#/items/anyOf/{index}") for index, function in enumerate(functions)]
    most = {} if name is None and parallel_tool_calls else {"maxItems": 1}
    return json.dumps({"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}})


def _call_schema(function: dict[str, Any], place: str) -> dict[str, Any]:
    parameters = function.get("parameters") or {"properties": {}, "additionalProperties": False}
    parameters = _with_references(parameters, f"{place}/properties/parameters")
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "parameters": {**parameters, "type": "object"}},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _with_references(schema: Any, place: str) -> Any:
    """What it refers to within itself lies at `place` now."""
    if isinstance(schema, list):
        return [_with_references(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _with_references(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference.removeprefix("#")
    return moved
