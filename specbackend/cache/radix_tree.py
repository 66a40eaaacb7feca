"""Prefix tree over KV slots: which keys (see `prefix_keys`) lead to which slots, who uses them, what may be evicted.

Pure Python over integers; it never sees a tensor. Every slot in the tree belongs to the tree. A path is pinned by
`lock` and released by `unlock`; `evict` takes unpinned leaves, least recently used first.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise


def prefix_keys(token_ids: Sequence[int], successor: bool) -> list[int]:
    """Return the tree's keys for a token sequence: one per slot that a later request may reuse.

    Plain decoding: slot t holds only token t's KV, so its key is the token. With a draft model the same slot also
    holds the draft's row t, which consumed token t+1, so the key is the pair and the last token has none yet.
    """
    if not successor:
        return list(token_ids)
    return [(token << 32) | following for token, following in pairwise(token_ids)]


@dataclass(eq=False)
class RadixNode:
    """An edge of the tree: `keys[i]` is held by `slots[i]`."""

    keys: list[int]
    slots: list[int]
    parent: "RadixNode | None"
    children: dict[int, "RadixNode"] = field(default_factory=dict)
    locks: int = 0  # requests whose prefix runs through this node
    last_used: int = 0


@dataclass(frozen=True)
class PrefixMatch:
    """The longest cached prefix: its slots in order and the node it ends in."""

    slots: list[int]
    node: RadixNode


class RadixTree:
    """Prefix cache of one engine."""

    def __init__(self) -> None:
        self.root = RadixNode(keys=[], slots=[], parent=None, locks=1)
        self.num_slots = 0
        self.num_locked = 0
        self._clock = count(1)

    @property
    def num_evictable(self) -> int:
        return self.num_slots - self.num_locked

    def match(self, keys: Sequence[int]) -> PrefixMatch:
        """Return the longest prefix of `keys` that is cached; splits a node so that the match ends on a border."""
        node, slots, position, now = self.root, [], 0, next(self._clock)
        while position < len(keys) and (child := node.children.get(keys[position])):
            shared = _common_prefix(child.keys, keys, position)
            if shared < len(child.keys):
                child = self._split(child, shared)
            child.last_used = now
            slots += child.slots
            position += shared
            node = child
        return PrefixMatch(slots, node)

    def insert(self, keys: Sequence[int], slots: Sequence[int]) -> PrefixMatch:
        """Make `keys` cached, taking ownership of the slots of the part that was not there.

        Returns the tree's own slots for all of `keys`: where they differ from `slots`, the caller still owns its copy.
        """
        assert len(keys) == len(slots), f"{len(keys)} keys for {len(slots)} slots"
        found = self.match(keys)
        known = len(found.slots)
        if known == len(keys):
            return found
        leaf = RadixNode(list(keys[known:]), list(slots[known:]), parent=found.node, last_used=next(self._clock))
        found.node.children[leaf.keys[0]] = leaf
        self.num_slots += len(leaf.slots)
        return PrefixMatch(found.slots + leaf.slots, leaf)

    def lock(self, node: RadixNode) -> None:
        """Pin the path from the root to `node`."""
        while node is not self.root:
            if node.locks == 0:
                self.num_locked += len(node.slots)
            node.locks += 1
            node = node.parent

    def unlock(self, node: RadixNode) -> None:
        """Undo one `lock` of the same node."""
        while node is not self.root:
            node.locks -= 1
            assert node.locks >= 0, "unlocked more often than locked"
            if node.locks == 0:
                self.num_locked -= len(node.slots)
            node = node.parent

    def evict(self, num_slots: int) -> list[int]:
        """Drop unpinned leaves until `num_slots` slots are free or nothing more may go; return the freed slots."""
        order = count()  # breaks ties, nodes do not compare
        leaves = [(leaf.last_used, next(order), leaf) for leaf in self._leaves() if leaf.locks == 0]
        heapq.heapify(leaves)
        freed: list[int] = []
        while leaves and len(freed) < num_slots:
            leaf = heapq.heappop(leaves)[-1]
            freed += leaf.slots
            parent = leaf.parent
            del parent.children[leaf.keys[0]]
            if parent is not self.root and not parent.children and parent.locks == 0:
                heapq.heappush(leaves, (parent.last_used, next(order), parent))
        self.num_slots -= len(freed)
        return freed

    def _split(self, node: RadixNode, at: int) -> RadixNode:
        """Cut `node` in two and return the upper half; whoever pinned the node pins both halves."""
        upper = RadixNode(node.keys[:at], node.slots[:at], node.parent, locks=node.locks, last_used=node.last_used)
        node.parent.children[upper.keys[0]] = upper
        node.keys, node.slots, node.parent = node.keys[at:], node.slots[at:], upper
        upper.children[node.keys[0]] = node
        return upper

    def _leaves(self) -> list[RadixNode]:
        leaves, stack = [], list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if not node.children:
                leaves.append(node)
        return leaves


def _common_prefix(keys: Sequence[int], other: Sequence[int], start: int) -> int:
    limit = min(len(keys), len(other) - start)
    for i in range(limit):
        if keys[i] != other[start + i]:
            return i
    return limit
