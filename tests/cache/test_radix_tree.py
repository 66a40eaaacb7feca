"""The radix tree against a naive one: a dict with an entry for every cached prefix."""

from dataclasses import dataclass
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specbackend.cache.radix_tree import PrefixMatch, RadixTree, prefix_keys

KEYS = st.lists(st.integers(0, 2), max_size=8)  # few keys, so that prefixes meet often


@dataclass
class NaiveEntry:
    """One cached prefix: the slot of its last key."""

    slot: int
    last_used: int
    locks: int = 0


class NaiveTree:
    def __init__(self):
        self.entries: dict[tuple, NaiveEntry] = {}
        self._clock = count()

    def match(self, keys: list[int]) -> list[int]:
        now, slots = next(self._clock), []
        for entry in self.path(keys):
            entry.last_used = now
            slots.append(entry.slot)
        return slots

    def insert(self, keys: list[int], slots: list[int]) -> list[int]:
        known = self.match(keys)
        now = next(self._clock)
        for length in range(len(known) + 1, len(keys) + 1):
            self.entries[tuple(keys[:length])] = NaiveEntry(slots[length - 1], now)
        return known + slots[len(known) :]

    def path(self, keys: list[int]) -> list[NaiveEntry]:
        found = []
        while len(found) < len(keys) and (entry := self.entries.get(tuple(keys[: len(found) + 1]))):
            found.append(entry)
        return found

    def evictable_leaves(self) -> list[tuple]:
        inner = {prefix[:-1] for prefix in self.entries}
        return [prefix for prefix, entry in self.entries.items() if not entry.locks and prefix not in inner]

    def evict_one(self) -> int:
        oldest = min(self.evictable_leaves(), key=lambda prefix: self.entries[prefix].last_used)
        return self.entries.pop(oldest).slot


class TreeMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.tree, self.naive = RadixTree(), NaiveTree()
        self.next_slot = count(1)
        self.pins: list[tuple[list[int], PrefixMatch]] = []

    @rule(keys=KEYS)
    def match(self, keys):
        assert self.tree.match(keys).slots == self.naive.match(keys)

    @rule(keys=KEYS)
    def insert(self, keys):
        slots = [next(self.next_slot) for _ in keys]
        assert self.tree.insert(keys, slots).slots == self.naive.insert(keys, slots)

    @rule(keys=KEYS)
    def pin(self, keys):
        found = self.tree.match(keys)
        self.naive.match(keys)
        self.tree.lock(found.node)
        self.pins.append((keys[: len(found.slots)], found))
        for entry in self.naive.path(keys):
            entry.locks += 1

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data):
        keys, found = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
        self.tree.unlock(found.node)
        for entry in self.naive.path(keys):
            entry.locks -= 1

    @rule(num_slots=st.integers(0, 12))
    def evict(self, num_slots):
        """Least recently used first, one node at a time, as far as needed and no pinned one ever."""
        freed = self.tree.evict(num_slots)
        assert set(freed) == {self.naive.evict_one() for _ in freed}
        assert len(freed) >= num_slots or not self.naive.evictable_leaves()

    @invariant()
    def same_content(self):
        assert held_prefixes(self.tree) == {prefix: entry.slot for prefix, entry in self.naive.entries.items()}

    @invariant()
    def same_counts(self):
        entries = self.naive.entries.values()
        assert self.tree.num_slots == len(entries)
        assert self.tree.num_locked == sum(entry.locks > 0 for entry in entries)

    @invariant()
    def pinned_slots_stay(self):
        for keys, found in self.pins:
            assert [entry.slot for entry in self.naive.path(keys)] == found.slots


def held_prefixes(tree: RadixTree) -> dict[tuple, int]:
    held, stack = {}, [((), tree.root)]
    while stack:
        prefix, node = stack.pop()
        assert len(node.keys) == len(node.slots)
        for key, slot in zip(node.keys, node.slots, strict=True):
            prefix += (key,)
            held[prefix] = slot
        for key, child in node.children.items():
            assert child.parent is node and child.keys[0] == key
            stack.append((prefix, child))
    return held


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_hand_drawn_tree():
    #   1 2 3 - 4      slots 11 12 13 14
    #        \
    #         5        slot 25; its request's own 21 22 23 are duplicates
    tree = RadixTree()
    tree.insert([1, 2, 3, 4], [11, 12, 13, 14])
    shared = tree.insert([1, 2, 3, 5], [21, 22, 23, 25])
    assert shared.slots == [11, 12, 13, 25]
    assert tree.num_slots == 5
    assert tree.match([1, 2, 9]).slots == [11, 12]
    assert tree.match([2]).slots == []


def test_evicts_no_more_nodes_than_needed():
    tree = RadixTree()
    tree.insert([1, 2], [11, 12])
    tree.insert([3, 4], [13, 14])
    assert tree.evict(1) == [11, 12]  # a node goes as a whole
    assert tree.evict(0) == []
    assert tree.match([3, 4]).slots == [13, 14]


def test_a_match_makes_its_prefix_recent():
    tree = RadixTree()
    tree.insert([1, 2], [11, 12])
    tree.insert([3], [13])
    tree.match([1])
    assert [tree.evict(1) for _ in range(3)] == [[12], [13], [11]]  # [2] was not matched, [1] was


def test_split_of_a_pinned_node_pins_both_halves():
    tree = RadixTree()
    pinned = tree.insert([1, 2, 3], [11, 12, 13])
    tree.lock(pinned.node)
    tree.match([1])
    assert (tree.num_locked, tree.evict(3)) == (3, [])
    tree.unlock(pinned.node)
    assert (tree.num_locked, sorted(tree.evict(3))) == (0, [11, 12, 13])


def test_unlock_without_lock_is_a_bug():
    tree = RadixTree()
    with pytest.raises(AssertionError, match="unlocked more often"):
        tree.unlock(tree.insert([1], [11]).node)


def test_successor_keys_hold_the_token_and_the_next():
    """Draft row t consumed token t + 1: two prompts that differ there must not share slot t."""
    assert prefix_keys([7, 8, 9], successor=False) == [7, 8, 9]
    keys = prefix_keys([7, 8, 9], successor=True)
    assert len(keys) == 2
    assert prefix_keys([7, 8, 5], successor=True)[0] == keys[0]
    assert prefix_keys([7, 8, 5], successor=True)[1] != keys[1]
    assert prefix_keys([8, 7], successor=True)[0] != prefix_keys([7, 8], successor=True)[0]
    assert prefix_keys([7], successor=True) == []
