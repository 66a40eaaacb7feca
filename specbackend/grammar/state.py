"""Where a request stands in its grammar, and which tokens may follow: its text, and drafts of what is next."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from llguidance import LLMatcher

EXHAUSTED = "a limit of the automaton is reached"  # llguidance may refuse a token then, without a word
MOST_RENEWALS = 16  # by one request
Path = tuple[int, ...]  # drafted tokens that follow the text
Known = TypeVar("Known")
Answer = TypeVar("Answer")


@dataclass
class CompiledGuide:
    """A guide's automaton is built as it is walked, by all the requests that have the guide together."""

    compile: Callable[[], LLMatcher]
    vocab_size: int
    vocabulary: np.ndarray  # uint8, a bit for each token that the model has; the tokenizer may have more
    matcher: LLMatcher = field(init=False)  # before the first token, to be copied; copies share the automaton

    def __post_init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Begin an automaton of its own for the requests to come."""
        self.matcher = self.compile()


class GrammarState:
    """Follows one text. What is asked about paths beyond it leaves it where it is, and is remembered until it goes on.

    An error (a limit of the library, mostly) behind drafts is one of the text only once they belong to it.
    """

    def __init__(self, guide: CompiledGuide):
        self.error: str | None = None  # why the text cannot go on
        self.is_complete = False  # nothing but an eos can follow
        self._guide = guide
        self._text: list[int] = []
        self._renewals = 0
        self._masks: dict[Path, np.ndarray | None] = {}
        self._errors: dict[Path, str] = {}
        self._restart()

    def advance(self, token: int) -> None:
        """The text goes on with this token."""
        is_complete = self._ask((token,), LLMatcher.is_stopped)
        self.error = self.dead_end or self._errors.get((token,))
        if is_complete is None and self.error is None:
            self.error = f"does not allow token {token} here"
        if self.error is not None:
            return
        self.is_complete = is_complete
        self._at = self._at[1:]
        self._text.append(token)
        self._masks, self._errors = _below(token, self._masks), _below(token, self._errors)

    @property
    def dead_end(self) -> str | None:
        """Why no token can follow the text, if that has been found out."""
        return self._errors.get(())

    def mask_after(self, path: Path) -> np.ndarray | None:
        """Which tokens may follow the path: uint8, a bit for each, lowest first. None if the path itself may not be."""
        if path not in self._masks:
            self._masks[path] = self._mask(path)
        return self._masks[path]

    def legal_after(self, path: Path) -> np.ndarray | None:
        """The same as bool [V]."""
        mask = self.mask_after(path)
        return None if mask is None else unpack(mask, self._guide.vocab_size)

    def count_legal(self, path: Path) -> int:
        """How many tokens of the path may follow, up to the first that may not."""
        self._ask(path, LLMatcher.is_stopped)
        return len(self._at)

    def _mask(self, path: Path) -> np.ndarray | None:
        bits = self._ask(path, LLMatcher.compute_bitmask)
        if bits is None:
            return None
        vocabulary = self._guide.vocabulary
        mask = np.frombuffer(bits, np.uint8, count=len(vocabulary)) & vocabulary
        if mask.any():
            return mask
        self._errors[path] = "leaves no token to go on with"
        return None

    def _ask(self, path: Path, question: Callable[[LLMatcher], Answer]) -> Answer | None:
        """Of the matcher at the end of the path; None if the grammar forbids the path, or there is an error.

        What has been walked, by other requests too, counts towards the limits of an automaton. So an error is one of
        this path only if it comes again with a new automaton; no request gets many of these, as they may be costly.
        """
        error = None
        for _ in range(2):
            answer, error = self._try(path, question)
            if error is None:
                return answer
            if self._renewals == MOST_RENEWALS:
                path = ()
                break
            self._renew()
        self._errors[path] = error
        return None

    def _try(self, path: Path, question: Callable[[LLMatcher], Answer]) -> tuple[Answer | None, str | None]:
        """The answer, and what error there was: a matcher never leaves its error state."""
        reached = self._follows_text and self._seek(path)
        answer = question(self._matcher) if reached else None
        if self._matcher.is_error():
            return None, describe(self._matcher.get_error())
        if not reached and (not self._follows_text or self._is_promised(path)):
            return None, EXHAUSTED
        return answer, None

    def _is_promised(self, path: Path) -> bool:
        """Whether the token that was refused is one that a mask allows. (Where the text is complete, an eos is.)"""
        token, mask = path[len(self._at)], self._masks.get(self._at)
        return mask is not None and not self._matcher.is_stopped() and bool(mask[token >> 3] >> (token & 7) & 1)

    def _seek(self, path: Path) -> bool:
        """Take the matcher along the path, as far as the grammar allows; False if that is not its end."""
        shared = _shared_length(self._at, path)
        self._matcher.rollback(len(self._at) - shared)
        taken = self._matcher.try_consume_tokens(list(path[shared:]))
        self._at = path[: shared + taken]
        return self._at == path

    def _renew(self) -> None:
        self._renewals += 1
        self._guide.renew()
        self._restart()

    def _restart(self) -> None:
        self._matcher = self._guide.matcher.deep_copy()
        self._follows_text = self._matcher.try_consume_tokens(self._text) == len(self._text)
        self._at: Path = ()


def unpack(mask: np.ndarray, vocab_size: int) -> np.ndarray:
    return np.unpackbits(mask, count=vocab_size, bitorder="little").view(bool)


def _shared_length(one: Path, other: Path) -> int:
    """Of their common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def describe(error: str) -> str:
    """The telling line of llguidance's messages, some of which quote the whole grammar."""
    lines = error.splitlines()
    return next((line for line in lines if line.startswith("error: ")), lines[0]).removeprefix("error: ")[:300]


def _below(token: int, known: dict[Path, Known]) -> dict[Path, Known]:
    """What is known behind this token."""
    return {path[1:]: value for path, value in known.items() if path[:1] == (token,)}
