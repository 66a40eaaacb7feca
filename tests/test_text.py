"""Detokenizer and stop strings: how the tokens are cut into pieces must not show in the text."""

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import chain, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specbackend.sampling_params import SamplingParams
from specbackend.text import MAX_PENDING, REPLACEMENT, Detokenizer, StopMatcher, TextStream
from tests.fakes import END_ID, byte_tokenizer
from tests.tokenizer_families import CORPUS, FAMILIES, SPECIALS

TOKENIZER = byte_tokenizer()
TEXTS = st.text(alphabet="ab é€😀\u0301", max_size=20)


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def cut(items, cuts: list[int]) -> list:
    """Split a sequence at the given places, modulo its length."""
    places = sorted({place % (len(items) + 1) for place in cuts} | {0, len(items)})
    return [items[a:b] for a, b in pairwise(places)] or [items]


class Family:
    """A tokenizer, and what its tokens mean: the definition that streams are compared with."""

    def __init__(self, name: str):
        self.tokenizer = FAMILIES[name]()
        self.specials = [self.tokenizer.token_to_id(token) for token in SPECIALS]
        self._has_byte_tokens = self.tokenizer.token_to_id("<0xFF>") is not None
        self._drops_all_spaces = name == "metaspace"  # of the first token

    def text(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The tokenizer's own text; except that a character stays one, whatever bytes come behind it."""
        whole = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        if not self._has_byte_tokens:
            return whole
        text = self._text_by_runs([id for id in ids if not (skip_special_tokens and id in self.specials)])
        assert text == whole or REPLACEMENT in text
        return text

    def _text_by_runs(self, ids: list[int]) -> str:
        """Runs of bytes are text where they are, as soon as they are; the others are U+FFFD, each."""
        text, run = "", b""
        for token in map(self.tokenizer.id_to_token, ids):
            if token.startswith("<0x"):
                run += bytes.fromhex(token[3:5])
                if run == b" " and not text and not self._drops_all_spaces:
                    continue  # it is no text yet
                with suppress(UnicodeDecodeError):
                    text, run = text + run.decode(), b""
            else:
                token = token.replace("▁", " ")
                text, run = text + len(run) * REPLACEMENT + token, b""
        text += len(run) * REPLACEMENT
        if not self._drops_all_spaces:
            return text.removeprefix(" ")
        spaces = len(first := self.tokenizer.id_to_token(ids[0])) - len(first.lstrip("▁")) if ids else 0
        return text[spaces:]


family_of = lru_cache(Family)
ANYTHING = st.text(alphabet="".join(CORPUS) + "龍ß\n\u0300\U0001f3fd\u200b\ufffd", max_size=12)


@st.composite
def answers(draw, family: Family) -> list[int]:
    """Token ids: texts, parts of texts, special tokens and anything else."""
    vocabulary = st.integers(0, family.tokenizer.get_vocab_size() - 1)
    texts = ANYTHING.map(lambda text: family.tokenizer.encode(text).ids)
    halves = texts.map(lambda ids: ids[: len(ids) // 2])
    bytes_ = st.lists(st.integers(0, 256), max_size=6)  # in all families these are bytes, mostly
    specials = st.lists(st.sampled_from(family.specials), max_size=3)
    parts = st.lists(st.one_of(texts, halves, bytes_, specials, st.lists(vocabulary, max_size=4)), max_size=6)
    return list(chain(*draw(parts)))


CUTS = st.lists(st.integers(0, 100), max_size=12)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(st.data(), CUTS, st.booleans())
def test_a_stream_is_the_text_of_all_its_tokens(name, data, cuts, skip):
    family = family_of(name)
    ids = data.draw(answers(family))
    detokenizer = Detokenizer(lambda ids: family.tokenizer.decode(ids, skip_special_tokens=skip))
    sent, count = "", 0
    for chunk in cut(ids, cuts):
        sent, count = sent + detokenizer.push(chunk), count + len(chunk)
        text = family.text(ids[:count], skip)
        assert text.startswith(sent) and text[len(sent) :] in (REPLACEMENT * n for n in range(4)), "held back too much"
    assert sent + detokenizer.flush() == family.text(ids, skip)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(st.data(), CUTS, st.booleans(), st.booleans())
def test_stop_strings_end_a_stream_where_its_text_has_them(name, data, cuts, skip, keep):
    family = family_of(name)
    ids = data.draw(answers(family).filter(bool))
    whole = family.text(ids, skip)
    places = st.tuples(st.integers(0, len(whole)), st.integers(1, 4))
    within = [whole[start : start + size] for start, size in data.draw(st.lists(places, max_size=2))]
    stops = tuple({stop for stop in [*within, *data.draw(st.lists(st.text("ab€龍", min_size=1), max_size=2))] if stop})
    stream = TextStream(
        family.tokenizer.decode,
        SamplingParams(stop=stops, skip_special_tokens=skip, include_stop_str_in_output=keep),
    )
    got, got_ids, stopped = "", [], False
    chunks = cut(ids, cuts)
    for number, chunk in enumerate(chunks, start=1):
        piece = stream.push(chunk, last=number == len(chunks))
        got, got_ids, stopped = got + piece.text, got_ids + piece.token_ids, piece.stopped
        if stopped:
            break
    assert (got, got_ids, stopped) == stopped_answer(family, ids, skip, stops, keep)


def stopped_answer(family: Family, ids: list[int], skip: bool, stops, keep: bool) -> tuple[str, list[int], bool]:
    """The definition: token by token, does the text contain a stop string, incomplete characters at its end aside?"""
    for count in range(1, len(ids) + 1):
        text = family.text(ids[:count], skip)
        tail = min(len(text) - len(text.rstrip(REPLACEMENT)), 3)
        text = text[: len(text) - tail] if count < len(ids) else text
        start = first_complete_stop(text, stops)
        if start is not None:
            end = min(text.find(stop) + len(stop) for stop in stops if stop in text)
            return text[: end if keep else start], ids[:count], True
    return family.text(ids, skip), ids, False


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(st.data(), ANYTHING, CUTS)
def test_with_its_prompt_in_front_a_stream_is_the_text_of_both(name, data, prompt, cuts):
    family = family_of(name)
    prompt_ids = family.tokenizer.encode(prompt).ids
    ids = data.draw(answers(family))
    stream = TextStream(family.tokenizer.decode, SamplingParams(), prompt_ids)
    chunks = cut(ids, cuts)
    pieces = [stream.push(chunk, last=number == len(chunks)) for number, chunk in enumerate(chunks, start=1)]
    got = family.text(prompt_ids, True) + "".join(piece.text for piece in pieces)
    assert got == family.text(prompt_ids + ids, True)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("before", ["", " ", "x"])
def test_a_run_of_tokens_without_text_separates_nothing(name, before):
    """Neither a character's bytes nor the spaces in front of a text."""
    family = family_of(name)
    text = family.tokenizer.encode(before + "龍 ").ids
    detokenizer = Detokenizer(family.tokenizer.decode)
    ids = list(chain(*([token] + [family.specials[1]] * 100 for token in text)))
    assert "".join(detokenizer.push([token]) for token in ids) + detokenizer.flush() == family.text(text, True)


def test_a_prompt_of_bytes_is_not_cut_within_a_character():
    family = family_of("llama2")
    ids = family.tokenizer.encode("龍" * 9).ids
    for length in range(2, len(ids), 3):  # the first stands for the space in front
        detokenizer = Detokenizer(family.tokenizer.decode, ids[: length - 1])
        assert detokenizer.push(ids[length - 1 :]) == "龍" * ((len(ids) - length + 1) // 3)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("stop", [(), ("no such text", "x" * 50)], ids=["", "stop"])
def test_the_cost_of_a_stream_grows_with_its_length_alone(name, stop):
    """Of texts, of no text, of tokens that are no text together, and of those that never end where a character does."""
    family = family_of(name)
    sizes = []

    def decode(ids, skip_special_tokens):
        sizes.append(len(ids))
        return family.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def encode(text: str) -> list[int]:
        return family.tokenizer.encode(text).ids

    for unit in (encode("the dog 龍 😀"), family.specials, encode("龍")[-2:], encode("龍龍")[1:-1]):
        ids = (unit * 2000)[:2000]
        sizes.clear()
        stream = TextStream(decode, SamplingParams(stop=stop))
        text = "".join(stream.push([token]).text for token in ids) + stream.push([], last=True).text
        assert text == family.text(ids, True)
        assert max(sizes) < 2 * MAX_PENDING
        assert sum(sizes) < 2000 * MAX_PENDING


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
