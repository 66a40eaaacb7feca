"""A state answers about paths of drafts as a matcher that is fed the whole text anew, and stays where it is."""

import random

import numpy as np
import pytest
from llguidance import LLMatcher

from specbackend.grammar.state import MOST_RENEWALS, CompiledGuide
from tests.grammar.texts import END_ID, EOS, OTHER_END_ID, VOCAB_SIZE, fresh_matcher, ids_of, legal_by_definition
from tests.grammar.texts import make_compiler as compiler_in

REGEX = r"(ab?c|[a-c]{2}x|é)*(z|\d{1,2})"
LIMITED = "(a?){30}b?" * 300  # compiles, and is too much for llguidance once two of `a` have been read


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    return compiler_in(tmp_path_factory.mktemp("bytes"))


@pytest.mark.parametrize("seed", range(8))
def test_any_path_in_any_order_is_answered_as_by_a_fresh_matcher(compiler, seed):
    rng, matcher = random.Random(seed), fresh_matcher(LLMatcher.grammar_from_regex(REGEX))
    state, text = compiler.start("regex", REGEX), []
    alphabet = ids_of("abcxz7é") + list(EOS)
    forbidden = 0
    while not state.is_complete and len(text) < 12:
        for _ in range(20):
            path = tuple(rng.choices(alphabet, k=rng.randint(0, 4)))
            expected, answer = legal_by_definition(matcher, text + list(path)), state.legal_after(path)
            forbidden += expected is None
            assert (answer is None) == (expected is None)
            assert answer is None or np.array_equal(answer, expected)
            legal = [n for n in range(len(path) + 1) if legal_by_definition(matcher, text + list(path[:n])) is not None]
            assert state.count_legal(path) == max(legal)
        token = int(rng.choice(np.flatnonzero(state.legal_after(()))))
        state.advance(token)
        text.append(token)
        assert state.error is None
    assert forbidden and text, "no path was forbidden: only half is tested"


def test_every_eos_is_legal_where_the_grammar_accepts_and_nowhere_else(compiler):
    state = compiler.start("regex", "ab?")
    a, b = ids_of("ab")
    assert np.flatnonzero(state.legal_after(())).tolist() == [a]
    assert set(np.flatnonzero(state.legal_after((a,)))) == {b, END_ID, OTHER_END_ID}
    assert set(np.flatnonzero(state.legal_after((a, b)))) == {END_ID, OTHER_END_ID}
    assert state.legal_after((a, b, b)) is None and state.legal_after((END_ID,)) is None
    assert len(state.legal_after(())) == VOCAB_SIZE


@pytest.mark.parametrize("last", EOS)
def test_complete_where_nothing_but_an_eos_follows(compiler, last):
    state = compiler.start("regex", "ab?")
    a, b = ids_of("ab")
    state.legal_after((a, b))  # asking completes nothing
    assert not state.is_complete
    state.advance(a)
    assert not state.is_complete, "a b may follow"
    state.advance(last)
    assert state.is_complete
    other = compiler.start("regex", "ab?")
    other.advance(a)
    other.advance(b)
    assert other.is_complete


def test_what_is_known_below_a_token_stays_known(compiler):
    state = compiler.start("regex", "abc")
    a, b = ids_of("ab")
    below = state.mask_after((a, b))
    state.advance(a)
    assert state.mask_after((b,)) is below


def test_a_forbidden_token_is_an_error(compiler):
    state = compiler.start("regex", "ab")
    state.advance(ids_of("b")[0])
    assert "does not allow token" in state.error


def advance_while_possible(state, drafts: int) -> tuple[int, str]:
    """With so many drafts looked at before each token: how far it comes, and why no further."""
    a, count = ids_of("a")[0], 0
    while count < 50:
        for depth in range(drafts + 1):
            state.mask_after((a,) * depth)
        assert state.error is None, "what is asked about drafts is no error of the text"
        state.advance(a)
        if state.error:
            return count, state.error
        count += 1
    raise AssertionError("no limit was reached")


@pytest.mark.parametrize("drafts", [0, 1, 3, 5])
def test_limits_behind_drafts_are_none_of_the_texts(compiler, drafts):
    """Nor are those that other requests have used up of the automaton that they share."""
    for _ in range(3):
        count, error = advance_while_possible(compiler.start("regex", LIMITED), drafts)
        assert count >= 2, "as with a matcher of its own"
        assert "too many expressions" in error


def test_renewals_are_bounded(compiler, monkeypatch):
    renewed, renew = [], CompiledGuide.renew
    monkeypatch.setattr(CompiledGuide, "renew", lambda guide: (renewed.append(guide), renew(guide)))
    state = compiler.start("regex", LIMITED)
    a = ids_of("a")[0]
    for depth in range(40):
        state.mask_after((a,) * depth)
    assert len(renewed) == MOST_RENEWALS
    state.advance(a)
    assert state.error


def test_tokens_that_the_model_does_not_have_are_not_legal(tmp_path):
    """The tokenizer's last ids are beyond the model's vocabulary: one eos or both."""
    a = ids_of("a")[0]
    state = compiler_in(tmp_path / "one", vocab_size=END_ID).start("regex", "a")
    assert len(state.legal_after(())) == END_ID
    assert np.flatnonzero(state.legal_after((a,))).tolist() == [OTHER_END_ID]
    state = compiler_in(tmp_path / "both", vocab_size=OTHER_END_ID).start("regex", "a")
    assert state.legal_after(()) is not None
    assert state.legal_after((a,)) is None, "a row without a token is no distribution"
