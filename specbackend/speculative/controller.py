"""Whether a step should draft, decided from what steps have cost and gained.

Speculation lives on credit, counted in plain steps. A step with a tree earns the plain steps that its tokens would have
taken, and pays the plain steps that its time would have held. A plain step earns a little interest. As long as the
credit can pay for a tree of which nothing is accepted, there is one. So whatever the text, the draft and the batches,
speculation never costs more than the credit it started with and the interest; what it gained before counts up to a
limit, or it would take long to see that it has become useless.
"""

import math
from dataclasses import dataclass

START_CREDIT = 4.0  # what a draft may cost before it has gained anything
MOST_CREDIT = 12.0
MOST_LOSS = 2.0  # of one step, or a first one that something held up would cost all the credit
INTEREST = 0.01  # per plain step: how much of the time goes into trying again
# A plain step after so many with a tree, to see what it costs by now; sooner where speculation is in doubt.
STEPS_BETWEEN_PLAIN, STEPS_IN_DOUBT = 64, 4
MOST_RISE = 1.005  # per step


@dataclass
class StepTime:
    """What a kind of step takes where nothing holds it up: less at once, but more only by and by."""

    seconds: float = math.inf
    age: int = 0  # steps since one was measured

    def note(self, seconds: float) -> None:
        self.seconds = min(seconds, self.seconds * MOST_RISE**self.age)
        self.age = 0


class Account:
    """Of batches of about one size."""

    def __init__(self, credit: float):
        self.credit = credit
        self._plain, self._drafted = StepTime(), StepTime()

    @property
    def can_draft(self) -> bool:
        most = STEPS_BETWEEN_PLAIN if self.credit > START_CREDIT else STEPS_IN_DOUBT
        return self._plain.age < most and self._plain.seconds < math.inf and self.credit >= self._loss(accept_length=1)

    def note_plain(self, seconds: float) -> None:
        self._note(self._plain, seconds)
        self.credit = max(self.credit, min(self.credit + INTEREST, START_CREDIT))

    def note_drafted(self, seconds: float, accept_length: float) -> None:
        self._note(self._drafted, seconds)
        self.credit = min(self.credit - self._loss(accept_length), MOST_CREDIT)

    def _note(self, kind: StepTime, seconds: float) -> None:
        self._plain.age += 1
        self._drafted.age += 1
        kind.note(seconds)

    def _loss(self, accept_length: float) -> float:
        """Of a step with a tree, in plain steps, which are never the longer ones; nothing until both are known."""
        is_known = self._drafted.seconds < math.inf and self._plain.seconds < math.inf
        ratio = max(1.0, self._drafted.seconds / self._plain.seconds) if is_known else 1.0
        return min(ratio - accept_length, MOST_LOSS)


class Controller:
    """One account for each doubling of the batch, as what a tree costs depends on the batch."""

    def __init__(self):
        self._accounts: dict[int, Account] = {}
        self._last_credit = START_CREDIT

    def drafts(self, batch_size: int) -> bool:
        """Whether the next step of so many requests should have trees."""
        return self._account(batch_size).can_draft

    def note_plain(self, batch_size: int, seconds: float) -> None:
        """A step without trees has taken so long."""
        account = self._account(batch_size)
        account.note_plain(seconds)
        self._last_credit = account.credit

    def note_drafted(self, batch_size: int, seconds: float, accept_length: float) -> None:
        """A step with trees has taken so long. accept_length: tokens per request."""
        account = self._account(batch_size)
        account.note_drafted(seconds, accept_length)
        self._last_credit = account.credit

    def _account(self, batch_size: int) -> Account:
        """A size that is new goes on with what the engine has come to think of its draft."""
        size = (batch_size - 1).bit_length()
        if size not in self._accounts:
            self._accounts[size] = Account(min(self._last_credit, START_CREDIT))
        return self._accounts[size]
