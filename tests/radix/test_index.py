"""Every unit has one owner, leased blocks stay, and what is found is what was published."""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from specbackend.radix.arena import UNIT_BYTES
from specbackend.radix.index import GROWTH_UNITS, Block, BlockIndex, Grant, Holder

NUM_UNITS = 9
TEXTS = ("abcde", "abxyz", "ax", "mn")
CHAINS = st.sampled_from([[t[: i + 1].encode() for i in range(n)] for t in TEXTS for n in range(1, len(t) + 1)])
NUM_BYTES = st.sampled_from([1, UNIT_BYTES, UNIT_BYTES + 1, 3 * UNIT_BYTES])


@dataclass
class User:
    holder: Holder
    leases: list[Grant] = field(default_factory=list)
    reservations: list[Grant] = field(default_factory=list)


class IndexMachine(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.index = BlockIndex(NUM_UNITS)
        self.users: list[User] = []
        self.content: dict[int, object] = {}  # by unit: what was written there last
        self.published: dict[bytes, Block] = {}  # the last one under each key, evicted or not

    @rule()
    def join(self):
        self.users.append(User(self.index.join()))

    @precondition(lambda self: self.users)
    @rule(data=st.data(), keys=CHAINS)
    def lookup(self, data, keys):
        user = data.draw(st.sampled_from(self.users))
        grant = self.index.lookup(user.holder, keys)
        assert [block.key for block in grant.blocks] == keys[: len(grant.blocks)]
        for block in grant.blocks:
            assert block is self.published[block.key]
        if grant.blocks:
            user.leases.append(grant)

    @precondition(lambda self: self.users)
    @rule(data=st.data(), keys=CHAINS, num_bytes=NUM_BYTES)
    def reserve(self, data, keys, num_bytes):
        user = data.draw(st.sampled_from(self.users))
        free = self.index.stats()["free_units"]
        grant = self.index.reserve(user.holder, keys, num_bytes)
        assert [block.key for block in grant.blocks] == [k for k in keys if k in {b.key for b in grant.blocks}]
        for block in grant.blocks:
            assert len(block.unit_numbers()) * UNIT_BYTES >= num_bytes
            for unit in block.unit_numbers():
                self.content[unit] = block
        if grant.blocks:
            user.reservations.append(grant)
        elif free * UNIT_BYTES >= num_bytes:
            assert all(self.is_known(key) for key in keys), "there was room"

    @precondition(lambda self: any(user.reservations for user in self.users))
    @rule(data=st.data())
    def commit(self, data):
        user = data.draw(st.sampled_from([user for user in self.users if user.reservations]))
        grant = user.reservations.pop(data.draw(st.integers(0, len(user.reservations) - 1)))
        count = data.draw(st.integers(0, len(grant.blocks)))
        published = self.index.commit(user.holder, grant.number, list(range(count)))
        assert published == grant.blocks[:count]
        self.published.update({block.key: block for block in published})

    @precondition(lambda self: any(user.leases for user in self.users))
    @rule(data=st.data(), is_poisoned=st.booleans())
    def release(self, data, is_poisoned):
        user = data.draw(st.sampled_from([user for user in self.users if user.leases]))
        grant = user.leases.pop(data.draw(st.integers(0, len(user.leases) - 1)))
        poisoned = [len(grant.blocks) - 1] if is_poisoned else []
        self.index.release(user.holder, grant.number, poisoned)
        if is_poisoned and self.published.get(grant.blocks[-1].key) is grant.blocks[-1]:
            assert not self.finds(grant.blocks[-1].key), "a poisoned block is never found again"

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def leave(self, data):
        user = self.users.pop(data.draw(st.integers(0, len(self.users) - 1)))
        self.index.leave(user.holder)

    @rule()
    def flush(self):
        self.index.flush()
        assert not any(self.finds(key) for key in self.published)

    @invariant()
    def audit_is_clean(self):
        assert self.index.audit() == []

    @invariant()
    def leased_and_reserved_blocks_keep_their_units(self):
        held = {block for user in self.users for grant in user.leases + user.reservations for block in grant.blocks}
        for block in held:
            assert all(self.content[unit] is block for unit in block.unit_numbers())

    def finds(self, key: bytes) -> bool:
        holder = self.index.join()
        found = self.index.lookup(holder, [key]).blocks
        self.index.leave(holder)
        return bool(found)

    def is_known(self, key: bytes) -> bool:
        reserved = {block.key for user in self.users for grant in user.reservations for block in grant.blocks}
        return key in reserved or self.finds(key)

    def teardown(self):
        if not hasattr(self, "index"):
            return
        for user in self.users:
            self.index.leave(user.holder)
        self.index.flush()
        assert self.index.stats()["free_units"] == NUM_UNITS


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def publish(index: BlockIndex, keys: list[bytes]) -> None:
    holder = index.join()
    index.commit(holder, index.reserve(holder, keys, 1).number, [0] * len(keys))
    index.leave(holder)


def found(index: BlockIndex, keys: list[bytes]) -> int:
    holder = index.join()
    count = len(index.lookup(holder, keys).blocks)
    index.leave(holder)
    return count


def test_the_longest_unused_goes_first_and_of_a_text_its_end():
    index = BlockIndex(6)
    publish(index, [b"a1", b"a2", b"a3"])
    publish(index, [b"b1", b"b2", b"b3"])
    assert found(index, [b"a1", b"a2", b"a3"]) == 3  # so b is older now
    publish(index, [b"c1", b"c2"])
    assert found(index, [b"b1", b"b2", b"b3"]) == 1
    assert found(index, [b"a1", b"a2", b"a3"]) == 3
    publish(index, [b"d1", b"d2", b"d3", b"d4"])
    assert found(index, [b"a1", b"a2", b"a3"]) == 2


def test_a_text_longer_than_the_arena_is_kept_from_its_start():
    index = BlockIndex(3)
    holder = index.join()
    keys = [bytes([i]) for i in range(5)]
    assert [block.key for block in index.reserve(holder, keys, 1).blocks] == keys[:3]


def test_audit_sees_each_kind_of_leak():
    def damaged(damage) -> list[str]:
        index = BlockIndex(4)
        publish(index, [b"a", b"b"])
        holder = index.join()
        index.reserve(holder, [b"c"], 1)
        assert index.audit() == []
        damage(index)
        return index.audit()

    assert damaged(lambda index: index._free.pop())
    assert damaged(lambda index: index._free.append(0))
    assert damaged(lambda index: index._idle.popitem())
    assert damaged(lambda index: setattr(index._blocks[b"a"], "leases", 1))
    assert damaged(lambda index: setattr(index._blocks[b"c"], "checksum", 1))
    assert damaged(lambda index: index._blocks.pop(b"b"))
    assert damaged(lambda index: index._holders.clear())


def test_units_are_provided_before_their_first_use():
    """Where the memory ends early, so does the arena."""
    provided = []

    def provide(first: int, count: int) -> None:
        if first >= 2 * GROWTH_UNITS:
            raise OSError("no more")
        provided.extend(range(first, first + count))

    index = BlockIndex(5 * GROWTH_UNITS, provide)
    holder = index.join()
    for i in range(5):
        keys = [bytes([i, j]) for j in range(GROWTH_UNITS)]
        grant = index.reserve(holder, keys, 1)
        assert {unit for block in grant.blocks for unit in block.unit_numbers()} <= set(provided)
        assert len(grant.blocks) == (GROWTH_UNITS if i < 2 else 0)
    assert index.stats()["units"] == 2 * GROWTH_UNITS
    assert index.audit() == []
