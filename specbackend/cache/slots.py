"""Who owns which KV slot: free, held by a request, or held by the prefix cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from specbackend.cache.radix_tree import CachedPrefix, PrefixMatch, RadixTree, prefix_keys

DUMMY_SLOT = 0  # padding rows write here; nobody reads it


@dataclass(frozen=True)
class PinnedPrefix(PrefixMatch):
    """A cached prefix that a request uses, which stays until it is unpinned."""

    salt: str | None = None
    num_drafted: int = 0  # the first of its slots, which have the draft's KV, too


class SlotManager:
    """Hands out slots 1..num_slots and keeps finished prefixes reusable in a radix tree.

    eviction_policy and on_evict: see RadixTree. on_finish: told of what a request leaves in the cache, which stays
    pinned until it returns. Texts of different `salt` never share.
    """

    def __init__(
        self,
        num_slots: int,
        successor_keys: bool,
        cache_prefixes: bool,
        eviction_policy: str = "lru",
        on_evict: Callable[[CachedPrefix], None] | None = None,
        on_finish: Callable[[CachedPrefix], None] | None = None,
    ):
        self.num_slots = num_slots
        self.tree = RadixTree(eviction_policy, on_evict)
        self._free = list(range(num_slots, DUMMY_SLOT, -1))
        self._successor_keys = successor_keys
        self._cache_prefixes = cache_prefixes
        self._on_finish = on_finish

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

    def flush(self) -> int:
        """Drop what the prefix cache holds and nobody uses; returns how many slots that frees."""
        freed = self.tree.flush()
        self.release(freed)
        return len(freed)

    def release(self, slots: Sequence[int]) -> None:
        self._free += slots

    def keys(self, token_ids: Sequence[int], num_drafted: int | None = None) -> Sequence[int]:
        """What `token_ids` could find in the cache, so as to leave at least one token to compute."""
        if not self._cache_prefixes:
            return []
        return prefix_keys(token_ids, self._successor_keys, num_drafted)[: len(token_ids) - 1]

    def match(self, token_ids: Sequence[int], salt: str | None = None, drafted: bool = True) -> PinnedPrefix:
        """Find and pin the cached prefix of `token_ids`. drafted: only what has the draft's KV, if others have not."""
        keys = self.keys(token_ids)
        num_drafted = len(keys) if drafted else self.tree.matched_length(keys, salt)
        found = self.tree.match(keys if drafted else self.keys(token_ids, num_drafted), salt)
        self.tree.lock(found.node)
        return PinnedPrefix(found.slots, found.node, salt, min(num_drafted, len(found.slots)))

    def cached_length(self, token_ids: Sequence[int], salt: str | None = None) -> int:
        """How many slots with the draft's KV `match` would supply now."""
        return self.tree.matched_length(self.keys(token_ids), salt)

    def share(
        self,
        token_ids: Sequence[int],
        slots: Sequence[int],
        pinned: PinnedPrefix,
        num_drafted: int | None = None,
        priority: int = 0,
    ) -> PinnedPrefix:
        """Give `slots`, which hold the KV of the first of `token_ids`, to the tree; return the new pinned prefix.

        `pinned` is what the caller got from `match` or the last `share`: the tree owns these slots already. Of the
        rest, what the tree had got from somebody else in the meantime is released here as a duplicate. Slots past
        the returned prefix stay the caller's. The first `num_drafted` have the draft's KV, too; None: all of them.
        """
        if not self._cache_prefixes:
            return pinned
        keys = prefix_keys(token_ids, self._successor_keys, num_drafted)[: len(slots)]
        shared = self.tree.insert(keys, slots[: len(keys)], pinned.salt, priority)
        owned = len(pinned.slots)
        self.release([mine for mine, trees in zip(slots[owned:], shared.slots[owned:], strict=False) if mine != trees])
        self.tree.lock(shared.node)
        self.tree.unlock(pinned.node)
        of_draft = len(keys) if num_drafted is None else min(num_drafted, len(keys))
        return replace(pinned, slots=shared.slots, node=shared.node, num_drafted=of_draft)

    def unpin(self, pinned: PinnedPrefix) -> None:
        self.tree.unlock(pinned.node)

    def finish(self, pinned: PinnedPrefix) -> None:
        """Unpin what a request has shared last."""
        if self._on_finish and pinned.slots:
            self._on_finish(self.tree.prefix_of(pinned.node))
        self.unpin(pinned)

    def adopt(
        self, token_ids: Sequence[int], count: int, fill: Callable[[int, list[int]], None], salt: str | None = None
    ) -> int:
        """Cache the first `count` of `keys(token_ids)`, whose KV comes from elsewhere: a lower tier.

        fill(start, slots) has to write the KV, draft's included, of the keys from `start` on into `slots`. It is not
        called if so many are cached, or if there is no room. Returns how many are cached now.
        """
        pinned = self.match(token_ids, salt)
        known, wanted = len(pinned.slots), min(count, len(self.keys(token_ids)))
        fresh = self.allocate(wanted - known) if wanted > known else None
        if fresh:
            try:
                fill(known, fresh)
            except BaseException:
                self.release(fresh)
                self.unpin(pinned)
                raise
            pinned = self.share(token_ids, pinned.slots + fresh, pinned)
        self.unpin(pinned)
        return len(pinned.slots)
