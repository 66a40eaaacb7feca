"""Detokenizer and stop strings: how the tokens are cut into pieces must not show in the text."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specbackend.sampling_params import SamplingParams
from specbackend.text import MAX_PENDING, REPLACEMENT, Detokenizer, StopMatcher, TextStream
from tests.fakes import END_ID, byte_tokenizer

TOKENIZER = byte_tokenizer()
TEXTS = st.text(alphabet="ab é€😀\u0301", max_size=20)


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def cut(items, cuts: list[int]) -> list:
    """Split a sequence at the given places, modulo its length."""
    places = sorted({place % (len(items) + 1) for place in cuts} | {0, len(items)})
    return [items[a:b] for a, b in pairwise(places)] or [items]


@given(TEXTS, st.lists(st.integers(0, 100)))
def test_detokenizer_emits_the_text_in_whole_characters(text, cuts):
    detokenizer = Detokenizer(TOKENIZER.decode)
    pieces = [detokenizer.push(ids) for ids in cut(encode(text), cuts)]
    assert "".join(pieces) + detokenizer.flush() == text
    assert not any(REPLACEMENT in piece for piece in pieces)


@given(st.lists(st.integers(0, 255), max_size=40), st.lists(st.integers(0, 100)))
def test_detokenizer_passes_bytes_that_are_no_text(ids, cuts):
    detokenizer = Detokenizer(TOKENIZER.decode)
    pieces = [detokenizer.push(chunk) for chunk in cut(ids, cuts)]
    assert "".join(pieces) + detokenizer.flush() == TOKENIZER.decode(ids)


def test_detokenizer_holds_back_nothing_but_the_incomplete_character():
    detokenizer = Detokenizer(TOKENIZER.decode)
    euro = encode("€")
    assert detokenizer.push(encode("price: ") + euro[:2]) == "price: "
    assert detokenizer.push(euro[2:]) == "€"


def test_detokenizer_gives_up_on_endless_garbage():
    detokenizer = Detokenizer(TOKENIZER.decode)
    lone = encode("é")[:1]
    emitted = [detokenizer.push(lone) for _ in range(2 * MAX_PENDING)]
    assert any(emitted)


def test_detokenizer_does_not_collect_tokens_without_text():
    """Under ignore_eos a model may say eos for ever; decoding all of them again with each would be quadratic."""
    sizes = []

    def decode(ids):
        sizes.append(len(ids))
        return TOKENIZER.decode(ids)

    detokenizer = Detokenizer(decode)
    assert "".join(detokenizer.push([token]) for token in encode("é") + [END_ID] * 1000 + encode("€")) == "é€"
    assert max(sizes) < 2 * MAX_PENDING


def test_detokenizer_keeps_spaces_that_depend_on_the_neighbour():
    words = {1: "Hello", 2: " world"}

    def decode(ids):  # like sentencepiece: the first space of a text is no text
        return "".join(words[i] for i in ids).removeprefix(" ")

    detokenizer = Detokenizer(decode)
    assert [detokenizer.push([i]) for i in (1, 2, 2)] == ["Hello", " world", " world"]


def first_complete_stop(text: str, stops: list[str]) -> int | None:
    """The definition: add characters until the text ends with a stop string; where does the longest such begin?"""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return None


@given(
    st.text("abc", max_size=20),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30)),
)
def test_stop_matcher_equals_its_definition(text, stops, cuts):
    matcher, emitted, stopped = StopMatcher(stops), "", False
    for piece in cut(text, cuts):
        new, stopped = matcher.push(piece)
        emitted += new
        if stopped:
            break
    start = first_complete_stop(text, stops)
    assert stopped == (start is not None)
    assert emitted + ("" if stopped else matcher.flush()) == text[:start]


def test_stop_matcher_holds_back_only_what_may_become_a_stop_string():
    matcher = StopMatcher(["\n\nQ:"])
    assert matcher.push("42.\n") == ("42.", False)
    assert matcher.push("So") == ("\nSo", False)
    assert matcher.push("\n\nQ: next") == ("", True)


def text_stream(**params) -> TextStream:
    return TextStream(TOKENIZER.decode, SamplingParams(**params))


@given(TEXTS.filter(bool), st.lists(st.integers(0, 100)), st.sampled_from([(), ("é",), ("b ", "€😀"), ("aa",)]))
def test_text_stream_does_not_depend_on_the_pieces(text, cuts, stops):
    whole = text_stream(stop=stops).push(encode(text), last=True)
    stream, got, ids, stopped = text_stream(stop=stops), "", [], False
    chunks = cut(encode(text), cuts)
    for number, chunk in enumerate(chunks, start=1):
        piece = stream.push(chunk, last=number == len(chunks))
        got, ids, stopped = got + piece.text, ids + piece.token_ids, piece.stopped
        if stopped:
            break
    assert (got, ids, stopped) == (whole.text, whole.token_ids, whole.stopped)
    assert not any(stop in got for stop in stops)


@given(
    st.text("abc", min_size=1, max_size=20),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 12),
    st.booleans(),
    st.lists(st.integers(0, 30)),
)
def test_stop_strings_equal_their_definition(text, stops, min_new_tokens, keep, cuts):
    """One letter, one token: a stop string counts if its last letter comes after the first min_new_tokens."""
    stream = text_stream(stop=tuple(stops), min_new_tokens=min_new_tokens, include_stop_str_in_output=keep)
    got, ids, stopped = "", [], False
    chunks = cut(encode(text), cuts)
    for number, chunk in enumerate(chunks, start=1):
        piece = stream.push(chunk, last=number == len(chunks))
        got, ids, stopped = got + piece.text, ids + piece.token_ids, piece.stopped
        if stopped:
            break
    ends = [end for end in range(min_new_tokens + 1, len(text) + 1) if text[:end].endswith(tuple(stops))]
    assert stopped == bool(ends)
    end = ends[0] if ends else len(text)
    start = min(end - len(stop) for stop in stops if text[:end].endswith(stop)) if ends else end
    assert got == text[: end if keep else start]
    assert ids == encode(text)[:end]


def test_text_stream_ends_with_the_token_that_completes_the_stop_string():
    piece = text_stream(stop=("END",)).push(encode("abENDcd"))
    assert (piece.text, piece.stopped) == ("ab", True)
    assert piece.token_ids == encode("abEND")


@pytest.mark.parametrize("last", [False, True])
def test_text_stream_shows_a_partial_stop_string_only_at_the_end(last):
    piece = text_stream(stop=("END",)).push(encode("abEN"), last=last)
    assert piece.text == ("abEN" if last else "ab")


@pytest.mark.parametrize("stop", [(), ("zzz",)])
@pytest.mark.parametrize("end", [[END_ID], encode("c")], ids=["special", "letter"])
@pytest.mark.parametrize(
    ("params", "shown"),
    [
        ({}, {"special": "ab", "letter": "ab"}),
        ({"skip_special_tokens": False}, {"special": "ab", "letter": "ab"}),
        ({"include_stop_str_in_output": True}, {"special": "ab", "letter": "abc"}),
        (
            {"include_stop_str_in_output": True, "skip_special_tokens": False},
            {"special": "ab<|end|>", "letter": "abc"},
        ),
    ],
    ids=str,
)
def test_the_end_token_is_text_only_if_asked_for(stop, end, params, shown):
    piece = text_stream(stop=stop, **params).push(encode("ab") + end, last=True, has_end_token=True)
    assert piece.text == shown["special" if end == [END_ID] else "letter"]
    assert piece.token_ids == encode("ab") + end


def test_special_tokens_in_the_middle_are_text_only_if_asked_for():
    ids = [*encode("a"), END_ID, *encode("b")]
    assert text_stream().push(ids).text == "ab"
    assert text_stream(skip_special_tokens=False).push(ids).text == "a<|end|>b"
