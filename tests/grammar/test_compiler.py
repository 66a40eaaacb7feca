"""Guides compile once, and what is too much for the engine is refused by name before it can do harm."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from specbackend.errors import InvalidRequest
from specbackend.grammar import compiler as compiler_module
from specbackend.grammar.json_limits import DEEPEST_NESTING, LARGEST_MULTIPLE, MOST_MEMBERS, check_json_schema
from specbackend.grammar.state import CompiledGuide
from tests.fakes import byte_tokenizer
from tests.grammar.texts import END_ID, ids_of, make_compiler

HANG_SECONDS = 30  # by far more than any refusal takes, so that a slow machine fails nothing


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    return make_compiler(tmp_path_factory.mktemp("bytes"))


def accepts(compiler, kind: str, guide: str, text: str) -> bool:
    legal = compiler.start(kind, guide).legal_after(tuple(ids_of(text)))
    return legal is not None and bool(legal[END_ID])


def nested(levels: int) -> str:
    return '{"items":' * levels + "{}" + "}" * levels


def chain_of_references(length: int, schema: dict) -> str:
    """Each definition refers to the next."""
    definitions = {}
    for index in range(length):
        text = json.dumps(schema).replace("NEXT", f"#/$defs/d{index + 1}")
        definitions[f"d{index}"] = json.loads(text)
    return json.dumps({"$defs": definitions | {f"d{length}": {"type": "null"}}, "$ref": "#/$defs/d0"})


HOSTILE = {
    "nested": ("json_schema", nested(70), f"71 levels deep, at most {DEEPEST_NESTING}"),
    "very nested": ("json_schema", nested(7000), f"at most {DEEPEST_NESTING} levels"),
    "references": ("json_schema", chain_of_references(1000, {"items": {"$ref": "NEXT"}}), "refers to 1001 schemas, at"),
    "multiple": ("json_schema", '{"type": "integer", "multipleOf": 1000003}', f"at most {LARGEST_MULTIPLE}"),
    "multiples": ("json_schema", '{"allOf": [{"multipleOf": 99.73}, {"multipleOf": 9967}]}', "multiple is 99400891"),
    "members": ("json_schema", json.dumps({"properties": {f"p{i}": {} for i in range(3000)}}), f"most {MOST_MEMBERS}"),
    "combinations": (
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(6)]} for i in range(8)]}),
        "too large",
    ),
    "loop": ("json_schema", '{"$ref": "#"}', "allows no first token"),
    "no JSON": ("json_schema", '{"type": ', "Expecting value"),
    "no object": ("json_schema", "[1]", "must be a JSON object"),
    "unknown keyword": ("json_schema", '{"not": {"type": "null"}}', 'Unimplemented keys: \\["not"\\]'),
    "options": ("json_schema", '{"x-guidance": {"lenient": true}, "not": {}}', "x-guidance is not supported"),
    "remote": ("json_schema", '{"$ref": "http://example.com/s.json"}', "does not fetch"),
    "unsatisfiable": ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "minimum .* greater"),
    "parentheses": ("regex", "(" * 5000 + "a" + ")" * 5000, "nest"),
    "patterns": ("json_schema", json.dumps({"pattern": "[^a]*" * 2000}), "patterns of 10000 characters, at most"),
    "lookahead": ("regex", "(?=a)b", "look-around"),
    "backreference": ("regex", r"(a)\1", "backreferences"),
    "unclosed": ("regex", "(a", "unclosed group"),
    "rules": (
        "ebnf",
        "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(250)) + '\nr250 ::= "b"',
        "big",
    ),
    "endless": ("ebnf", "root ::= root", "allows no first token"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_guides_are_refused_by_name(compiler, name):
    kind, text, message = HOSTILE[name]
    start = time.monotonic()
    with pytest.raises(InvalidRequest, match=message) as refused:
        compiler.start(kind, text)
    assert refused.value.field == kind
    assert time.monotonic() - start < HANG_SECONDS


HARMLESS = {  # what looks hostile, and costs nothing because automata are built as they are walked
    "repetitions": ("regex", "(a{1,1000}){1,1000}", "aaaa"),
    "ambiguity": ("regex", "(a|a)*(a*)*b", "aab"),
    "exponential": ("regex", "[ab]*a[ab]{30}", "a" * 31),
    "many items": ("json_schema", '{"type": "array", "items": {"type": "null"}, "minItems": 1000000}', None),
    "enum": ("json_schema", json.dumps({"enum": [f"value {i * 7919}" for i in range(2500)]}), '"value 7919"'),
    "doubling": (
        "json_schema",
        chain_of_references(100, {"type": "array", "prefixItems": [{"$ref": "NEXT"}] * 2}),
        "[]",
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_guides_are_served(compiler, name):
    kind, guide, text = HARMLESS[name]
    assert text is None or accepts(compiler, kind, guide, text)


def is_served(schema: str) -> bool:
    try:
        check_json_schema(schema)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"$ref": "NEXT"}}, "required": ["a"]},
        {"allOf": [{"anyOf": [{"$ref": "NEXT"}, {"type": "integer"}]}]},
        {"items": {"items": {"items": {"items": {"$ref": "NEXT"}}}}},
        {"additionalProperties": {"allOf": [{"$ref": "NEXT"}]}},
    ],
    ids=["properties", "anyOf", "items", "additionalProperties"],
)
def test_the_deepest_schema_that_is_served_leaves_stack(schema):
    """In a process of its own with half the usual stack: were it too little, it would take the tests with it."""
    text = max((chain_of_references(length, schema) for length in range(1, 400)), key=lambda t: is_served(t) * len(t))
    assert text.count("$ref") > 80
    program = (
        "import sys, threading; from llguidance import LLMatcher, LLTokenizer; threading.stack_size(1 << 22);"
        "tokens = LLTokenizer(sys.argv[1], eos_token=[0]);"
        "work = lambda: LLMatcher(tokens, LLMatcher.grammar_from_json_schema(sys.argv[2])).compute_bitmask();"
        "thread = threading.Thread(target=work); thread.start(); thread.join()"
    )
    child = subprocess.run([sys.executable, "-c", program, byte_tokenizer().to_str(), text], timeout=HANG_SECONDS)
    assert child.returncode == 0


def test_a_guide_compiles_once(compiler, monkeypatch):
    compiled, compile_guide = [], CompiledGuide.renew

    def counting(guide: CompiledGuide) -> None:
        compiled.append(guide)
        compile_guide(guide)

    monkeypatch.setattr(CompiledGuide, "renew", counting)
    first, second = compiler.start("regex", "once[0-9]"), compiler.start("regex", "once[0-9]")
    assert len(compiled) == 1
    first.advance(ids_of("o")[0])
    assert np.flatnonzero(second.legal_after(())).tolist() == ids_of("o"), "states do not share where they are"
    compiler.start("choice", '["once[0-9]"]')
    assert len(compiled) == 2


def test_no_more_guides_are_kept_than_promised(compiler):
    for index in range(2 * compiler_module.MOST_COMPILED):
        compiler.start("regex", f"bounded{index}")
    assert compiler._compiled.cache_info().currsize == compiler_module.MOST_COMPILED


CHOICES = ["a", "ab", "", 'say "x"\n\\', "😀é", "nul\0", "/x/", "{}"]


def test_choice_is_one_of_the_texts(compiler):
    guide = json.dumps(CHOICES)
    assert [text for text in CHOICES if not accepts(compiler, "choice", guide, text)] == []
    assert [text for text in ("b", "aa", "abab", "/x", "😀") if accepts(compiler, "choice", guide, text)] == []


REGEXES = {
    r"^(a|b)$": (["a", "b"], ["", "ab"]),
    r"a/b\/": (["a/b/"], ["a"]),
    r"[^\d]\w+": (["éa1"], ["1a"]),
    "a\nb|": (["a\nb", ""], ["a"]),
}


@pytest.mark.parametrize("regex", REGEXES)
def test_regex_matches_all_of_the_text(compiler, regex):
    matching, others = REGEXES[regex]
    assert [text for text in matching if not accepts(compiler, "regex", regex, text)] == []
    assert [text for text in others if accepts(compiler, "regex", regex, text)] == []


def test_json_may_be_indented_and_no_more(compiler):
    schema = '{"type": "array", "items": {"type": "null"}}'
    allowed = ["[null,null]", "[null, null]", "[ null ]", "[\n  null,\n\tnull\n]"]
    assert [text for text in allowed if not accepts(compiler, "json_schema", schema, text)] == []
    refused = ["[  null]", "[\n\nnull]", " []", "[] "]
    assert [text for text in refused if accepts(compiler, "json_schema", schema, text)] == []
