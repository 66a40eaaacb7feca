"""A real sidecar and real clients: what is found is what was stored, whoever ends, restarts or damages what."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest

from specbackend.radix import arena as arena_module
from specbackend.radix.arena import UNIT_BYTES, Arena, create_memory
from specbackend.radix.client import Lease, RadixClient, ask
from specbackend.radix.index import GROWTH_UNITS
from specbackend.radix.process import SidecarProcess
from specbackend.radix.protocol import Attach, Attached, Commit, Flush, Found, Lookup, Release, Reserve, receive, send
from specbackend.radix.server import Sidecar, is_served, listen, parse_size
from tests.radix.sidecars import LAYOUT, PATIENT_S, leaks, payload, read, running, stats, stopped, store, wait_until

TOKENS = list(range(21))  # five blocks of four tokens, and one more
LONGEST_CALL_S = 2.0
OTHER_USER = 65534


def test_what_is_stored_is_found_by_every_engine(sidecar, connect, socket_path):
    keys = LAYOUT.keys(TOKENS)
    writer, reader = connect(), connect()
    assert (read(reader, keys), store(writer, keys), read(reader, keys)) == (0, 5, 5)
    assert store(reader, keys) == 0  # known already
    assert read(reader, LAYOUT.keys([*TOKENS[:9], 99, *TOKENS[9:]])) == 2
    assert read(reader, keys[2:]) == 3  # the first two are in the engine's own tree, say
    assert leaks(socket_path) == []
    assert (stats(socket_path)["published_blocks"], stats(socket_path)["leased_blocks"]) == (5, 0)


def test_cached_tokens(sidecar, connect):
    client = connect()
    store(client, LAYOUT.token_keys(TOKENS))
    assert [client.cached_tokens(TOKENS[:count]) for count in (4, 5, 9, 20, 21)] == [0, 4, 8, 16, 20]
    assert client.cached_tokens(TOKENS, "salt") == 0


def test_only_what_is_missing_is_written(sidecar, connect):
    keys, asked = LAYOUT.keys(TOKENS), []
    client = connect()
    store(client, keys[:3])

    def fill(places: list[int]) -> np.ndarray:
        asked.extend(places)
        return np.stack([payload(keys[place]) for place in places])

    assert client.store(keys, fill).result() == 2
    assert asked == [3, 4]
    assert read(client, keys) == 5


def test_salts_and_fingerprints_see_nothing_of_each_other(sidecar, connect):
    """Each stores the same tokens, with other bytes, and finds its own."""
    texts = [(LAYOUT, None), (LAYOUT, "salt"), (replace(LAYOUT, fingerprint=b"model two"), None)]
    for layout, salt in texts:
        assert read(connect(layout), layout.keys(TOKENS, salt)) == 0
        assert store(connect(layout), layout.keys(TOKENS, salt)) == 5
    for layout, salt in texts:
        assert read(connect(layout), layout.keys(TOKENS, salt)) == 5


def test_models_with_blocks_of_other_sizes_share_the_memory(sidecar, connect, socket_path):
    small = replace(LAYOUT, fingerprint=b"small", bytes_per_token=10)
    client = connect(small)
    assert store(client, small.keys(range(100))) == 25
    assert store(connect(), LAYOUT.keys(range(200))) == 16  # of two units each
    assert read(client, small.keys(range(100))) == 0  # and of a text the first block goes last
    assert leaks(socket_path) == []


def test_leased_blocks_are_not_evicted(sidecar, connect, socket_path):
    """32 units, two a block."""
    client, other = connect(), connect()
    keys = LAYOUT.keys(TOKENS)
    store(client, keys)
    lease = client.lookup(keys)
    assert store(other, LAYOUT.keys(range(100, 200))) == 11  # all the rest
    out = np.zeros((5, LAYOUT.block_bytes), np.uint8)
    assert client.read(lease, out) == 5
    assert all(np.array_equal(row, payload(key)) for key, row in zip(keys, out, strict=True))
    assert store(other, LAYOUT.keys(range(300, 321))) == 5
    assert leaks(socket_path) == []


def test_flush_forgets_and_leases_outlive_it(sidecar, connect, socket_path):
    client, keys = connect(), LAYOUT.keys(TOKENS)
    store(client, keys)
    lease = client.lookup(keys)
    ask(socket_path, Flush(), PATIENT_S)
    assert read(client, keys) == 0
    assert store(client, keys[:1]) == 1
    assert stats(socket_path)["free_units"] == 32 - 10 - 2
    out = np.zeros((5, LAYOUT.block_bytes), np.uint8)
    assert client.read(lease, out) == 5
    assert stats(socket_path)["free_units"] == 32 - 2
    assert leaks(socket_path) == []


@pytest.mark.parametrize("holds", ["leases", "reservations"])
def test_what_a_killed_engine_held_is_free_again(sidecar, connect, socket_path, holds):
    keys = LAYOUT.keys(TOKENS)
    store(connect(), keys)
    program = f"""
import sys, time
sys.path[:0] = {sys.path!r}
from tests.radix.sidecars import *
client = RadixClient(Path({str(socket_path)!r}), LAYOUT, PATIENT_S)
if {holds!r} == "leases":
    lease = client.lookup(LAYOUT.keys(range(21)))
    print(lease.num_blocks, flush=True)
else:
    def fill(places):
        print(len(places), flush=True)
        time.sleep(3600)
    client.store(LAYOUT.keys(range(50, 71)), fill)
time.sleep(3600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as engine:
        holds_five = engine.stdout.readline() == "5\n"
        held = stats(socket_path)["leased_blocks" if holds == "leases" else "reserved_blocks"]
        engine.kill()
    assert (holds_five, held) == (True, 5)
    wait_until(lambda: stats(socket_path)["leased_blocks"] + stats(socket_path)["reserved_blocks"] == 0)
    assert stats(socket_path)["free_units"] == 32 - 10
    assert leaks(socket_path) == []


def test_a_failing_fill_gives_up_its_blocks_and_no_more(sidecar, connect, socket_path):
    client, keys = connect(), LAYOUT.keys(TOKENS)
    with pytest.raises(RuntimeError, match="no rows"):
        client.store(keys, lambda places: (_ for _ in ()).throw(RuntimeError("no rows"))).result()
    assert stats(socket_path)["free_units"] == 32
    assert store(client, keys) == read(client, keys) == 5


def test_a_full_queue_drops_and_says_so(sidecar, connect):
    client, gate = connect(), threading.Event()

    def fill(places: list[int]) -> np.ndarray:
        gate.wait(PATIENT_S)
        return np.zeros((len(places), LAYOUT.block_bytes), np.uint8)

    futures = [client.store(LAYOUT.keys([i] * 5), fill) for i in range(100)]
    assert futures.count(None) == 36
    gate.set()


# ---- poisoned blocks


def arena_of(client: RadixClient) -> np.ndarray:
    client.lookup([bytes(16)])  # attaches
    return client._reader.arena._units


def flip_a_bit(units: np.ndarray, at: int) -> None:
    units[at, 100] ^= 1 << 3


def swap_two(units: np.ndarray, at: int) -> None:
    units[[at, at - 2]] = units[[at - 2, at]]  # the next block's


def zero_the_rest(units: np.ndarray, at: int) -> None:
    units[at, UNIT_BYTES // 2 :] = 0


@pytest.mark.parametrize("damage", [flip_a_bit, swap_two, zero_the_rest])
def test_poisoned_blocks_are_never_used(sidecar, connect, socket_path, damage):
    """Somebody wrote where he should not: what is behind the first bad block is not used, and it is forgotten."""
    client, keys = connect(), LAYOUT.keys(TOKENS)
    store(client, keys)
    lease = client.lookup(keys)
    damage(arena_of(client), lease.units[2][0])
    client.release(lease)
    assert read(client, keys) == 2
    assert client.num_poisoned == 1
    assert stats(socket_path)["poisoned_blocks"] == 1
    assert read(connect(), keys) == 2  # nobody finds it any more
    for _ in range(2):  # the damage may be to two blocks
        store(client, keys)
        sound = read(client, keys)
    assert sound == 5
    assert leaks(socket_path) == []


# ---- a sidecar that is gone, silent or mad


def test_without_a_sidecar_everything_is_a_miss_at_once(connect):
    client, keys = connect(timeout_s=0.25), LAYOUT.keys(TOKENS)
    start = time.monotonic()
    for _ in range(100):
        assert read(client, keys) == 0
    assert store(client, keys) == 0
    assert time.monotonic() - start < LONGEST_CALL_S
    assert client._reader.num_failures < 10  # the breaker spares it the rest


def test_a_restarted_sidecar_is_found_again(connect, socket_path):
    client, keys = connect(), LAYOUT.keys(TOKENS)
    for _ in range(2):
        with running(socket_path) as sidecar:
            wait_until(lambda: store(client, keys) == 5)
            wait_until(lambda: read(client, keys) == 5)
            lease = client.lookup(keys)
            sidecar.kill()
            sidecar.wait()
            out = np.zeros((5, LAYOUT.block_bytes), np.uint8)
            assert client.read(lease, out) == 5  # the memory lives as long as it is mapped
            assert read(client, keys) == 0


def test_a_lease_of_the_sidecar_before_releases_nothing(connect, socket_path):
    client, keys = connect(), LAYOUT.keys(TOKENS)

    def lease() -> Lease:
        """As soon as the client looks for the sidecar again."""
        tries = []
        wait_until(lambda: tries.append(client.lookup(keys)) or tries[-1])
        return tries[-1]

    with running(socket_path) as sidecar:
        store(connect(), keys)
        stale = lease()
        sidecar.kill()
    with running(socket_path):
        store(connect(), keys)
        assert lease().number == stale.number
        client.release(stale)
        assert stats(socket_path)["leased_blocks"] == 5


def test_a_stopped_sidecar_costs_a_timeout_and_no_more(sidecar, connect):
    client, keys = connect(timeout_s=0.25), LAYOUT.keys(TOKENS)
    wait_until(lambda: store(client, keys) == 5)
    with stopped(sidecar):
        for _ in range(5):
            start = time.monotonic()
            assert read(client, keys) == 0
            assert time.monotonic() - start < LONGEST_CALL_S
    wait_until(lambda: read(client, keys) == 5)


class FakeSidecar:
    """Answers every connection's first request with `attached` and each later one with `reply`."""

    def __init__(self, path, attached, memory_fd, reply=None, user=None):
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        if user is not None:
            os.seteuid(user)  # a socket belongs to who listens
        self._listener.listen()
        if user is not None:
            os.seteuid(0)
        self._attached, self._memory_fd, self._reply = attached, memory_fd, reply
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError, EOFError):
            while True:
                connection, _ = self._listener.accept()
                assert isinstance(receive(connection), Attach)
                send(connection, self._attached, (self._memory_fd,))
                with suppress(OSError, EOFError):
                    while True:
                        receive(connection)
                        if isinstance(self._reply, bytes):
                            connection.sendall(self._reply)
                        else:
                            send(connection, self._reply)


def memory_of(num_bytes: int, seals: int) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    arena_module.fcntl.fcntl(fd, arena_module.fcntl.F_ADD_SEALS, seals)
    return fd


@pytest.mark.parametrize(
    ("fd", "announced"),
    [
        (lambda: memory_of(4 * UNIT_BYTES, arena_module.SEALS), 8 * UNIT_BYTES),
        (lambda: memory_of(8 * UNIT_BYTES, 0), 8 * UNIT_BYTES),
        (lambda: os.open("/dev/null", os.O_RDONLY), 8 * UNIT_BYTES),
    ],
    ids=["truncated", "not sealed", "no memory"],
)
def test_an_arena_that_is_not_all_there_is_not_touched(connect, socket_path, fd, announced):
    """To read behind its end would be this process's end."""
    FakeSidecar(socket_path, Attached(announced), fd(), Found(0, [0], b"\0" * 8))
    assert connect().lookup(LAYOUT.keys(TOKENS)) is None


def test_the_arena_cannot_be_truncated():
    fd = create_memory(4 * UNIT_BYTES)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, UNIT_BYTES)
    assert Arena(fd, 4 * UNIT_BYTES).num_units == 4


@pytest.mark.parametrize(
    "reply",
    [
        Found(0, [0], (99).to_bytes(4, "little") * 2),
        Found(0, [0, 0], bytes(4)),
        Found(0, [0], b"odd"),
        b"\xff\xff\xff\xff",
        b"\x01\x00\x00\x00\xc1",
        b"\x02\x00\x00\x00\x91\x63",
    ],
    ids=["no such unit", "too few units", "half a unit", "endless", "no msgpack", "no message"],
)
def test_nonsense_is_a_miss(connect, socket_path, reply):
    FakeSidecar(socket_path, Attached(8 * UNIT_BYTES), create_memory(8 * UNIT_BYTES), reply)
    assert connect().lookup(LAYOUT.keys(TOKENS)) is None


@pytest.mark.parametrize("garbage", [b"\xff" * 4, b"\x01\x00\x00\x00\xc1", b"\x02\x00\x00\x00\x91\x63"])
def test_a_mad_client_is_dropped_alone(sidecar, connect, socket_path, garbage):
    keys = LAYOUT.keys(TOKENS)
    store(connect(), keys)
    with socket.socket(socket.AF_UNIX) as mad:
        mad.connect(str(socket_path))
        mad.sendall(garbage)
        assert mad.recv(1) == b""
    assert read(connect(), keys) == 5


@pytest.mark.parametrize("request_", [Lookup([b"k"]), Reserve([b"k"]), Release(7), Commit(7, [1])])
def test_requests_out_of_order_are_refused(sidecar, socket_path, request_):
    with pytest.raises(ConnectionError, match=r"attach first|no such lease or reservation"):
        ask(socket_path, request_, PATIENT_S)


def test_a_block_larger_than_the_arena_is_refused(sidecar, connect):
    assert connect(replace(LAYOUT, bytes_per_token=UNIT_BYTES * 9)).lookup([b"k"]) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_another_users_sidecar_is_not_believed(connect, socket_path):
    memory = create_memory(8 * UNIT_BYTES)
    FakeSidecar(socket_path, Attached(8 * UNIT_BYTES), memory, Found(0, [0], bytes(8)), user=OTHER_USER)
    assert connect().lookup(LAYOUT.keys(TOKENS)) is None
    FakeSidecar(socket_path.with_name("ours"), Attached(8 * UNIT_BYTES), memory, Found(0, [0], bytes(8)))
    assert RadixClient(socket_path.with_name("ours"), LAYOUT, PATIENT_S).lookup(LAYOUT.keys(TOKENS)) is not None


def test_memory_is_taken_as_it_is_needed():
    sidecar = Sidecar(4 * GROWTH_UNITS * UNIT_BYTES)
    assert os.fstat(sidecar.memory_fd).st_blocks == 0
    sidecar.cache.publish(sidecar.cache.index.join(), b"key", np.zeros(1, np.uint8))
    assert os.fstat(sidecar.memory_fd).st_blocks * 512 == GROWTH_UNITS * UNIT_BYTES


# ---- the process


def test_the_socket_is_this_users_only(sidecar, socket_path):
    assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600


def test_the_socket_is_gone_with_the_sidecar(socket_path):
    with running(socket_path):
        pass
    assert not socket_path.exists()


def test_a_signal_that_comes_early(socket_path):
    """It serves, but does not wait for its end yet: numpy's threads would take the signal."""
    program = """
import threading, time
from specbackend.radix import server
start = threading.Thread.start
threading.Thread.start = lambda thread: (start(thread), time.sleep(1))
raise SystemExit(server.main(["--socket", %r, "--size", "1MiB"]))
"""
    child = subprocess.Popen([sys.executable, "-c", program % str(socket_path)])
    wait_until(lambda: is_served(socket_path))
    child.terminate()
    assert child.wait(PATIENT_S) == 0
    assert not socket_path.exists()


def test_one_sidecar_a_socket(sidecar, socket_path):
    with pytest.raises(OSError, match="serves there already"), listen(socket_path):
        pass


def test_a_dead_sidecars_socket_is_taken_over(connect, socket_path):
    with running(socket_path) as sidecar:
        sidecar.kill()
        sidecar.wait()
    assert socket_path.exists()
    with running(socket_path):
        wait_until(lambda: store(connect(), LAYOUT.keys(TOKENS)) == 5)


def test_it_ends_with_the_process_that_it_follows(socket_path):
    with subprocess.Popen(["sleep", "60"]) as leader, running(socket_path, "--follow", str(leader.pid)) as sidecar:
        leader.kill()
        assert sidecar.wait(PATIENT_S) == 0
    assert not socket_path.exists()


def test_a_sidecar_process_is_started_again(connect, socket_path):
    process = SidecarProcess(socket_path, ["--size", "2MiB"])
    try:
        assert process.wait_ready(PATIENT_S)
        first = process.pid
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: process.pid != first)
        assert process.wait_ready(PATIENT_S)
        assert store(connect(), LAYOUT.keys(TOKENS)) == 5
    finally:
        process.close()
    assert not socket_path.exists()


def test_a_second_process_takes_over_when_the_first_is_closed(connect, socket_path):
    """As when Triton reloads a model: the new instance starts before the old one ends."""
    first, second = (SidecarProcess(socket_path, ["--size", "2MiB"]) for _ in range(2))
    try:
        assert first.wait_ready(PATIENT_S)
        first.close()
        wait_until(lambda: store(connect(), LAYOUT.keys(TOKENS)) == 5)
        second.close()
        assert not socket_path.exists()
    finally:
        first.close()
        second.close()


@pytest.mark.parametrize(("text", "size"), [("65536", 65536), ("512MiB", 512 << 20), ("4 G", 4 << 30), ("1kB", None)])
def test_sizes(text, size):
    if size is None:
        with pytest.raises(ValueError, match="is no size"):
            parse_size(text)
    else:
        assert parse_size(text) == size


def test_the_sidecar_needs_no_torch():
    program = "import sys, specbackend.radix.server, specbackend.radix.client; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
