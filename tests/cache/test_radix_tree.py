"""The radix tree against a naive one: a dict with an entry for every cached prefix."""

from array import array
from dataclasses import dataclass
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from specbackend.cache import tree_view
from specbackend.cache.radix_tree import CachedPrefix, PrefixMatch, RadixTree, prefix_keys, shared_length

KEYS = st.lists(st.integers(0, 2), max_size=8)  # few keys, so that prefixes meet often


SALTS = st.sampled_from([None, None, "a", "b"])
POLICIES = {
    "lru": lambda entry: entry.last_used,
    "lfu": lambda entry: (entry.hits, entry.last_used),
    "priority": lambda entry: (entry.priority, entry.last_used),
}


@dataclass
class NaiveEntry:
    """One cached prefix: the slot of its last key."""

    slot: int
    last_used: int
    priority: int
    hits: int = 0
    locks: int = 0


class NaiveTree:
    def __init__(self, policy: str):
        self.entries: dict[tuple, NaiveEntry] = {}  # by salt and keys
        self._rank = POLICIES[policy]
        self._clock = count()

    def match(self, keys: list[int], salt: str | None) -> list[int]:
        now, slots = next(self._clock), []
        for entry in self.path(keys, salt):
            entry.last_used = now
            slots.append(entry.slot)
        return slots

    def insert(self, keys: list[int], slots: list[int], salt: str | None, priority: int) -> list[int]:
        known = self.match(keys, salt)
        for entry in self.path(keys, salt):
            entry.hits += 1
            entry.priority = max(entry.priority, priority)
        now = next(self._clock)
        for length in range(len(known) + 1, len(keys) + 1):
            self.entries[(salt, *keys[:length])] = NaiveEntry(slots[length - 1], now, priority)
        return known + slots[len(known) :]

    def path(self, keys: list[int], salt: str | None) -> list[NaiveEntry]:
        found = []
        while len(found) < len(keys) and (entry := self.entries.get((salt, *keys[: len(found) + 1]))):
            found.append(entry)
        return found

    def evictable_leaves(self) -> list[tuple]:
        inner = {prefix[:-1] for prefix in self.entries}
        return [prefix for prefix, entry in self.entries.items() if not entry.locks and prefix not in inner]

    def evict_one(self) -> tuple[tuple, int]:
        first = min(self.evictable_leaves(), key=lambda prefix: self._rank(self.entries[prefix]))
        return first, self.entries.pop(first).slot


@dataclass(frozen=True)
class Pin:
    keys: list[int]
    salt: str | None
    found: PrefixMatch


class TreeMachine(RuleBasedStateMachine):
    @initialize(policy=st.sampled_from(list(POLICIES)))
    def start(self, policy):
        self.tree, self.naive = RadixTree(policy, on_evict=self.take_note), NaiveTree(policy)
        self.next_slot = count(1)
        self.pins: list[Pin] = []
        self.evicted: list[tuple[tuple, int]] = []

    def take_note(self, prefix: CachedPrefix) -> None:
        """Still in the tree, and its keys are all that lead to its slots."""
        assert self.tree.matched_length(prefix.keys, prefix.salt) == len(prefix.keys)
        assert len(prefix.keys) == len(prefix.slots)
        *_, (leaf, _) = self.tree._walk(self.tree._root(prefix.salt), prefix.keys)
        for length, slot in zip(range(len(prefix.keys), 0, -1), reversed(leaf.slots), strict=False):
            self.evicted.append(((prefix.salt, *prefix.keys[:length]), slot))

    @rule(keys=KEYS, salt=SALTS)
    def match(self, keys, salt):
        length = self.tree.matched_length(keys, salt)
        expected = self.naive.match(keys, salt)
        assert self.tree.match(keys, salt).slots == expected
        assert length == len(expected)

    @rule(keys=KEYS, salt=SALTS, priority=st.integers(-2, 2))
    def insert(self, keys, salt, priority):
        slots = [next(self.next_slot) for _ in keys]
        expected = self.naive.insert(keys, slots, salt, priority)
        assert self.tree.insert(keys, slots, salt, priority).slots == expected

    @rule(keys=KEYS, salt=SALTS)
    def pin(self, keys, salt):
        found = self.tree.match(keys, salt)
        self.naive.match(keys, salt)
        self.tree.lock(found.node)
        self.pins.append(Pin(keys[: len(found.slots)], salt, found))
        for entry in self.naive.path(keys, salt):
            entry.locks += 1

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data):
        pin = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
        self.tree.unlock(pin.found.node)
        for entry in self.naive.path(pin.keys, pin.salt):
            entry.locks -= 1

    @rule(num_slots=st.integers(0, 12))
    def evict(self, num_slots):
        """In the policy's order, one node at a time, as far as needed and no pinned one ever."""
        self.evicted.clear()
        freed = self.tree.evict(num_slots)
        expected = [self.naive.evict_one() for _ in freed]
        assert sorted(freed) == sorted(slot for _, slot in expected)
        assert self.evicted == expected
        assert len(freed) >= num_slots or not self.naive.evictable_leaves()

    @invariant()
    def same_content(self):
        assert held_prefixes(self.tree) == {prefix: entry.slot for prefix, entry in self.naive.entries.items()}

    @invariant()
    def same_counts(self):
        entries = self.naive.entries.values()
        assert self.tree.num_slots == len(entries)
        assert self.tree.num_nodes == len(tree_view.view(self.tree, 1 << 20).nodes)
        assert self.tree.num_locked == sum(entry.locks > 0 for entry in entries)

    @invariant()
    def pinned_slots_stay(self):
        for pin in self.pins:
            assert [entry.slot for entry in self.naive.path(pin.keys, pin.salt)] == pin.found.slots

    @invariant()
    def nothing_piles_up(self):
        assert len(self.tree._queue) <= len(self.naive.entries)
        assert all(root.children for root in self.tree.roots.values())


def held_prefixes(tree: RadixTree) -> dict[tuple, int]:
    held, stack = {}, [((salt,), root) for salt, root in tree.roots.items()]
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
TestTree.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@given(keys=KEYS, others=KEYS, start=st.integers(0, 8))
def test_shared_length_is_that_of_a_loop(keys, others, start):
    start = min(start, len(others))
    equal = [key == other for key, other in zip(keys, others[start:], strict=False)]
    assert shared_length(array("q", keys), array("q", others), start) == [*equal, False].index(False)


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
    assert list(prefix_keys([7, 8, 9], successor=False)) == [7, 8, 9]
    keys = prefix_keys([7, 8, 9], successor=True)
    assert len(keys) == 2
    assert prefix_keys([7, 8, 5], successor=True)[0] == keys[0]
    assert prefix_keys([7, 8, 5], successor=True)[1] != keys[1]
    assert prefix_keys([8, 7], successor=True)[0] != prefix_keys([7, 8], successor=True)[0]
    assert list(prefix_keys([7], successor=True)) == []


def test_a_key_says_whether_its_slot_has_the_drafts_kv():
    for successor in (False, True):
        whole, part = (prefix_keys([7, 8, 9, 3], successor, num_drafted) for num_drafted in (None, 2))
        assert whole[:2] == part[:2] and not set(whole[2:]) & set(part[2:])


def test_salts_share_nothing():
    tree = RadixTree()
    tree.insert([1, 2], [11, 12], salt="a")
    assert tree.match([1, 2]).slots == tree.match([1, 2], salt="b").slots == []
    assert tree.match([1, 2], salt="a").slots == [11, 12]


def test_what_was_used_most_is_kept_by_lfu():
    tree = RadixTree("lfu")
    for key, times in ((1, 3), (2, 2)):
        for _ in range(times):
            tree.insert([key], [10 + key])
    for _ in range(4):
        tree.match([2])  # no use: a request that waits looks again and again
    assert [tree.evict(1) for _ in range(2)] == [[12], [11]]


@pytest.mark.parametrize(("policy", "gives", "value"), [("lfu", "hits", 4), ("priority", "priority", 5)])
def test_both_halves_of_a_node_have_what_decides_over_it(policy, gives, value):
    tree = RadixTree(policy)
    for _ in range(5):
        tree.insert([1, 2], [11, 12], priority=5)
    upper, lower = (tree.match(keys).node for keys in ([1], [1, 2]))
    assert getattr(upper, gives) == getattr(lower, gives) == value


def test_the_tree_takes_the_highest_priority_of_those_that_share_a_prefix():
    tree = RadixTree("priority")
    tree.insert([1, 2], [11, 12], priority=-1)
    tree.insert([3], [13], priority=0)
    tree.insert([1, 4], [21, 14], priority=5)
    tree.insert([1, 4], [21, 24], priority=-5)
    assert [tree.evict(1) for _ in range(4)] == [[12], [13], [14], [11]]
