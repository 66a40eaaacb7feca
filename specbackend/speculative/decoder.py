"""What the engine needs of a decoder. Plain and speculative decoding differ behind this and nowhere else."""

from typing import Protocol

from specbackend.batch import Accepted, DecodeBatch, ExtendBatch


class Decoder(Protocol):
    num_nodes: int  # slots a request must hold beyond its computed tokens before a decode step

    def extend(self, batch: ExtendBatch) -> Accepted:
        """Compute prompt chunks; a request whose chunk is final gets one token, the others none."""

    def decode(self, batch: DecodeBatch) -> Accepted:
        """Take one step; every request gets at least one token."""
