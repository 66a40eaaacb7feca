"""From token ids to text a client may see: only complete characters, never a part of a stop string. Pure Python."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from specbackend.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"  # what decoders print for bytes that are no character, or not yet
MOST_MISSING = 3  # bytes at the end of a text that may yet become a character: none has more than 4
MAX_PENDING = 64  # tokens that may wait until one ends where a character does
LONG_CONTEXT = 8  # tokens: as good as all that were before

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Incremental decoding. Tokens cannot be decoded one by one (a character may span several, and spaces depend on the
    neighbour), so each call decodes a short window and returns what is new in it:

        ... | context: the last tokens that ended on a complete character | pending: what came since |

    All of it together is the decoder's text of all tokens; but where a decoder with tokens for bytes takes back a
    character because bytes that are none follow, what was sent stays.

    prompt_ids: tokens in front, whose text is not returned. Without them the first token begins a text, and loses the
    space in front of it in sentencepiece's families.
    """

    def __init__(self, decode: Decode, prompt_ids: Sequence[int] = ()):
        self._decode = decode
        self._set_context(self._end_of(prompt_ids))
        self._pending: list[int] = []
        self._text = ""  # of the pending tokens
        self._sent_chars = 0  # of it

    def push(self, token_ids: Sequence[int]) -> str:
        """Take new tokens and return the text that they complete; how they are cut into calls makes no difference."""
        text = self._text_of([*self._pending, *token_ids])
        if REPLACEMENT in text and len(token_ids) > 1:  # whether a character is complete may depend on when one looks
            return "".join(self.push([token]) for token in token_ids)
        self._pending.extend(token_ids)
        self._text = text
        missing = min(len(text) - len(text.rstrip(REPLACEMENT)), MOST_MISSING)
        new = text[self._sent_chars : len(text) - missing]
        self._sent_chars += len(new)
        if not text:  # a run of eos has none, however long it gets; a space in front of all may have some later
            self._pending = list(dict.fromkeys(self._pending))
        elif not missing:
            self._settle()
        elif len(self._pending) > MAX_PENDING:
            self._forget()
        return new

    def flush(self) -> str:
        """Return what was held back; an incomplete character shows as U+FFFD."""
        rest, self._sent_chars = self._text[self._sent_chars :], len(self._text)
        return rest

    def _text_of(self, pending: list[int]) -> str:
        text = self._decode(self._context + pending)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return self._decode(pending)  # bytes that are no character, behind a character of bytes

    def _settle(self) -> None:
        """The pending tokens are the next context, with the last one where they have no text without."""
        both = self._context + self._pending
        self._set_context(self._pending)
        if not self._context_text:
            self._set_context(self._end_of(both))
        self._pending, self._text, self._sent_chars = [], "", 0

    def _set_context(self, token_ids: list[int]) -> None:
        self._context, self._context_text = token_ids, self._decode(token_ids)

    def _end_of(self, token_ids: Sequence[int]) -> list[int]:
        """A few tokens that begin where a character does: with no more bytes that are none than there must be."""
        windows = [list(token_ids[-size:]) for size in range(LONG_CONTEXT, LONG_CONTEXT + MOST_MISSING + 1)]
        return min(windows, key=lambda window: self._decode(window).count(REPLACEMENT))

    def _forget(self) -> None:
        """Drop pending tokens that nothing depends on any more, and those without text."""
        unsent = len(self._text) - self._sent_chars
        self._pending = [token for token in self._pending if self._decode([token])][-MAX_PENDING // 2 :]
        self._set_context([])
        self._text = self._text_of(self._pending)
        self._sent_chars = len(self._text) - unsent


def partial_length(text: str, strings: Sequence[str]) -> int:
    """Length of the longest end of the text that begins one of the strings, and is not all of it."""
    longest = max(map(len, strings), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        tail = text[-length:]
        if any(string.startswith(tail) for string in strings):
            return length
    return 0


class StopMatcher:
    """Finds the first stop string in text that arrives in pieces; where the pieces are cut makes no difference."""

    def __init__(self, stops: Sequence[str], keep: bool = False):
        self._stops = tuple(stops)
        self._keep = keep  # a stop string that is found is text too
        self._held = ""
        self.found: str | None = None  # the stop string that is complete

    def push(self, text: str, look: bool = True) -> tuple[str, bool]:
        """Return the text in front of anything that is, or may become, a stop string, and whether one is complete.

        With `look` false, no stop string ends in this text; one may begin in it.
        """
        known, self._held = len(self._held), self._held + text
        if look and (match := self._first_match(known)):
            start, end = match
            self.found = self._held[start:end]
            return self._held[: end if self._keep else start], True
        safe = len(self._held) - partial_length(self._held, self._stops)
        passed, self._held = self._held[:safe], self._held[safe:]
        return passed, False

    def flush(self) -> str:
        """Return what was held back in case a stop string went on."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, known: int) -> tuple[int, int] | None:
        """Where the match is that is complete first, as if characters came one by one; of several the longest.

        It ends behind the first `known` characters.
        """
        ends = []
        for stop in self._stops:
            start = self._held.find(stop, max(known - len(stop) + 1, 0))
            if start >= 0:
                ends.append((start + len(stop), start))
        if not ends:
            return None
        end, start = min(ends)
        return start, end


@dataclass(frozen=True)
class Piece:
    """What one batch of tokens adds to an answer."""

    text: str
    token_ids: list[int] = field(default_factory=list)  # those up to the stop string; all of them if there is none
    stopped: bool = False  # a stop string is complete: the answer ends here


class TextStream:
    """The text of one answer, from its tokens: what `params` say of special tokens and of the end. Source: vLLM.

    decode: also takes `skip_special_tokens`.
    prompt_ids: the prompt, if the text goes on from it.
    """

    def __init__(self, decode: Callable[..., str], params: SamplingParams, prompt_ids: Sequence[int] = ()):
        decode = partial(decode, skip_special_tokens=params.skip_special_tokens)
        self._detokenizer = Detokenizer(decode, prompt_ids)
        self._matcher = StopMatcher(params.stop, keep=params.include_stop_str_in_output)
        self._params = params
        self._count = 0  # tokens so far

    @property
    def stop_string(self) -> str | None:
        """The one that ended the text, if one did."""
        return self._matcher.found

    def push(self, token_ids: Sequence[int], last: bool = False, has_end_token: bool = False) -> Piece:
        """Take new tokens. With `last`, nothing is held back any more; the last of all may be an end token."""
        shown = list(token_ids)
        if has_end_token and not self._params.include_stop_str_in_output:
            shown = shown[:-1]  # it is no text, special or not
        piece = self._push_each(shown) if self._params.stop else Piece(self._detokenizer.push(shown), shown)
        if not last or piece.stopped:
            return piece
        piece = self._flush(piece)
        return piece if piece.stopped else replace(piece, token_ids=list(token_ids))

    def _push_each(self, token_ids: list[int]) -> Piece:
        """One token at a time, so that the answer ends with the same token however many came at once."""
        passed = ""
        for count, token in enumerate(token_ids, start=1):
            self._count += 1
            text, stopped = self._matcher.push(self._detokenizer.push([token]), look=self._may_stop)
            passed += text
            if stopped:
                return Piece(passed, token_ids[:count], stopped=True)
        return Piece(passed, token_ids)

    def _flush(self, piece: Piece) -> Piece:
        text, stopped = self._matcher.push(self._detokenizer.flush(), look=self._may_stop)
        rest = "" if stopped else self._matcher.flush()
        return Piece(piece.text + text + rest, piece.token_ids, stopped)

    @property
    def _may_stop(self) -> bool:
        """The text of the first min_new_tokens tokens ends nothing."""
        return self._count > self._params.min_new_tokens
