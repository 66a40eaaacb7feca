"""A vocabulary of bytes, and a matcher that is asked about whole texts only: what the states are compared with."""

from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from specbackend.grammar import GrammarCompiler
from specbackend.tokenizer import Tokenizer
from tests.fakes import END_ID, byte_tokenizer, save_byte_checkpoint

VOCAB_SIZE = 277  # more than the tokenizer's, and no multiple of 8
OTHER_END_ID = END_ID - 1
EOS = (END_ID, OTHER_END_ID)


def make_compiler(folder: Path, vocab_size: int = VOCAB_SIZE) -> GrammarCompiler:
    return GrammarCompiler(Tokenizer(save_byte_checkpoint(folder)), vocab_size, EOS)


def ids_of(text: str) -> list[int]:
    return byte_tokenizer().encode(text).ids


def text_of(ids: list[int]) -> str:
    return byte_tokenizer().decode(ids)


def fresh_matcher(grammar: str) -> LLMatcher:
    tokens = LLTokenizer(byte_tokenizer().to_str(), n_vocab=VOCAB_SIZE, eos_token=list(EOS))
    matcher = LLMatcher(tokens, grammar)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def legal_by_definition(matcher: LLMatcher, text: list[int]) -> np.ndarray | None:
    """bool [V] after the whole text; None if the grammar forbids it."""
    matcher.reset()
    for token in text:
        if matcher.try_consume_tokens([token]) == 0:
            return None
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    return bits[:VOCAB_SIZE].astype(bool)
