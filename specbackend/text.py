"""From token ids to text a client may see: only complete characters, never a part of a stop string. Pure Python."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from specbackend.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"  # what decoders print for bytes that are no character, or not yet
MAX_PENDING = 64  # tokens that may wait for a character to become complete; no character has more bytes than 4

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Incremental decoding. Tokens cannot be decoded one by one (a character may span several, and spaces depend on the
    neighbour), so each call decodes a short window and returns what is new in it:

        ... | context: the last tokens that ended on a complete character | pending: what came since |
    """

    def __init__(self, decode: Decode):
        self._decode = decode
        self._context: list[int] = []
        self._context_chars = 0
        self._pending: list[int] = []
        self._sent_chars = 0  # of the pending tokens' text

    def push(self, token_ids: Sequence[int]) -> str:
        """Take new tokens and return the text that they complete."""
        self._pending.extend(token_ids)
        text = self._pending_text()
        complete = not text.endswith(REPLACEMENT) or len(self._pending) > MAX_PENDING
        new = (text if complete else text.rstrip(REPLACEMENT))[self._sent_chars :]
        self._sent_chars += len(new)
        if not text:
            self._pending = self._pending[-MAX_PENDING // 2 :]  # a run of eos has no text, however long it gets
        elif complete:  # tokens without text stay pending: alone they would be a misleading context
            self._context, self._pending, self._sent_chars = self._pending, [], 0
            self._context_chars = len(self._decode(self._context))
        return new

    def flush(self) -> str:
        """Return what was held back; an incomplete character shows as U+FFFD."""
        rest = self._pending_text()[self._sent_chars :]
        self._sent_chars += len(rest)
        return rest

    def _pending_text(self) -> str:
        return self._decode(self._context + self._pending)[self._context_chars :]


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
        safe = len(self._held) - self._partial_length()
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

    def _partial_length(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


@dataclass(frozen=True)
class Piece:
    """What one batch of tokens adds to an answer."""

    text: str
    token_ids: list[int] = field(default_factory=list)  # those up to the stop string; all of them if there is none
    stopped: bool = False  # a stop string is complete: the answer ends here


class TextStream:
    """The text of one answer, from its tokens: what `params` say of special tokens and of the end. Source: vLLM.

    decode: also takes `skip_special_tokens`.
    """

    def __init__(self, decode: Callable[..., str], params: SamplingParams):
        self._detokenizer = Detokenizer(partial(decode, skip_special_tokens=params.skip_special_tokens))
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
