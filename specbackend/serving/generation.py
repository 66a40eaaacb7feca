"""One call on its way: from the engine's updates to the outputs of its responses. Knows neither sockets nor Triton."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from specbackend.request import FinishReason, Update
from specbackend.serving.calls import Call
from specbackend.text import Piece, TextStream


@dataclass
class Unsent:
    """What the next response will carry."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_updates: int = 0

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.num_updates += 1


class Generation:
    """The answer to one call as it grows. `finish_reason` is set with the last response."""

    def __init__(
        self,
        request_id: str,
        call: Call,
        decode: Callable[[Sequence[int]], str],
        stream_interval: int = 1,
        num_draft_tokens: int = 0,
    ):
        self.request_id = request_id  # our own: clients' ids may collide
        self.call = call
        self.finish_reason: FinishReason | None = None
        self._text = TextStream(decode, call.params.stop)
        self._unsent = Unsent(text=call.echo)
        self._stream_interval = stream_interval
        self._drafted_per_step = max(num_draft_tokens - 1, 0) if call.params.speculative else 0
        self._update = Update(request_id, [], prompt_tokens=len(call.input_ids))
        self._started = False
        self._first_token_ns = self._last_token_ns = 0

    def advance(self, update: Update) -> dict[str, object] | None:
        """Take an update. Returns the outputs to send now, None if there is nothing to send yet."""
        self._note_time()
        self._update = update
        piece = self._text.push(update.token_ids, last=update.finished)
        self._unsent.add(piece)
        self.finish_reason = FinishReason.STOP if piece.stopped else update.finish_reason
        if self.finish_reason or self._is_due():
            return self._take_outputs()
        return None

    def abort(self) -> dict[str, object]:
        """End here; returns the outputs of the last response."""
        self._unsent.add(self._text.push([], last=True))
        self.finish_reason = FinishReason.ABORT
        return self._take_outputs()

    def _is_due(self) -> bool:
        interval = self._stream_interval if self._started else 1
        return self.call.stream and bool(self._unsent.text) and self._unsent.num_updates >= interval

    def _note_time(self) -> None:
        self._last_token_ns = time.monotonic_ns()
        self._first_token_ns = self._first_token_ns or self._last_token_ns

    def _take_outputs(self) -> dict[str, object]:
        unsent, self._unsent, self._started = self._unsent, Unsent(), True
        values = {
            "text_output": unsent.text,
            "output_ids": unsent.token_ids,
            "num_input_tokens": len(self.call.input_ids),
            "num_output_tokens": len(unsent.token_ids),
        }
        if self.finish_reason:
            values |= {"finish_reason": self.finish_reason.value, **self._perf_metrics()}
        return {name: value for name, value in values.items() if name in self.call.outputs}

    def _perf_metrics(self) -> dict[str, object]:
        tokens, steps = self._update.completion_tokens, self._update.spec_verify_ct
        drafted = steps * self._drafted_per_step
        # the prefill gives the first token and every step one of the target's own; the others were drafted
        accepted = max(tokens - 1 - steps, 0) if drafted else 0
        return {
            "num_cached_tokens": self._update.cached_tokens,
            "kv_cache_reused_blocks": self._update.cached_tokens,
            "acceptance_length": tokens / max(steps, 1),
            "acceptance_rate": accepted / max(drafted, 1),
            "total_accepted_draft_tokens": accepted,
            "total_draft_tokens": drafted,
            "num_spec_steps": steps,
            "arrival_time_ns": self.call.arrival_ns,
            "first_token_time_ns": self._first_token_ns,
            "last_token_time_ns": self._last_token_ns,
        }
