"""A real server behind real sidecars: blocks travel between hosts, and its death costs misses only."""

import os
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from specbackend.radix.client import RadixClient
from specbackend.radix.keys import checksum
from specbackend.radix.tiers import CHECKSUM, PREFIX, ValkeyStore
from tests.radix.sidecars import LAYOUT, PATIENT_S, leaks, payload, read, running, stats, store, wait_until

SERVER = shutil.which("valkey-server") or shutil.which("redis-server")
MISSING = "THE THIRD TIER IS NOT TESTED: no valkey-server or redis-server on PATH (apt install redis-server)"
KEYS = LAYOUT.keys(range(41))
LONGEST_CALL_S = 2.0

if SERVER is None:
    warnings.warn(MISSING, stacklevel=1)
pytestmark = pytest.mark.skipif(SERVER is None, reason=MISSING)


class Server:
    """A Valkey or Redis on a port of its own, without files."""

    def __init__(self, folder: Path, *options: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        plain = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder))
        self._command = [SERVER, "--port", str(self.port), *plain, *options]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        wait_until(self.answers)

    def answers(self) -> bool:
        try:
            return self.run("PING").startswith(b"+PONG")
        except OSError:
            return False

    def run(self, *words: object) -> bytes:
        """The server's answer to a command, as it is on the wire."""
        with socket.create_connection(("127.0.0.1", self.port), PATIENT_S) as connection:
            connection.sendall(f"*{len(words)}\r\n".encode() + b"".join(_bulk(word) for word in words))
            return connection.recv(1 << 16)

    def num_keys(self) -> int:
        return int(self.run("DBSIZE")[1:])

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def _bulk(word: object) -> bytes:
    value = word if isinstance(word, bytes) else str(word).encode()
    return b"$%d\r\n%s\r\n" % (len(value), value)


@pytest.fixture
def start_server(tmp_path) -> Iterator[Callable[..., Server]]:
    servers = []

    def start(*options: str) -> Server:
        servers.append(Server(tmp_path, *options))
        return servers[-1]

    yield start
    for server in servers:
        server.end()


@pytest.fixture
def valkey(start_server) -> Server:
    return start_server()


def fetched(client: RadixClient, keys: list[bytes], count: int) -> bool:
    client.prefetch(keys)
    return read(client, keys) == count


def test_a_block_goes_from_host_to_host(valkey, tmp_path):
    url = f"valkey://127.0.0.1:{valkey.port}"
    for name in ("one", "two"):  # the second sidecar has seen nothing of the first
        path = tmp_path / f"{name}.sock"
        with running(path, "--valkey", url):
            client = RadixClient(path, LAYOUT, PATIENT_S)
            if name == "one":
                assert store(client, KEYS) == 10
                wait_until(lambda: valkey.num_keys() == 10)
            else:
                assert read(client, KEYS) == 0
                wait_until(lambda client=client: fetched(client, KEYS, 10))
                wait_until(lambda path=path: stats(path)["store_fetched_blocks"] == 10)
            assert leaks(path) == []
            client.close()
    assert int(valkey.run("TTL", PREFIX + KEYS[0])[1:]) > 0


def test_a_cluster(start_server, tmp_path):
    nodes = [start_server("--cluster-enabled", "yes", "--cluster-config-file", f"node{i}.conf") for i in range(2)]
    for node, first, last in zip(nodes, (0, 8192), (8191, 16383), strict=True):
        assert node.run("CLUSTER", "ADDSLOTSRANGE", first, last).startswith(b"+OK")
    nodes[1].run("CLUSTER", "SET-CONFIG-EPOCH", 2)
    nodes[0].run("CLUSTER", "MEET", "127.0.0.1", nodes[1].port)
    wait_until(lambda: all(b"cluster_state:ok" in node.run("CLUSTER", "INFO") for node in nodes))
    cluster = ValkeyStore(f"valkey-cluster://127.0.0.1:{nodes[0].port}")
    for key in KEYS:
        cluster.put(key, key * 2)
    assert all(node.num_keys() for node in nodes)  # so the keys do lie on both
    assert cluster.get([KEYS[0], b"none", *KEYS[1:]]) == [KEYS[0] * 2, None, *(key * 2 for key in KEYS[1:])]
    assert cluster.num_errors == 0


def foreign_length(key: bytes) -> bytes:
    return CHECKSUM.pack(checksum(key, b"short")) + b"short"


def flipped_bit(key: bytes) -> bytes:
    block = payload(key)
    good = checksum(key, block)
    block[100] ^= 1
    return CHECKSUM.pack(good) + block.tobytes()


def of_another_key(key: bytes) -> bytes:
    block = payload(KEYS[0])
    return CHECKSUM.pack(checksum(KEYS[0], block)) + block.tobytes()


@pytest.mark.parametrize("bad_value", [foreign_length, flipped_bit, of_another_key, lambda key: b""])
def test_bad_values_are_not_taken(valkey, tmp_path, bad_value):
    url, path = f"redis://127.0.0.1:{valkey.port}", tmp_path / "radix.sock"
    fill = ValkeyStore(url)
    for key in KEYS:
        block = payload(key)
        fill.put(key, CHECKSUM.pack(checksum(key, block)) + block.tobytes())
    fill.put(KEYS[3], bad_value(KEYS[3]))
    with running(path, "--valkey", url):
        client = RadixClient(path, LAYOUT, PATIENT_S)
        wait_until(lambda: fetched(client, KEYS, 3))
        wait_until(lambda: fetched(client, KEYS[4:], 6))
        assert read(client, KEYS) == 3
        client.close()


def test_a_server_that_never_was_costs_nothing(tmp_path):
    path = tmp_path / "radix.sock"
    with running(path, "--valkey", "valkey://127.0.0.1:1"):
        client = RadixClient(path, LAYOUT, PATIENT_S)
        assert store(client, KEYS) == 10
        client.prefetch(LAYOUT.keys(range(100, 141)))
        assert read(client, KEYS) == 10
        wait_until(lambda: stats(path)["store_errors"] > 0)
        client.close()


@pytest.mark.parametrize("url", ["localhost:6379", "valkeyx://localhost", "http://localhost"])
def test_other_urls_are_refused(socket_path, url):
    command = [
        sys.executable,
        "-m",
        "specbackend.radix.server",
        "--socket",
        socket_path,
        "--size",
        "1M",
        "--valkey",
        url,
    ]
    sidecar = subprocess.run(command, capture_output=True, text=True, timeout=PATIENT_S)
    assert sidecar.returncode == 1 and sidecar.stderr.startswith(f"radix sidecar: {url!r} is no store: valkey://")


def test_a_silent_server_is_left_alone():
    """It accepts and says nothing: the first call waits, those after it do not."""
    with socket.create_server(("127.0.0.1", 0), backlog=8) as silent:
        silent_store = ValkeyStore(f"valkey://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        assert silent_store.get(KEYS) == [None] * 10
        for _ in range(100):
            silent_store.put(KEYS[0], b"value")
        assert time.monotonic() - start < LONGEST_CALL_S
        assert 0 < silent_store.num_errors < 5


def test_killed_and_restarted_under_load(valkey, tmp_path):
    """No call fails or hangs, no block is lost or wrong, and afterwards blocks travel again."""
    url, path = f"valkey://127.0.0.1:{valkey.port}", tmp_path / "radix.sock"
    with running(path, "--valkey", url, num_units=64):
        client = RadixClient(path, LAYOUT, PATIENT_S)
        for load in range(60):
            if load == 20:
                valkey.end()
            if load == 40:
                valkey.start()
            keys = LAYOUT.keys(range(load, load + 41))
            start = time.monotonic()
            assert store(client, keys) == read(client, keys) == 10
            client.prefetch(LAYOUT.keys(range(1000 + load, 1041 + load)))
            assert time.monotonic() - start < LONGEST_CALL_S
        assert stats(path)["store_errors"] > 0
        wait_until(lambda: _travels(client, valkey))
        wait_until(lambda: stats(path)["holders"] == 3)  # ours, and who asks: the sidecar itself is done
        assert leaks(path) == []
        client.close()


def _travels(client: RadixClient, valkey: Server) -> bool:
    keys = LAYOUT.keys(list(os.urandom(41)))
    store(client, keys)
    return valkey.run("EXISTS", PREFIX + keys[0]).startswith(b":1")
