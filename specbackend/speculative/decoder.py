"""What the engine needs of a decoder. Plain and speculative decoding differ behind this and nowhere else."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from specbackend.batch import Accepted, DecodeBatch, ExtendBatch


@dataclass(frozen=True)
class Step:
    """A step that the device has been told to take."""

    batch: ExtendBatch | DecodeBatch
    read: Callable[[], Accepted]  # waits for the device; to be called once
    goes_on: bool = False  # its decoder can begin the next before this one is read


def part(step: Step, rows: list[int]) -> Step | None:
    """A decode step without those of its requests that are gone; None if all are."""
    if not rows:
        return None
    batch = DecodeBatch([step.batch.requests[row] for row in rows], step.batch.started_ns)

    def read() -> Accepted:
        accepted = step.read()
        return Accepted(accepted.token_BP[rows], accepted.count_B[rows])

    return Step(batch, read)


class Decoder(Protocol):
    num_nodes: int  # slots a request must hold beyond its computed tokens before a decode step

    def extend(self, batch: ExtendBatch) -> Accepted:
        """Compute prompt chunks; a request whose chunk is final gets one token, the others none."""

    def begin(self, batch: DecodeBatch) -> Step:
        """Take one step; every request gets at least one token."""

    def begin_next(self, step: Step) -> Step | None:
        """The same requests' next step, from where the one that was begun last leaves them.

        That one goes on and is not read. None if its results must be known first.
        """


class EagerDecoder:
    """Of a decoder whose steps need the host all the way: one is over when it has begun, and none goes on."""

    def decode(self, batch: DecodeBatch) -> Accepted:
        raise NotImplementedError

    def begin(self, batch: DecodeBatch) -> Step:
        accepted = self.decode(batch)
        return Step(batch, lambda: accepted)

    def begin_next(self, step: Step) -> None:
        return None
