"""What a model thinks and what it says, apart: `<think>...</think>` in front of the answer, as it streams."""

from collections.abc import Callable
from dataclasses import dataclass

from specbackend.errors import ConfigError
from specbackend.text import partial_length

BEGIN, END = "<think>", "</think>"
# SGLang's names; whether an answer begins within, because the chat template has opened it.
REASONING_PARSERS = {"deepseek-r1": True, "qwen3": False, "mimo": False}


@dataclass(frozen=True)
class ReasoningDelta:
    """What is new of both."""

    reasoning_content: str = ""
    content: str = ""


class ReasoningParser:
    """Takes the text of one answer in pieces; how they are cut makes no difference.

    Only what an answer begins with is thought: a mark further on is text, as is one that never closes. Spaces around
    the marks belong to neither side. `may_begin_within` False: there is no thought without its mark, whatever the name.
    Raises ConfigError for a name that is none of REASONING_PARSERS.
    """

    def __init__(self, name: str, may_begin_within: bool = True):
        if name not in REASONING_PARSERS:
            raise ConfigError(f"reasoning_parser: must be one of {', '.join(REASONING_PARSERS)}, got {name!r}")
        self._begins_within = REASONING_PARSERS[name] and may_begin_within
        self._held = ""  # not decided yet
        self._at_start = True  # of the thought, or of what is said behind it: spaces there are dropped
        self._step: Callable[[bool], ReasoningDelta] = self._before

    def push(self, text: str) -> ReasoningDelta:
        self._held += text
        return self._step(False)

    def finish(self) -> ReasoningDelta:
        """The answer is over: nothing is held back any more."""
        return self._step(True)

    def _before(self, last: bool) -> ReasoningDelta:
        text = self._held.lstrip()
        if BEGIN.startswith(text) and text != BEGIN and not last:
            return ReasoningDelta()
        if text.startswith(BEGIN):
            self._held = text.removeprefix(BEGIN)
        elif not self._begins_within:
            self._at_start = False
            return self._go_on(self._behind, last)
        return self._go_on(self._within, last)

    def _within(self, last: bool) -> ReasoningDelta:
        thought, mark, rest = self._take(last).partition(END)
        if mark:
            self._held, self._at_start = rest, True
            return ReasoningDelta(thought.rstrip(), self._go_on(self._behind, last).content)
        known = thought[: len(thought) - (0 if last else partial_length(thought, [END]))]
        known = known if last else known.rstrip()
        self._held = thought[len(known) :]
        return ReasoningDelta(reasoning_content=known)

    def _behind(self, last: bool) -> ReasoningDelta:
        return ReasoningDelta(content=self._take(last))

    def _go_on(self, step: Callable[[bool], ReasoningDelta], last: bool) -> ReasoningDelta:
        self._step = step
        return step(last)

    def _take(self, last: bool) -> str:
        text, self._held = self._held.lstrip() if self._at_start else self._held, ""
        self._at_start = self._at_start and not text
        return text
