"""Two engines' caches at a real sidecar: what one leaves, the other finds, bit for bit, or nothing."""

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from specbackend.cache import host_tier
from specbackend.cache.host_tier import BLOCK_TOKENS, HostTier
from specbackend.cache.kv_pool import KVPool
from specbackend.cache.radix_tree import prefix_keys
from specbackend.cache.slots import PinnedPrefix, SlotManager
from specbackend.radix.breaker import CircuitBreaker
from specbackend.radix.client import Fill, RadixClient, ask
from specbackend.radix.keys import Layout
from specbackend.radix.protocol import Flush
from tests.radix.sidecars import PATIENT_S, leaks, running, stats

BYTES_PER_TOKEN = (3 * 2 + 1 * 4) * 2 * 8 * 2  # of the pools below
LAYOUT = Layout(b"model", BYTES_PER_TOKEN, BLOCK_TOKENS, successor=True)
TEXT = random.Random(0).choices(range(100), k=5 * BLOCK_TOKENS + 7)
NUM_BLOCKS = (len(TEXT) - 1) // BLOCK_TOKENS


class Engine:
    """Pools of a target and a draft, whose KV follows from the text, and all that holds them."""

    def __init__(self, path: Path, layout: Layout = LAYOUT, hook: str = "on_finish", num_slots: int = 300):
        self.pools = [
            KVPool(3, num_slots + 1, 2, 8, torch.float16, "cpu"),
            KVPool(1, num_slots + 1, 4, 8, torch.float16, "cpu"),
        ]
        self.client = RadixClient(path, layout, PATIENT_S)
        self.client.store = self._store
        self.writes: list[Future] = []
        self.tier = HostTier(self.client, self.pools)
        self.slots = SlotManager(num_slots, layout.successor, True, **{hook: self.tier.keep})

    def bring(self, text: list[int], salt: str | None = None) -> int:
        """How many tokens are cached then; fails the test if one's KV is not its own."""
        self.tier.bring(self.slots, text, salt)
        pinned = self.slots.match(text, salt)
        self.check(text, pinned)
        self.slots.unpin(pinned)
        return len(pinned.slots)

    def compute(self, text: list[int], salt: str | None = None, num_drafted: int | None = None) -> None:
        """As a request does that comes and goes."""
        pinned = self.slots.match(text, salt, drafted=num_drafted is None)
        known = len(pinned.slots)
        slots = pinned.slots + self.slots.allocate(len(text) - known)
        for pool, kv in zip(self.pools, kv_of(text, salt), strict=True):
            pool.write(torch.tensor(slots[known:]), kv[known:])
        pinned = self.slots.share(text, slots, pinned, num_drafted)
        self.slots.release(slots[len(pinned.slots) :])
        self.slots.finish(pinned)

    def check(self, text: list[int], pinned: PinnedPrefix) -> None:
        for pool, kv in zip(self.pools, kv_of(text, pinned.salt), strict=True):
            assert torch.equal(pool.payload(torch.tensor(pinned.slots, dtype=torch.int64)), kv[: len(pinned.slots)])

    def overwrite_pool(self) -> None:
        for layer in (pool.layer(index) for pool in self.pools for index in range(len(pool._layers))):
            layer.fill_(9)

    def forget(self) -> None:
        """All that can be evicted is."""
        self.slots.release(self.slots.allocate(self.slots.num_available))

    def written(self) -> int:
        """How many blocks were written since the last time, once they all are."""
        writes, self.writes = self.writes, []
        return sum(written.result() for written in writes)

    def _store(self, keys: list[bytes], fill: Fill) -> Future:
        self.writes.append(RadixClient.store(self.client, keys, fill))
        return self.writes[-1]


def kv_of(text: list[int], salt: str | None) -> list[torch.Tensor]:
    """Of the target and the draft, uint8 [len(text), slot_bytes]: a function of the text up to the token behind."""
    keys = [salt, *prefix_keys([*text, 0], successor=True)]
    seeds = [random.Random(repr(keys[: end + 1])).getrandbits(32) for end in range(1, len(text) + 1)]
    rows = np.stack([np.random.default_rng(seed).integers(0, 120, BYTES_PER_TOKEN, np.uint8) for seed in seeds])
    return list(torch.from_numpy(rows).split([3 * 2 * 2 * 8 * 2, 1 * 2 * 4 * 8 * 2], dim=1))


@pytest.fixture
def path(tmp_path) -> Iterator[Path]:
    with running(tmp_path / "radix.sock", num_units=64):
        yield tmp_path / "radix.sock"
        assert leaks(tmp_path / "radix.sock") == []


@pytest.fixture
def new_engine(tmp_path) -> Iterator[Callable[..., Engine]]:
    engines = []

    def make(**options) -> Engine:
        engines.append(Engine(tmp_path / "radix.sock", **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.tier.close()


def test_what_one_engine_leaves_another_finds(path, new_engine):
    one, other = new_engine(), new_engine()
    one.compute(TEXT)
    one.overwrite_pool()  # the tier has a copy
    assert one.written() == NUM_BLOCKS
    assert other.bring(TEXT) == NUM_BLOCKS * BLOCK_TOKENS
    assert other.bring([*TEXT[:40], 5, *TEXT[40:]]) == 39  # the pool's
    assert new_engine().bring([*TEXT[:40], 5, *TEXT[40:]]) == 2 * BLOCK_TOKENS
    assert stats(path)["leased_blocks"] == 0


def test_what_the_pool_has_already_is_not_read(path, new_engine):
    one, other = new_engine(), new_engine()
    one.compute(TEXT)
    one.written()
    other.compute(TEXT[:40])
    before = other.slots.match(TEXT).slots
    assert other.bring(TEXT) == NUM_BLOCKS * BLOCK_TOKENS
    assert other.slots.match(TEXT).slots[:39] == before


def test_what_is_known_is_not_copied_again(path, new_engine, monkeypatch):
    copied, copy = [], HostTier._blocks
    monkeypatch.setattr(HostTier, "_blocks", lambda *args: copied.append(len(args[2])) or copy(*args))
    one, other = new_engine(), new_engine()
    longer = [*TEXT, *range(2 * BLOCK_TOKENS)]
    for text in (TEXT, TEXT, longer):
        one.compute(text)
    assert (copied, one.written()) == ([NUM_BLOCKS, 2], NUM_BLOCKS + 2)
    other.bring(longer)
    other.compute(longer)
    assert copied == [NUM_BLOCKS, 2]


def test_kv_without_drafts_stays_here(path, new_engine):
    one = new_engine()
    one.compute(TEXT, num_drafted=2 * BLOCK_TOKENS + 3)
    assert one.written() == 2
    assert new_engine().bring(TEXT) == 2 * BLOCK_TOKENS


def test_texts_that_part_anywhere_come_back_whole_after_eviction(path, new_engine):
    """The tree's nodes end in the midst of blocks."""
    one = new_engine(hook="on_evict")
    texts = [TEXT, [*TEXT[:35], *range(40)], TEXT[:50], [*TEXT, *range(30)]]
    for text in texts:
        one.compute(text)
    assert one.written() == 0
    one.forget()
    one.overwrite_pool()
    one.written()
    for text in texts:
        assert one.bring(text) >= (len(text) - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def test_salts_and_other_models_find_nothing(path, new_engine):
    one = new_engine()
    one.compute(TEXT, "salt")
    one.written()
    assert one.bring(TEXT) == 0
    assert new_engine().bring(TEXT, "pepper") == 0
    assert new_engine(layout=replace(LAYOUT, fingerprint=b"other")).bring(TEXT, "salt") == 0
    assert new_engine().bring(TEXT, "salt") == NUM_BLOCKS * BLOCK_TOKENS


def test_a_damaged_block_ends_what_is_found_and_is_written_again(path, new_engine):
    one, other = new_engine(), new_engine()
    one.compute(TEXT)
    one.written()
    lease = one.client.lookup(LAYOUT.keys(prefix_keys(TEXT, True)))
    lease.arena.write(lease.units[3], np.zeros(LAYOUT.block_bytes, np.uint8))
    one.client.release(lease)
    assert other.bring(TEXT) == 3 * BLOCK_TOKENS
    other.compute(TEXT)
    assert other.written() == 1
    assert new_engine().bring(TEXT) == NUM_BLOCKS * BLOCK_TOKENS


@pytest.mark.parametrize("num_staged", [1, 2, 4])
def test_long_texts_come_in_parts(path, new_engine, num_staged, monkeypatch):
    monkeypatch.setattr(host_tier, "STAGING_BYTES", num_staged * LAYOUT.block_bytes)
    one, other = new_engine(), new_engine()
    one.compute(TEXT)
    one.written()
    other.compute(TEXT[:21])
    assert other.bring(TEXT) == NUM_BLOCKS * BLOCK_TOKENS


def test_as_much_as_there_is_room_for(path, new_engine, monkeypatch):
    monkeypatch.setattr(host_tier, "STAGING_BYTES", 2 * LAYOUT.block_bytes)
    one, small = new_engine(), new_engine(num_slots=70)
    one.compute(TEXT)
    one.written()
    assert small.bring(TEXT) == 4 * BLOCK_TOKENS
    assert stats(path)["leased_blocks"] == 0


def test_copies_take_limited_memory(path, new_engine, monkeypatch):
    monkeypatch.setattr(host_tier, "MOST_UNWRITTEN_BYTES", 2 * LAYOUT.block_bytes)
    one = new_engine()
    one.compute(TEXT)
    assert one.written() == 2
    one.compute(TEXT)
    assert one.written() == 2
    assert new_engine().bring(TEXT) == 4 * BLOCK_TOKENS


def test_what_the_sidecar_has_lost_is_stored_again(path, new_engine):
    one = new_engine()
    one.compute(TEXT)
    one.written()
    ask(path, Flush(), PATIENT_S)
    one.forget()
    assert one.bring(TEXT) == 0
    one.compute(TEXT)
    assert one.written() == NUM_BLOCKS


def test_without_a_sidecar_the_cache_is_the_pool(tmp_path, new_engine):
    one = new_engine()
    assert one.bring(TEXT) == 0
    one.compute(TEXT)
    assert one.written() == 0
    assert one.bring([*TEXT, 1]) == len(TEXT) - 1
    with running(tmp_path / "radix.sock", num_units=64):
        for connection in (one.client._reader, one.client._writer):
            connection._breaker = CircuitBreaker()  # it would leave the sidecar alone for a while
        assert one.bring([*TEXT, 1]) == len(TEXT) - 1
        one.compute([*TEXT, 1])
        assert one.written() == NUM_BLOCKS
    one.forget()
    assert one.bring(TEXT) == 0


def test_what_was_given_arrives_before_the_end(path, new_engine):
    one = new_engine()
    one.client._worker.submit(time.sleep, 0.2)  # is before it in the queue
    one.compute(TEXT)
    one.tier.close()
    assert new_engine().bring(TEXT) == NUM_BLOCKS * BLOCK_TOKENS


def test_a_text_of_less_than_a_block_costs_no_call(new_engine):
    one = new_engine()
    one.client.lookup = one.client.prefetch = pytest.fail
    one.tier.prefetch(one.slots, TEXT[:BLOCK_TOKENS], None)
    assert one.bring(TEXT[:BLOCK_TOKENS]) == 0
