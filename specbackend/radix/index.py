"""Which block lies where, who uses it, and which one goes when room is needed."""

import logging
import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from specbackend.radix.arena import units_for

UNIT_TYPE = "I"  # of a unit's number, for array and numpy
GROWTH_UNITS = 64  # a few MiB, so that nobody waits long for them
COUNTERS = ("lookups", "hit_blocks", "missed_blocks", "committed_blocks", "evicted_blocks", "poisoned_blocks")

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Block:
    """KV under a key. Free units belong to no block; a block without a checksum is being filled by its holder."""

    key: bytes
    units: bytes  # their numbers, as an array of unsigned ints
    num_bytes: int
    checksum: int | None = None
    leases: int = 0
    is_listed: bool = True  # else it is gone with its last lease

    def unit_numbers(self) -> array:
        return array(UNIT_TYPE, self.units)


@dataclass(eq=False)
class Holder:
    """Somebody with leases and reservations, each under a number of his: a connection, or a task of the sidecar's."""

    leased: dict[int, list[Block]] = field(default_factory=dict)
    reserved: dict[int, list[Block]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=count)


@dataclass(frozen=True)
class Grant:
    """Blocks that a holder got, and the number under which it gives them back, unless there are none."""

    number: int
    blocks: list[Block]


class BlockIndex:
    """Hands out the arena's units as blocks by key. For any thread; only those that look at all blocks take long.

    A unit is free or one block's. A block is reserved by one holder, published, or unlisted and still leased. What is
    published and not leased goes when room is needed, the longest unused first, of one text the end before the start.
    """

    def __init__(self, num_units: int, provide: Callable[[int, int], None] = lambda first, count: None):
        """`provide` is called for units before their first use, by first and count; OSError: there are no more."""
        self.num_units = num_units
        self._provide = provide
        self._num_provided = 0
        self._counters = Counter(dict.fromkeys(COUNTERS, 0))
        self._lock = threading.Lock()
        self._free = array(UNIT_TYPE)  # of those provided
        self._blocks: dict[bytes, Block] = {}
        self._idle: OrderedDict[bytes, Block] = OrderedDict()  # published and not leased, next to go first
        self._holders: set[Holder] = set()

    def join(self) -> Holder:
        holder = Holder()
        with self._lock:
            self._holders.add(holder)
        return holder

    def leave(self, holder: Holder) -> None:
        """Give back all that the holder has; what it was filling is lost."""
        with self._lock:
            for number in list(holder.leased):
                self._release(holder, number)
            for number in list(holder.reserved):
                self._commit(holder, number, [])
            self._holders.remove(holder)

    @contextmanager
    def holding(self) -> Iterator[Holder]:
        """`join` for a while."""
        holder = self.join()
        try:
            yield holder
        finally:
            self.leave(holder)

    def lookup(self, holder: Holder, keys: Sequence[bytes]) -> Grant:
        """Lease the blocks of the longest prefix of `keys` that is published."""
        with self._lock:
            found = []
            for key in keys:
                block = self._blocks.get(key)
                if block is None or block.checksum is None:
                    break
                found.append(block)
            return self._lease(holder, found)

    def lease_all(self, holder: Holder) -> Grant:
        """All that is published, the longest unused first."""
        with self._lock:
            idle = list(self._idle.values())
            busy = [block for block in self._blocks.values() if block.checksum is not None and block.leases]
            return self._lease(holder, idle + busy)

    def release(self, holder: Holder, number: int, poisoned: Iterable[int] = ()) -> None:
        """Give a lease back; `poisoned` are positions of blocks whose checksum is wrong. KeyError: no such lease."""
        with self._lock:
            blocks = holder.leased[number]
            for position in poisoned:
                self._counters["poisoned_blocks"] += 1
                self._unlist(blocks[position])
            self._release(holder, number)

    def reserve(self, holder: Holder, keys: Sequence[bytes], num_bytes: int) -> Grant:
        """Make room for those of `keys` that are not known, as far as there is room, in their order."""
        with self._lock:
            for key in reversed(keys):
                if key in self._idle:
                    self._idle.move_to_end(key)
            reserved = []
            for key in keys:
                if key in self._blocks:
                    continue
                units = self._take(units_for(num_bytes))
                if units is None:
                    break
                self._blocks[key] = Block(key, units, num_bytes)
                reserved.append(self._blocks[key])
            number = next(holder.numbers)
            if reserved:
                holder.reserved[number] = reserved
            return Grant(number, reserved)

    def commit(self, holder: Holder, number: int, checksums: Sequence[int]) -> list[Block]:
        """Publish the first blocks of a reservation, whose checksums these are, and drop the others.

        KeyError: no such reservation.
        """
        with self._lock:
            return self._commit(holder, number, checksums)

    def flush(self) -> None:
        """Forget all that is published; what is leased stays where it is until it is given back."""
        with self._lock:
            for block in list(self._blocks.values()):
                if block.checksum is not None:
                    self._unlist(block)

    def count(self, **increments: int) -> None:
        """Add to the counters that `stats` shows."""
        with self._lock:
            self._counters.update(increments)

    def stats(self) -> dict[str, int]:
        with self._lock:
            reserved = sum(len(blocks) for holder in self._holders for blocks in holder.reserved.values())
            return {
                "units": self.num_units,
                "free_units": self.num_units - self._num_provided + len(self._free),
                "published_blocks": len(self._blocks) - reserved,
                "leased_blocks": len(self._blocks) - reserved - len(self._idle),
                "reserved_blocks": reserved,
                "holders": len(self._holders),
                **self._counters,
            }

    def audit(self) -> list[str]:
        """Compare what blocks say about themselves with what holders have; returns the leaks, in words."""
        with self._lock:
            return list(self._leaks())

    def _leaks(self) -> Iterable[str]:
        held = Counter(block for holder in self._holders for blocks in holder.leased.values() for block in blocks)
        filling = Counter(block for holder in self._holders for blocks in holder.reserved.values() for block in blocks)
        blocks = {*self._blocks.values(), *held, *filling}
        for block in blocks:
            name = block.key.hex()
            if block.leases != held[block]:
                yield f"block {name} counts {block.leases} leases, holders have {held[block]}"
            if (block.checksum is None) != (filling[block] == 1):
                yield f"block {name} is {'' if block.checksum is None else 'not '}reserved, by {filling[block]} holders"
            if block.is_listed != (self._blocks.get(block.key) is block):
                yield f"block {name} is listed wrongly"
            is_idle = self._idle.get(block.key) is block
            if is_idle != (block.is_listed and block.checksum is not None and not block.leases):
                yield f"block {name} is {'' if is_idle else 'not '}up for eviction"
        owned = np.frombuffer(b"".join([self._free.tobytes(), *(block.units for block in blocks)]), UNIT_TYPE)
        num_owners = np.bincount(owned, minlength=self._num_provided)
        for unit in np.flatnonzero(num_owners != 1):
            yield f"unit {unit} has {num_owners[unit]} owners"

    def _lease(self, holder: Holder, blocks: list[Block]) -> Grant:
        for block in blocks:
            block.leases += 1
            self._idle.pop(block.key, None)
        number = next(holder.numbers)
        if blocks:
            holder.leased[number] = blocks
        return Grant(number, blocks)

    def _release(self, holder: Holder, number: int) -> None:
        for block in reversed(holder.leased.pop(number)):
            block.leases -= 1
            self._settle(block)

    def _commit(self, holder: Holder, number: int, checksums: Sequence[int]) -> list[Block]:
        blocks = holder.reserved.pop(number)
        published = blocks[: len(checksums)]
        for block, checksum in zip(published, checksums, strict=False):
            block.checksum = checksum
        for block in blocks[len(published) :]:
            self._unlist(block)
        for block in reversed(published):
            self._settle(block)
        self._counters["committed_blocks"] += len(published)
        return published

    def _settle(self, block: Block) -> None:
        """For a published block that nobody may hold any more: it waits for its next use, or is gone."""
        if block.leases == 0 and block.is_listed:
            self._idle[block.key] = block
        elif block.leases == 0:
            self._free.frombytes(block.units)

    def _unlist(self, block: Block) -> None:
        if block.is_listed:
            block.is_listed = False
            del self._blocks[block.key]
            self._idle.pop(block.key, None)
            if block.leases == 0:
                self._free.frombytes(block.units)

    def _take(self, count: int) -> bytes | None:
        while len(self._free) < count:
            if self._grow():
                continue
            if not self._idle:
                return None
            self._unlist(next(iter(self._idle.values())))
            self._counters["evicted_blocks"] += 1
        units = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return units.tobytes()

    def _grow(self) -> bool:
        first, count = self._num_provided, min(GROWTH_UNITS, self.num_units - self._num_provided)
        if count == 0:
            return False
        try:
            self._provide(first, count)
        except OSError as error:
            log.error("the arena stays at %d units: %s", first, error)
            self.num_units = first
            return False
        self._free.extend(range(first, first + count))
        self._num_provided += count
        return True
