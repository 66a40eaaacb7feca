"""Guides, which say what the text as a whole must be, as automata over a checkpoint's tokens. No torch."""

from specbackend.grammar.compiler import GrammarCompiler
from specbackend.grammar.state import GrammarState

__all__ = ["GrammarCompiler", "GrammarState"]
