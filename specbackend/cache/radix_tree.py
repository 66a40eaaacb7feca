"""Prefix tree over KV slots: which keys (see `prefix_keys`) lead to which slots, who uses them, what may be evicted.

Pure Python over integers; it never sees a tensor. Every slot in the tree belongs to the tree. A path is pinned by
`lock` and released by `unlock`; `evict` takes unpinned leaves in the order of the eviction policy. Each salt has a tree
of its own: neither hits nor the time of a lookup tell of what other salts hold.

Keys are compared as slices, which Python does in C: an array of 64-bit integers is fastest.
"""

import heapq
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

UNDRAFTED = 1 << 62  # in a key: the slot lacks the draft's KV

# Of two leaves the one of lower rank goes first. The rank of a node never falls: `RadixTree._next_victim` relies on it.
EVICTION_RANKS: dict[str, Callable[["RadixNode"], tuple]] = {
    "lru": lambda node: (node.last_used,),
    "lfu": lambda node: (node.hits, node.last_used),
    "priority": lambda node: (node.priority, node.last_used),
}


def prefix_keys(token_ids: Sequence[int], successor: bool, num_drafted: int | None = None) -> array:
    """Return the tree's keys for a token sequence: one per slot that a later request may reuse.

    Plain decoding: slot t holds only token t's KV, so its key is the token. With a draft model the same slot also
    holds the draft's row t, which consumed token t+1, so the key is the pair and the last token has none yet.
    From `num_drafted` on the slots have no draft KV: their keys are other ones, which only requests without drafts use.
    """
    tokens = np.array(token_ids, dtype=np.int64)
    keys = (tokens[:-1] << 32) | tokens[1:] if successor else tokens
    if num_drafted is not None:
        keys[num_drafted:] |= UNDRAFTED
    return array("q", keys.tobytes())


def shared_length(keys: Sequence[int], others: Sequence[int], start: int = 0) -> int:
    """How many of the first of `keys` are those of `others` from `start` on."""
    low, high = 0, min(len(keys), len(others) - start)
    if keys[:high] == others[start : start + high]:
        return high
    while high - low > 1:  # all before `low` are equal, and the first that is not lies before `high`
        middle = (low + high) // 2
        if keys[low:middle] == others[start + low : start + middle]:
            low = middle
        else:
            high = middle
    return low


@dataclass(eq=False)
class RadixNode:
    """An edge of the tree: `keys[i]` is held by `slots[i]`."""

    keys: Sequence[int]
    slots: list[int]
    parent: "RadixNode | None"
    children: dict[int, "RadixNode"] = field(default_factory=dict)
    locks: int = 0  # requests whose prefix runs through this node
    last_used: int = 0
    hits: int = 0  # times that it was there when it was inserted: by a request that used it
    priority: int = 0  # the highest of the requests that gave its slots or had them already
    is_queued: bool = False  # for eviction
    salt: str | None = None  # of a root
    number: int = field(default_factory=count().__next__)

    def path(self) -> Iterator["RadixNode"]:
        """This node and those above it, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


@dataclass(frozen=True)
class PrefixMatch:
    """The longest cached prefix: its slots in order and the node it ends in."""

    slots: list[int]
    node: RadixNode


@dataclass(frozen=True)
class CachedPrefix:
    """What a lower tier may keep: `keys`, which start at the root, and the slots that hold their KV."""

    salt: str | None
    keys: Sequence[int]
    slots: list[int]


class RadixTree:
    """Prefix cache of one engine.

    eviction_policy: a key of EVICTION_RANKS. on_evict: told of each prefix whose end goes, before it does.
    """

    def __init__(self, eviction_policy: str = "lru", on_evict: Callable[[CachedPrefix], None] | None = None) -> None:
        self.roots: dict[str | None, RadixNode] = {}  # by salt; those that have children
        self.num_nodes = 0  # without the roots
        self.num_slots = 0
        self.num_locked = 0
        self._rank, self._on_evict = EVICTION_RANKS[eviction_policy], on_evict
        self._clock = count(1)
        self._order = count()  # breaks ties, nodes do not compare
        self._queue: list[tuple[tuple, int, RadixNode]] = []  # heap of leaves, each at most once

    @property
    def num_evictable(self) -> int:
        return self.num_slots - self.num_locked

    def matched_length(self, keys: Sequence[int], salt: str | None = None) -> int:
        """How many slots `match` would find. Changes nothing."""
        return sum(shared for _, shared in self._walk(self._root(salt), keys))

    def match(self, keys: Sequence[int], salt: str | None = None) -> PrefixMatch:
        """Return the longest prefix of `keys` that is cached; splits a node so that the match ends on a border."""
        node, slots, now = self._root(salt), [], next(self._clock)
        for child, shared in self._walk(node, keys):
            node = self._split(child, shared) if shared < len(child.keys) else child
            node.last_used = now
            slots += node.slots
        return PrefixMatch(slots, node)

    def insert(
        self, keys: Sequence[int], slots: Sequence[int], salt: str | None = None, priority: int = 0
    ) -> PrefixMatch:
        """Make `keys` cached, taking ownership of the slots of the part that was not there.

        Returns the tree's own slots for all of `keys`: where they differ from `slots`, the caller still owns its copy.
        """
        assert len(keys) == len(slots), f"{len(keys)} keys for {len(slots)} slots"
        found = self.match(keys, salt)
        for node in found.node.path():
            node.hits += 1
            node.priority = max(node.priority, priority)
        known = len(found.slots)
        if known == len(keys):
            return found
        leaf = RadixNode(
            keys[known:], list(slots[known:]), parent=found.node, last_used=next(self._clock), priority=priority
        )
        found.node.children[leaf.keys[0]] = leaf
        if found.node.parent is None:
            self.roots[salt] = found.node
        self.num_nodes += 1
        self.num_slots += len(leaf.slots)
        self._enqueue_if_free(leaf)
        return PrefixMatch(found.slots + leaf.slots, leaf)

    def lock(self, node: RadixNode) -> None:
        """Pin the path from the root to `node`."""
        for pinned in node.path():
            if pinned.locks == 0:
                self.num_locked += len(pinned.slots)
            pinned.locks += 1

    def unlock(self, node: RadixNode) -> None:
        """Undo one `lock` of the same node."""
        for pinned in node.path():
            pinned.locks -= 1
            assert pinned.locks >= 0, "unlocked more often than locked"
            if pinned.locks == 0:
                self.num_locked -= len(pinned.slots)
                self._enqueue_if_free(pinned)

    def evict(self, num_slots: int) -> list[int]:
        """Drop unpinned leaves until `num_slots` slots are free or nothing more may go; return the freed slots."""
        freed: list[int] = []
        while len(freed) < num_slots and (leaf := self._next_victim()):
            self._remove(leaf)
            freed += leaf.slots
        return freed

    def flush(self) -> list[int]:
        """Drop all that is unpinned and tell nobody of it; return the freed slots."""
        on_evict, self._on_evict = self._on_evict, None
        try:
            return self.evict(self.num_evictable)
        finally:
            self._on_evict = on_evict

    def prefix_of(self, node: RadixNode) -> CachedPrefix:
        """What leads to a node that is no root, the node included."""
        path = list(node.path())
        keys, slots = node.keys[:0], []
        for each in reversed(path):
            keys = keys + each.keys
            slots += each.slots
        return CachedPrefix(path[-1].parent.salt, keys, slots)

    def _root(self, salt: str | None) -> RadixNode:
        return self.roots.get(salt) or RadixNode(keys=[], slots=[], parent=None, salt=salt)

    def _walk(self, node: RadixNode, keys: Sequence[int]) -> Iterator[tuple[RadixNode, int]]:
        """The nodes below `node` that `keys` run through, and how many of its keys each shares: the last maybe few."""
        position = 0
        while position < len(keys) and (child := node.children.get(keys[position])):
            shared = shared_length(child.keys, keys, position)
            position += shared
            is_left_midway = shared < len(child.keys)
            yield child, shared
            if is_left_midway:
                return
            node = child

    def _split(self, node: RadixNode, at: int) -> RadixNode:
        """Cut `node` in two and return the upper half; whoever pinned the node pins both halves."""
        upper = RadixNode(
            node.keys[:at],
            node.slots[:at],
            node.parent,
            locks=node.locks,
            last_used=node.last_used,
            hits=node.hits,
            priority=node.priority,
        )
        node.parent.children[upper.keys[0]] = upper
        node.keys, node.slots, node.parent = node.keys[at:], node.slots[at:], upper
        upper.children[node.keys[0]] = node
        self.num_nodes += 1
        return upper

    def _remove(self, leaf: RadixNode) -> None:
        if self._on_evict:
            self._on_evict(self.prefix_of(leaf))
        parent = leaf.parent
        self.num_nodes -= 1
        self.num_slots -= len(leaf.slots)
        del parent.children[leaf.keys[0]]
        if parent.parent is not None:
            self._enqueue_if_free(parent)
        elif not parent.children:
            del self.roots[parent.salt]

    # ---- the order of eviction ----

    def _enqueue_if_free(self, node: RadixNode) -> None:
        if not (node.children or node.locks or node.is_queued):
            node.is_queued = True
            heapq.heappush(self._queue, (self._rank(node), next(self._order), node))

    def _next_victim(self) -> RadixNode | None:
        """Take the free leaf of lowest rank from the queue.

        What is in the queue may be out of date: nodes that are no free leaves any more are dropped, and come again when
        they are; one that was used since goes to its new place, which is further back, as ranks only grow.
        """
        while self._queue:
            rank, _, node = heapq.heappop(self._queue)
            node.is_queued = False
            if rank == self._rank(node) and not (node.children or node.locks):
                return node
            self._enqueue_if_free(node)
        return None
