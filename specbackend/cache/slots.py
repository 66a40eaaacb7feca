"""Who owns which KV slot: free, held by a request, or held by the prefix cache."""

from collections.abc import Sequence

from specbackend.cache.radix_tree import PrefixMatch, RadixTree, prefix_keys

DUMMY_SLOT = 0  # padding rows write here; nobody reads it


class SlotManager:
    """Hands out slots 1..num_slots and keeps finished prefixes reusable in a radix tree."""

    def __init__(self, num_slots: int, successor_keys: bool, cache_prefixes: bool):
        self.num_slots = num_slots
        self.tree = RadixTree()
        self._free = list(range(num_slots, DUMMY_SLOT, -1))
        self._successor_keys = successor_keys
        self._cache_prefixes = cache_prefixes

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_available(self) -> int:
        return len(self._free) + self.tree.num_evictable

    def allocate(self, count: int) -> list[int] | None:
        """Return `count` slots, evicting cached prefixes if need be; None, and no change, if there are not enough."""
        if count > self.num_available:
            return None
        if count > len(self._free):
            self._free += self.tree.evict(count - len(self._free))
        cut = len(self._free) - count
        taken = self._free[cut:]
        del self._free[cut:]
        return taken

    def release(self, slots: Sequence[int]) -> None:
        self._free += slots

    def match(self, token_ids: Sequence[int]) -> PrefixMatch:
        """Find and pin the cached prefix of `token_ids`, leaving at least one token to compute."""
        keys = prefix_keys(token_ids, self._successor_keys) if self._cache_prefixes else []
        found = self.tree.match(keys[: len(token_ids) - 1])
        self.tree.lock(found.node)
        return found

    def cached_length(self, token_ids: Sequence[int]) -> int:
        """How many slots `match` would supply now."""
        found = self.match(token_ids)
        self.tree.unlock(found.node)
        return len(found.slots)

    def share(self, token_ids: Sequence[int], slots: Sequence[int], pinned: PrefixMatch) -> PrefixMatch:
        """Give `slots`, which hold the KV of the first of `token_ids`, to the tree; return the new pinned prefix.

        `pinned` is what the caller got from `match` or the last `share`: the tree owns these slots already. Of the
        rest, what the tree had got from somebody else in the meantime is released here as a duplicate. Slots past
        the returned prefix stay the caller's.
        """
        if not self._cache_prefixes:
            return pinned
        keys = prefix_keys(token_ids, self._successor_keys)[: len(slots)]
        shared = self.tree.insert(keys, slots[: len(keys)])
        owned = len(pinned.slots)
        self.release([mine for mine, trees in zip(slots[owned:], shared.slots[owned:], strict=False) if mine != trees])
        self.tree.lock(shared.node)
        self.tree.unlock(pinned.node)
        return shared

    def unpin(self, pinned: PrefixMatch) -> None:
        self.tree.unlock(pinned.node)
