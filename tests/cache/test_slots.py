"""Slot ownership: every slot is free, in the tree or one request's own, and a reused slot holds what it should."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from specbackend.cache.radix_tree import CachedPrefix, prefix_keys
from specbackend.cache.slots import DUMMY_SLOT, PinnedPrefix, SlotManager

SALTS = st.sampled_from([None, "a"])
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=10)


def tree_slots(manager: SlotManager) -> list[int]:
    slots, stack = [], list(manager.tree.roots.values())
    while stack:
        node = stack.pop()
        slots += node.slots
        stack += node.children.values()
    return slots


@dataclass
class User:
    """A request as the slot manager sees it; `slots` has one per token, the first len(pinned.slots) the tree's."""

    tokens: list[int]
    slots: list[int]
    pinned: PinnedPrefix
    num_drafted: int | None  # see `SlotManager.share`

    @property
    def own(self) -> list[int]:
        return self.slots[len(self.pinned.slots) :]

    def has_draft_kv(self, position: int) -> bool:
        return self.num_drafted is None or position < self.num_drafted


class SlotMachine(RuleBasedStateMachine):
    @initialize(num_slots=st.integers(4, 30), successor=st.booleans(), cache=st.booleans())
    def start(self, num_slots, successor, cache):
        self.manager = SlotManager(num_slots, successor, cache)
        self.successor, self.cache = successor, cache
        self.users: list[User] = []
        self.written: dict[int, tuple] = {}  # what the target's KV in a slot was computed from
        self.drafted: set[int] = set()  # slots that have the draft's KV, too

    def kv_source(self, tokens: list[int], position: int, salt: str | None) -> tuple:
        return (salt, *tokens[: position + 1 + self.successor])

    def write(self, tokens: list[int], position: int, slot: int, salt: str | None, draft: bool) -> None:
        self.written[slot] = self.kv_source(tokens, position, salt)
        (self.drafted.add if draft else self.drafted.discard)(slot)

    @rule(tokens=TOKENS, salt=SALTS, drafted=st.booleans(), data=st.data())
    def admit(self, tokens, salt, drafted, data):
        available = self.manager.num_available
        pinned = self.manager.match(tokens, salt, drafted)
        cached = len(pinned.slots)
        assert cached < len(tokens), "one token must be left to compute"
        assert [self.written[s] for s in pinned.slots] == [self.kv_source(tokens, i, salt) for i in range(cached)]
        assert set(pinned.slots[: pinned.num_drafted]) <= self.drafted
        assert pinned.num_drafted == cached or not drafted
        fresh = self.manager.allocate(len(tokens) - cached)
        if fresh is None:
            assert self.manager.num_available < len(tokens) - cached
            self.manager.unpin(pinned)
            assert self.manager.num_available == available
            return
        assert len(fresh) == len(tokens) - cached
        num_drafted = None
        if not drafted:  # after a slot without draft KV there is none that is right
            most = len(tokens) if pinned.num_drafted == cached else pinned.num_drafted
            num_drafted = data.draw(st.integers(pinned.num_drafted, most))
        user = User(tokens, pinned.slots + fresh, pinned, num_drafted)
        for position in range(cached, len(tokens)):
            self.write(tokens, position, user.slots[position], salt, user.has_draft_kv(position))
        self.users.append(user)

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def share(self, data):
        user = data.draw(st.sampled_from(self.users))
        self.share_first(user, data.draw(st.integers(len(user.pinned.slots), len(user.tokens))))

    def share_first(self, user: User, length: int) -> None:
        user.pinned = self.manager.share(user.tokens, user.slots[:length], user.pinned, user.num_drafted)
        shared, salt = user.pinned.slots, user.pinned.salt
        if self.cache:
            assert len(shared) == min(length, len(user.tokens) - self.successor)
        user.slots[: len(shared)] = shared
        expected = [self.kv_source(user.tokens, position, salt) for position in range(len(shared))]
        assert [self.written[slot] for slot in shared] == expected
        assert all(slot in self.drafted for i, slot in enumerate(shared) if user.has_draft_kv(i))

    @precondition(lambda self: self.users)
    @rule(data=st.data(), keep=st.booleans())
    def finish(self, data, keep):
        user = self.users.pop(data.draw(st.integers(0, len(self.users) - 1)))
        if keep:
            self.share_first(user, len(user.tokens))
        self.manager.release(user.own)
        self.manager.finish(user.pinned)

    @rule(tokens=TOKENS, salt=SALTS, data=st.data())
    def adopt(self, tokens, salt, data):
        count = data.draw(st.integers(0, len(tokens)))
        before = self.manager.cached_length(tokens, salt)

        def fill(start, slots):
            for position, slot in enumerate(slots, start):
                self.write(tokens, position, slot, salt, draft=True)

        after = self.manager.adopt(tokens, count, fill, salt)
        most = min(count, len(tokens) - 1) if self.cache else 0
        assert after in (before, max(before, most))

    @rule()
    def evict_all(self):
        self.manager.release(self.manager.allocate(self.manager.num_available))
        assert self.manager.tree.num_evictable == 0

    @rule(tokens=TOKENS, salt=SALTS)
    def cached_length_changes_nothing(self, tokens, salt):
        locked = self.manager.tree.num_locked
        length = self.manager.cached_length(tokens, salt)
        pinned = self.manager.match(tokens, salt)
        assert len(pinned.slots) == length
        self.manager.unpin(pinned)
        assert self.manager.tree.num_locked == locked

    @invariant()
    def every_slot_has_one_owner(self):
        owned = [slot for user in self.users for slot in user.own]
        held = self.manager._free + tree_slots(self.manager) + owned
        assert sorted(held) == list(range(1, self.manager.num_slots + 1))

    @invariant()
    def pinned_slots_are_the_trees(self):
        in_tree = set(tree_slots(self.manager))
        pinned = {slot for user in self.users for slot in user.pinned.slots}
        assert pinned <= in_tree
        assert self.manager.tree.num_locked == len(pinned)

    @invariant()
    def free_evictable_and_held_add_up(self):
        held = sum(len(user.own) for user in self.users) + self.manager.tree.num_locked
        assert self.manager.num_available + held == self.manager.num_slots

    def teardown(self):
        if not hasattr(self, "manager"):
            return
        for user in self.users:
            self.manager.release(user.own)
            self.manager.unpin(user.pinned)
        assert self.manager.num_available == self.manager.num_slots
        assert len(self.manager.allocate(self.manager.num_slots)) == self.manager.num_slots


TestSlots = SlotMachine.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def cached(manager: SlotManager, tokens: list[int]) -> list[int]:
    """Compute and cache a sequence, as a request that came and went; returns its slots in the tree."""
    pinned = manager.match(tokens)
    slots = pinned.slots + manager.allocate(len(tokens) - len(pinned.slots))
    pinned = manager.share(tokens, slots, pinned)
    manager.release(slots[len(pinned.slots) :])
    manager.unpin(pinned)
    return pinned.slots


def test_slots_are_numbered_from_one():
    assert sorted(SlotManager(3, successor_keys=False, cache_prefixes=True).allocate(3)) == [1, 2, 3]
    assert DUMMY_SLOT == 0


def test_share_keeps_the_first_copy_and_frees_the_second():
    manager = SlotManager(8, successor_keys=False, cache_prefixes=True)
    first, second = manager.match([1, 2, 3]), manager.match([1, 2, 4])
    slots, others = manager.allocate(3), manager.allocate(3)
    first = manager.share([1, 2, 3], slots, first)
    second = manager.share([1, 2, 4], others, second)
    assert second.slots == slots[:2] + others[2:]
    assert manager.num_free == 4  # the copies of tokens 1 and 2 came back


def test_allocate_evicts_under_pressure_and_only_as_needed():
    manager = SlotManager(6, successor_keys=False, cache_prefixes=True)
    cached(manager, [1, 1])
    young = cached(manager, [2, 2])
    assert len(manager.allocate(4)) == 4  # 2 free, 2 from [1, 1]
    assert manager.match([2, 2, 0]).slots == young


def test_allocate_refuses_whole_or_not_at_all():
    manager = SlotManager(6, successor_keys=False, cache_prefixes=True)
    cached(manager, [1, 1])
    manager.match([1, 1, 0])
    assert manager.allocate(5) is None
    assert (manager.num_free, manager.tree.num_slots) == (4, 2)


@pytest.mark.parametrize("successor", [False, True], ids=["token", "successor"])
def test_reuse_after_a_branch(successor):
    """[1, 2, 3] is cached; [1, 2, 9] may use slot of 2 only if no draft row there has already consumed 3."""
    manager = SlotManager(8, successor, cache_prefixes=True)
    cached(manager, [1, 2, 3])
    assert manager.cached_length([1, 2, 9, 9]) == (1 if successor else 2)
    assert manager.cached_length([1, 2, 3, 9]) == (2 if successor else 3)


def test_no_cache():
    manager = SlotManager(8, successor_keys=False, cache_prefixes=False)
    assert cached(manager, [1, 2, 3]) == []
    assert (manager.cached_length([1, 2, 3]), manager.num_free) == (0, 8)


@pytest.mark.parametrize("successor", [False, True], ids=["token", "successor"])
def test_what_lacks_draft_kv_is_for_requests_without_drafts(successor):
    """The answer [3, 4] to [1, 2] was decoded plainly."""
    manager = SlotManager(20, successor, cache_prefixes=True)
    pinned = manager.match([1, 2], drafted=False)
    text = [1, 2, 3, 4, 5]
    manager.unpin(manager.share(text, manager.allocate(4), pinned, num_drafted=2))
    plain, drafting = (manager.match([*text, 6], drafted=drafted) for drafted in (False, True))
    assert (len(plain.slots), plain.num_drafted) == (4, 2)
    assert drafting.slots == plain.slots[:2]


def test_flush_drops_what_nobody_uses_and_tells_no_lower_tier():
    told = []
    manager = SlotManager(10, successor_keys=False, cache_prefixes=True, on_evict=told.append)
    used = manager.share([1, 2, 3], manager.allocate(2), manager.match([1, 2, 3]))
    manager.unpin(manager.share([1, 5, 6, 7], manager.allocate(4), manager.match([9])))
    assert (manager.flush(), manager.num_free, manager.tree.num_slots) == (3, 8, 2)
    manager.unpin(used)
    assert (manager.flush(), manager.num_free, told) == (2, 10, [])
    manager.unpin(manager.share([1, 2, 3], manager.allocate(2), manager.match([9])))
    manager.allocate(10)
    assert len(told) == 1


def test_a_lower_tier_is_told_of_what_is_evicted_and_of_what_a_request_leaves():
    evicted: list[CachedPrefix] = []
    finished: list[CachedPrefix] = []

    def on_evict(prefix: CachedPrefix) -> None:
        assert not set(prefix.slots) & set(manager._free)
        evicted.append(prefix)

    def on_finish(prefix: CachedPrefix) -> None:
        assert manager.tree.num_locked == len(prefix.slots)
        finished.append(prefix)

    manager = SlotManager(6, successor_keys=True, cache_prefixes=True, on_evict=on_evict, on_finish=on_finish)
    kept = []
    for text in ([1, 2, 3, 4], [1, 2, 3, 5]):
        pinned = manager.match(text, salt="a")
        slots = pinned.slots + manager.allocate(3 - len(pinned.slots))
        manager.finish(manager.share(text, slots, pinned))
        assert finished.pop() == CachedPrefix("a", prefix_keys(text, successor=True), slots)
        kept.append(slots)
    manager.allocate(3)
    assert evicted == [CachedPrefix("a", prefix_keys([1, 2, 3, 4], successor=True), kept[0])]


def test_a_lower_tier_fills_what_is_missing():
    manager = SlotManager(6, successor_keys=False, cache_prefixes=True)
    known = cached(manager, [1, 2])
    calls = []
    assert manager.adopt([1, 2, 3, 4, 9], 4, lambda *call: calls.append(call)) == 4
    assert manager.match([1, 2, 3, 4, 9]).slots == known + calls[0][1]
    assert calls[0][0] == 2
    assert manager.adopt([1, 2, 3, 4, 9], 3, pytest.fail) == 4
    assert manager.adopt([5] * 8, 7, pytest.fail) == 0  # there is no room


def test_a_lower_tier_that_fails_leaves_nothing():
    manager = SlotManager(6, successor_keys=False, cache_prefixes=True)

    def fill(start: int, slots: list[int]) -> None:
        raise OSError("gone")

    with pytest.raises(OSError):
        manager.adopt([1, 2, 3], 2, fill)
    assert (manager.num_free, manager.tree.num_slots) == (6, 0)
