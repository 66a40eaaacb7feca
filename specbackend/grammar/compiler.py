"""What a client writes becomes an automaton, within limits: a hostile guide costs an error message."""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from specbackend.errors import InvalidRequest
from specbackend.grammar.ebnf import ebnf_to_lark
from specbackend.grammar.json_limits import check_json_schema
from specbackend.grammar.state import CompiledGuide, GrammarState, describe
from specbackend.tokenizer import Tokenizer

MOST_COMPILED = 64  # the guides used last are kept
LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=500_000,
    step_max_items=100_000,
    max_items_in_row=2_000,
    max_lexer_states=50_000,  # of 1 to 2 KB
    max_grammar_size=100_000,
    verbose_errors=False,
)
# Between two tokens of JSON: a space, or a new line and its indentation. A weak model would fill more with more.
JSON_OPTIONS = {"whitespace_pattern": r"( |\n[ \t]{0,16})?", "lenient": False, "coerce_one_of": False}


class GrammarCompiler:
    """Compiles guides against a checkpoint's tokens.

    Any of `eos_token_ids` may end the text, exactly where the guide is satisfied. Raises ValueError if the tokenizer is
    none whose tokens stand for bytes.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]):
        num_tokens = max(vocab_size, tokenizer.vocab_size)
        self._tokens = LLTokenizer(tokenizer.to_json(), n_vocab=num_tokens, eos_token=list(eos_token_ids))
        self._vocab_size = vocab_size
        self._vocabulary = np.packbits(np.ones(vocab_size, dtype=bool), bitorder="little")
        self._compiled = lru_cache(MOST_COMPILED)(self._compile)

    def start(self, kind: str, text: str) -> GrammarState:
        """A state before the first token. `kind` is the field of SamplingParams that has `text`.

        Raises InvalidRequest, naming it.
        """
        return GrammarState(self._compiled(kind, text))

    def _compile(self, kind: str, text: str) -> CompiledGuide:
        try:
            grammar = _TO_GRAMMAR[kind](text)
        except ValueError as error:
            raise InvalidRequest(kind, str(error)) from error
        make_matcher = partial(LLMatcher, self._tokens, grammar, log_level=0, limits=LIMITS)
        guide = CompiledGuide(make_matcher, self._vocab_size, self._vocabulary)
        if guide.matcher.is_error():
            raise InvalidRequest(kind, f"cannot be compiled: {describe(guide.matcher.get_error())}")
        self._check_start(kind, GrammarState(guide))
        return guide

    def _check_start(self, kind: str, state: GrammarState) -> None:
        state.mask_after(())
        if state.dead_end:
            raise InvalidRequest(kind, f"allows no first token: {state.dead_end}")


def _json_schema(text: str) -> str:
    check_json_schema(text)
    return LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)


def _ebnf(text: str) -> str:
    return LLMatcher.grammar_from_lark(ebnf_to_lark(text))


def _choice(text: str) -> str:
    """All in one terminal, so that there is one automaton, however many there are."""
    choices = " | ".join(json.dumps(each) for each in json.loads(text))
    return LLMatcher.grammar_from_lark(f"start: TEXT\nTEXT: {choices}")


_TO_GRAMMAR: dict[str, Callable[[str], str]] = {
    "json_schema": _json_schema,
    "regex": LLMatcher.grammar_from_regex,
    "ebnf": _ebnf,
    "choice": _choice,
}
