"""A snapshot brings back what was there, and nothing that it is not sure of."""

import pytest

from specbackend.radix.arena import UNIT_BYTES, Arena, create_memory
from specbackend.radix.cache import BlockCache
from specbackend.radix.client import ask
from specbackend.radix.index import BlockIndex
from specbackend.radix.protocol import Snapshot
from specbackend.radix.snapshot import RECORD, restore, save
from tests.radix.sidecars import LAYOUT, PATIENT_S, leaks, payload, read, running, stats, store

KEYS = LAYOUT.keys(range(41))


def empty_cache(num_units: int = 32) -> BlockCache:
    return BlockCache(BlockIndex(num_units), Arena(create_memory(num_units * UNIT_BYTES), num_units * UNIT_BYTES))


def sound(cache: BlockCache, keys: list[bytes]) -> int:
    """How many of the keys there are, one by one; fails the test if one has another's bytes."""
    holder, count = cache.index.join(), 0
    for key in keys:
        for block in cache.index.lookup(holder, [key]).blocks:
            assert (cache.read(block) == payload(key)).all()
            count += 1
    cache.index.leave(holder)
    assert cache.index.audit() == []
    return count


@pytest.fixture
def snapshot(tmp_path):
    cache = empty_cache()
    holder = cache.index.join()
    for key in KEYS:
        cache.publish(holder, key, payload(key))
    cache.index.leave(holder)
    assert save(tmp_path / "snapshot", cache, [LAYOUT]) == 10
    return tmp_path / "snapshot"


def test_round_trip(snapshot):
    cache = empty_cache()
    assert restore(snapshot, cache) == [LAYOUT]
    assert sound(cache, KEYS) == 10
    assert snapshot.stat().st_mode & 0o777 == 0o600
    assert list(snapshot.parent.iterdir()) == [snapshot]


def test_a_smaller_arena_keeps_the_most_recently_used(snapshot):
    cache = empty_cache(num_units=8)
    restore(snapshot, cache)
    assert sound(cache, KEYS) == sound(cache, KEYS[-4:]) == 4


@pytest.mark.parametrize("keep", [0, 10, 100, UNIT_BYTES, 5 * UNIT_BYTES + 7])
def test_truncated(snapshot, keep):
    snapshot.write_bytes(snapshot.read_bytes()[:keep])
    cache = empty_cache()
    restore(snapshot, cache)
    assert sound(cache, KEYS) <= keep // LAYOUT.block_bytes + 1


@pytest.mark.parametrize("part", ["key", "checksum", "length", "payload"])
def test_flipped_bits(snapshot, part):
    content = bytearray(snapshot.read_bytes())
    record = len(content) - 3 * (RECORD.size + LAYOUT.block_bytes)  # of the third block from the end
    content[record + {"key": 3, "checksum": 17, "length": 29, "payload": 1000}[part]] ^= 4
    snapshot.write_bytes(content)
    cache = empty_cache()
    restore(snapshot, cache)
    assert sound(cache, KEYS) == (7 if part == "length" else 9)


def test_poisoned_blocks_are_not_saved(tmp_path):
    cache = empty_cache()
    holder = cache.index.join()
    for key in KEYS[:2]:
        cache.publish(holder, key, payload(key))
    [block] = cache.index.lookup(holder, KEYS[:1]).blocks
    cache.arena._units[block.unit_numbers()[0], 5] ^= 1
    save(tmp_path / "snapshot", cache, [])
    fresh = empty_cache()
    restore(tmp_path / "snapshot", fresh)
    assert sound(fresh, KEYS) == 1


def test_a_sidecar_leaves_one_and_starts_with_it(connect, socket_path, tmp_path):
    path = tmp_path / "snapshot"
    with running(socket_path, "--snapshot", str(path)):
        assert store(connect(), KEYS) == 10
    with running(socket_path, "--snapshot", str(path)):
        assert [layout[0] for layout in stats(socket_path)["layouts"]] == [LAYOUT.fingerprint]
        assert read(connect(), KEYS) == 10
        assert leaks(socket_path) == []


def test_snapshot_on_request(sidecar, connect, socket_path, tmp_path):
    store(connect(), KEYS)
    ask(socket_path, Snapshot(str(tmp_path / "snapshot")), PATIENT_S)
    cache = empty_cache()
    restore(tmp_path / "snapshot", cache)
    assert sound(cache, KEYS) == 10
    with pytest.raises(ConnectionError, match="No such file"):
        ask(socket_path, Snapshot("/nowhere/snapshot"), PATIENT_S)
