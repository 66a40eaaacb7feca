"""Index and memory together: what the sidecar itself does with blocks."""

from dataclasses import dataclass

import numpy as np

from specbackend.radix.arena import Arena
from specbackend.radix.index import Block, BlockIndex, Holder
from specbackend.radix.keys import checksum


@dataclass(frozen=True)
class BlockCache:
    index: BlockIndex
    arena: Arena

    def read(self, block: Block) -> np.ndarray | None:
        """A copy of a block that the caller has leased, uint8 [num_bytes]; None if it is not what was written."""
        payload = np.empty(block.num_bytes, np.uint8)
        self.arena.read(block.unit_numbers(), payload)
        return payload if checksum(block.key, payload) == block.checksum else None

    def publish(self, holder: Holder, key: bytes, payload: np.ndarray) -> None:
        """Add a block, unless it is there or there is no room."""
        grant = self.index.reserve(holder, [key], len(payload))
        for block in grant.blocks:
            self.arena.write(block.unit_numbers(), payload)
            self.index.commit(holder, grant.number, [checksum(key, payload)])
