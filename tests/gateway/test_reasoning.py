"""Thoughts and answers: told apart, and however the text is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specbackend.errors import ConfigError
from specbackend.gateway.reasoning import ReasoningParser
from tests.test_text import cut


def parse(name: str, pieces: list[str]) -> tuple[str, str]:
    parser = ReasoningParser(name)
    deltas = [*map(parser.push, pieces), parser.finish()]
    return "".join(delta.reasoning_content for delta in deltas), "".join(delta.content for delta in deltas)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("qwen3", "<think>\nhm, \n</think>\n\nSo: 5 \n", ("hm,", "So: 5 \n")),
        ("qwen3", " \n<think>a</think>b", ("a", "b")),
        ("qwen3", "<think>\n\n</think>\n\nb", ("", "b")),
        ("qwen3", " no thoughts: <think>x</think>", ("", " no thoughts: <think>x</think>")),
        ("qwen3", "<think>a</think>b<think>c</think>", ("a", "b<think>c</think>")),
        ("qwen3", "<think>cut off </thi", ("cut off </thi", "")),
        ("qwen3", "<thi", ("", "<thi")),
        ("qwen3", "</think>x", ("", "</think>x")),
        ("qwen3", "", ("", "")),
        ("mimo", "<think>a <b> < / c</think>b", ("a <b> < / c", "b")),
        ("deepseek-r1", "a\n</think>\nb", ("a", "b")),
        ("deepseek-r1", "<think>\na</think>b", ("a", "b")),
        ("deepseek-r1", "  a", ("a", "")),
        ("deepseek-r1", "<thinking about it", ("<thinking about it", "")),
        ("deepseek-r1", " </think> ", ("", "")),
    ],
)
def test_thoughts_are_told_from_the_answer(name, text, expected):
    assert parse(name, [text]) == expected
    assert parse(name, list(text)) == expected


@given(
    st.sampled_from(["deepseek-r1", "qwen3"]),
    st.lists(st.sampled_from(["<think>", "</think>", "<", "</thi", "think>", " ", "\n", "a", "é"]), max_size=12),
    st.lists(st.integers(0, 100), max_size=8),
)
def test_any_cut_gives_the_same(name, parts, cuts):
    text = "".join(parts)
    assert parse(name, cut(text, cuts)) == parse(name, [text])


def test_thoughts_stream_as_they_come_but_marks_never_in_part():
    parser = ReasoningParser("qwen3")
    steps = [parser.push(text) for text in ("<th", "ink>\n", "one ", "two <", "b", "</", "think>", "\n", "So")]
    thought = [step.reasoning_content for step in steps]
    assert thought == ["", "", "one", " two", " <b", "", "", "", ""]
    assert [step.content for step in steps] == [""] * 8 + ["So"]


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="reasoning_parser: must be one of deepseek-r1, qwen3, mimo, got 'x'"):
        ReasoningParser("x")
