"""The memory that holds the blocks: one region, mapped by the sidecar and by every engine."""

import fcntl
import mmap
import os
from collections.abc import Sequence

import numpy as np

UNIT_BYTES = 64 << 10  # a block is some of these, anywhere: models with blocks of any size share the arena
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Arena:
    """Memory without a name, cut into units. It ends with the last process that has it mapped."""

    def __init__(self, fd: int, size: int):
        """Map memory that `create_memory` made elsewhere; the descriptor stays the caller's.

        Raises ValueError if it is less than `size`, or could become so: to touch what is not there ends a process.
        """
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ValueError("the arena is not sealed against truncation")
        memory = mmap.mmap(fd, size)  # which looks whether there is so much
        self._units = np.frombuffer(memory, np.uint8).reshape(-1, UNIT_BYTES)

    @property
    def num_units(self) -> int:
        return len(self._units)

    def read(self, units: Sequence[int], block: np.ndarray) -> None:
        """Copy a block out, into uint8 [block_bytes]. Raises IndexError for a unit that does not exist."""
        for unit, part in zip(units, _parts(block), strict=True):
            part[:] = self._units[unit, : len(part)]

    def write(self, units: Sequence[int], block: np.ndarray) -> None:
        """Copy uint8 [block_bytes] in. Raises IndexError for a unit that does not exist."""
        for unit, part in zip(units, _parts(block), strict=True):
            self._units[unit, : len(part)] = part


def create_memory(size: int) -> int:
    """A descriptor of `size` bytes, rounded down to units, which come into being with `provide`."""
    fd = os.memfd_create("specbackend_radix", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size // UNIT_BYTES * UNIT_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


def provide(fd: int, first: int, count: int) -> None:
    """Make sure of the memory of these units, before somebody touches it who would die of its lack. Raises OSError."""
    os.posix_fallocate(fd, first * UNIT_BYTES, count * UNIT_BYTES)


def units_for(num_bytes: int) -> int:
    """How many units a block takes."""
    return -(-num_bytes // UNIT_BYTES)


def _parts(block: np.ndarray) -> list[np.ndarray]:
    return [block[start : start + UNIT_BYTES] for start in range(0, len(block), UNIT_BYTES)]
