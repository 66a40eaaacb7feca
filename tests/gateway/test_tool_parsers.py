"""Calls of tools: read from each family's answers however they are cut, and forced by a schema."""

import json

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specbackend.gateway.tool_parsers import (
    GUIDED,
    HERMES,
    LLAMA3,
    MISTRAL,
    TOOL_CALL_PARSERS,
    Format,
    MessageDelta,
    ToolCallParser,
    tool_choice_schema,
)
from specbackend.grammar import GrammarCompiler
from tests.fakes import END_ID
from tests.grammar.texts import ids_of, make_compiler
from tests.test_text import cut

A = '{"city": "Zürich \\"}\\" \\\\", "days": [{"n": 1}]}'  # arguments with all that could mislead
CALL = f'{{"name": "get", "arguments": {A}}}'
OTHER = '{"name": "now", "arguments": {}}'
PARAMETERS = CALL.replace('"arguments"', '"parameters"')
GET, NOW = ("get", A), ("now", "{}")
Calls = list[tuple[str, str]]


def deltas_of(format: Format, pieces: list[str]) -> list[MessageDelta]:
    parser = ToolCallParser(format)
    return [*map(parser.push, pieces), parser.finish()]


def parse(format: Format, pieces: list[str]) -> tuple[str, Calls]:
    """The whole message, put together as OpenAI's clients do."""
    deltas = deltas_of(format, pieces)
    calls: list[list[str]] = []
    for each in (call for delta in deltas for call in delta.tool_calls):
        if each.index == len(calls):
            assert each.id and each.name is not None
            calls.append([each.name, ""])
        else:
            assert each.index == len(calls) - 1 and each.id is each.name is None and each.arguments
        calls[-1][1] += each.arguments
    return "".join(delta.content for delta in deltas), [tuple(call) for call in calls]


@pytest.mark.parametrize(
    ("format", "text", "expected"),
    [
        (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", ("", [GET])),
        (
            HERMES,
            f"Let me see. \n<tool_call>{CALL}</tool_call>\n<tool_call>\n{OTHER}</tool_call> \n",
            ("Let me see.", [GET, NOW]),
        ),
        (HERMES, f"<tool_call>{OTHER}</tool_call> Done. ", (" Done.", [NOW])),
        (HERMES, " no call at all <tool> ", (" no call at all <tool> ", [])),
        (HERMES, " ", (" ", [])),
        (
            HERMES,
            f'<tool_call>{{"arguments": {A}, "name": "get"}}</tool_call>',
            ("", [("get", json.dumps(json.loads(A), ensure_ascii=False))]),
        ),
        (HERMES, '<tool_call>{"name": "get", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", [("get", '{"a": 1}')])),
        (HERMES, f'<tool_call>{{"id": "1", "name": "get", "arguments": {A}, "type": "x}}"}}</tool_call>', ("", [GET])),
        (HERMES, f"<tool_call>{CALL[:-1]}</tool_call>}}!", ("}!", [GET])),
        (HERMES, f"<tool_call>{CALL} and so on", (" and so on", [GET])),
        (HERMES, f"<tool_call>{CALL}</tool", ("</tool", [GET])),
        (HERMES, f"<tool_call>{CALL[:-20]}", ("", [("get", A[:-19])])),
        (HERMES, 'x <tool_call>{"name": "get"', ('x <tool_call>{"name": "get"', [])),
        (HERMES, 'x <tool_call>{"name": "get"}</tool_call>', ('x <tool_call>{"name": "get"}</tool_call>', [])),
        (HERMES, "<tool_call>{'name': 'get'}</tool_call>", ("<tool_call>{'name': 'get'}</tool_call>", [])),
        (HERMES, '<tool_call>{"name": 1, "arguments": {}} .', ('<tool_call>{"name": 1, "arguments": {}} .', [])),
        (
            HERMES,
            '<tool_call>{"name": "a\\x", "arguments": {}} .',
            ('<tool_call>{"name": "a\\x", "arguments": {}} .', []),
        ),
        (HERMES, f"<tool_call> <tool_call>{CALL}</tool_call>", ("<tool_call>", [GET])),
        (HERMES, CALL, (CALL, [])),
        (LLAMA3, f"<|python_tag|>{PARAMETERS}", ("", [GET])),
        (LLAMA3, f" {PARAMETERS}; {OTHER}", ("", [GET, NOW])),
        (LLAMA3, f"{OTHER}; and", ("; and", [NOW])),
        (LLAMA3, f"Wait. <|python_tag|>{OTHER}", ("Wait.", [NOW])),
        (LLAMA3, "<|python_tag|>print(1)", ("<|python_tag|>print(1)", [])),
        (LLAMA3, '{"x": 1, "name": "f", "parameters": {}}', ('{"x": 1, "name": "f", "parameters": {}}', [])),
        (LLAMA3, '{"answer": {"name": 5}}', ('{"answer": {"name": 5}}', [])),
        (LLAMA3, f"I say {PARAMETERS}", (f"I say {PARAMETERS}", [])),
        (LLAMA3, '{"type": "function", "name": "now", "parameters": {}}', ("", [NOW])),
        (MISTRAL, f"[TOOL_CALLS] [{CALL}, {OTHER}]", ("", [GET, NOW])),
        (MISTRAL, f'Hm. [TOOL_CALLS][{CALL[:-1]}, "id": "abcdefghi"}}]', ("Hm.", [GET])),
        (MISTRAL, f"[TOOL_CALLS] [{CALL}, {OTHER}] [TOOL_CALLS] [{OTHER}]", ("", [GET, NOW, NOW])),
        (MISTRAL, "[TOOL_CALLS] []", ("[TOOL_CALLS] []", [])),
        (MISTRAL, f"[TOOL_CALLS] [{OTHER}, 5]", (", 5]", [NOW])),
        (MISTRAL, f"[{OTHER}]", (f"[{OTHER}]", [])),
        (GUIDED, f"[{PARAMETERS},\n {OTHER}]", ("", [GET, NOW])),
        (GUIDED, "[1]", ("[1]", [])),
    ],
)
def test_calls_are_told_from_content(format, text, expected):
    assert parse(format, [text]) == expected
    assert parse(format, list(text)) == expected


PARTS = [CALL, PARAMETERS, OTHER, CALL[:-1], CALL[:30], "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]"]
PARTS += [
    "[",
    "]",
    "{",
    "}",
    ",",
    ";",
    '"',
    '{"name"',
    '{"x": 1, "name": "f", "arguments": {}}',
    '"type": "function", ',
    "\0",
    "<tool",
    "[TOOL",
    " ",
    "\n",
    "a",
]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([HERMES, LLAMA3, MISTRAL, GUIDED]),
    st.lists(st.sampled_from(PARTS), max_size=10),
    st.lists(st.integers(0, 500), max_size=10),
)
def test_any_cut_gives_the_same_and_nothing_is_lost(format, parts, cuts):
    text = "".join(parts)
    content, calls = parse(format, cut(text, cuts))
    assert (content, calls) == parse(format, [text])
    if not calls:
        assert content == text
    rest = iter(text)
    assert all(char in rest for char in content), "content is said in its order, once"


def test_arguments_and_content_stream_as_they_come():
    def steps(format: Format, *pieces: str) -> list:
        deltas = deltas_of(format, list(pieces))
        return [d.content or [(call.name, call.arguments) for call in d.tool_calls] for d in deltas]

    assert steps(HERMES, "So ", "<to", "y> <tool_call>") == ["So", [], " <toy>", " <tool_call>"]
    pieces = ['<tool_call>{"name": "f", "arg', 'uments": {"a', '": 1', "}", "}</tool_call>"]
    assert steps(HERMES, *pieces) == [[], [("f", '{"a')], [(None, '": 1')], [(None, "}")], [], []]
    assert steps(LLAMA3, '{"', "na", "tion", '": "CH"}') == [[], [], '{"nation', '": "CH"}', []]


def test_the_cost_of_long_arguments_grows_with_their_length_alone():
    parser = ToolCallParser(HERMES)
    parser.push('<tool_call>{"name": "f", "arguments": {"text": "')
    for _ in range(1000):
        [delta] = parser.push("x" * 20).tool_calls
        assert delta.arguments == "x" * 20
        assert not parser._held


def test_ids_are_as_the_templates_want_them():
    ids = {name: ToolCallParser(format)._format.make_id() for name, format in TOOL_CALL_PARSERS.items()}
    assert len(ids["mistral"]) == 9 and ids["mistral"].isalnum()
    assert ids["hermes"].startswith("call_") and len(set(ids.values())) == len(ids)


TREE = {
    "$defs": {
        "node": {"type": "object", "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}}
    },
    "properties": {"root": {"$ref": "#/$defs/node"}},
    "required": ["root"],
}
TOOLS = [
    {"type": "function", "function": {"name": "now"}},
    {"type": "function", "function": {"name": "grow", "parameters": TREE}},
]
NOW_CALL = {"name": "now", "parameters": {}}
GROW_CALL = {"name": "grow", "parameters": {"root": {"value": 1, "next": {"value": 2}}}}
LIST_CALL = {"name": "grow", "parameters": [1]}
BAD_CALL = {"name": "grow", "parameters": {"root": {"value": 1, "next": {"value": "two"}}}}


def is_complete(compiler: GrammarCompiler, schema: str, text: str) -> bool:
    """Whether the guide lets a model say this, and end there."""
    legal = compiler.start("json_schema", schema).legal_after(tuple(ids_of(text)))
    return legal is not None and bool(legal[END_ID])


@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        (
            {},
            [[NOW_CALL], [GROW_CALL, NOW_CALL]],
            [[], [BAD_CALL], [LIST_CALL], [{"name": "x", "parameters": {}}], NOW_CALL],
        ),
        ({"parallel_tool_calls": False}, [[NOW_CALL], [GROW_CALL]], [[NOW_CALL, NOW_CALL]]),
        ({"name": "grow"}, [[GROW_CALL]], [[NOW_CALL], [GROW_CALL, GROW_CALL], [BAD_CALL]]),
    ],
    ids=str,
)
def test_the_schema_of_a_choice_allows_its_calls_alone(tmp_path, options, good, bad):
    schema = tool_choice_schema(TOOLS, **options)
    compiler = make_compiler(tmp_path / "checkpoint")
    for calls in [*good, *bad]:
        valid = jsonschema.Draft202012Validator(json.loads(schema)).is_valid(calls)
        assert valid == (calls in good)
        assert is_complete(compiler, schema, json.dumps(calls)) == valid
    for calls in good:
        expected = [(call["name"], json.dumps(call["parameters"])) for call in calls]
        assert parse(GUIDED, [json.dumps(calls)]) == ("", expected)
