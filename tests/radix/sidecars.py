"""Real sidecars, and blocks whose bytes follow from their keys."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import radix_stress

from specbackend.radix.arena import UNIT_BYTES
from specbackend.radix.client import RadixClient, ask
from specbackend.radix.keys import Layout
from specbackend.radix.protocol import Audit, GetStats
from specbackend.radix.server import is_served

PATIENT_S = 30.0  # for calls that have to succeed on a machine that is busy
LAYOUT = Layout(b"model one", bytes_per_token=UNIT_BYTES // 4 + 1, block_tokens=4, successor=True, model_path="one")


def payload(key: bytes, num_bytes: int = LAYOUT.block_bytes) -> np.ndarray:
    """The bytes that belong under a key."""
    return radix_stress.payload(key, num_bytes)


def store(client: RadixClient, keys: Sequence[bytes]) -> int:
    size = client.layout.block_bytes
    return client.store(keys, lambda places: np.stack([payload(keys[place], size) for place in places])).result()


def read(client: RadixClient, keys: Sequence[bytes]) -> int:
    """How many blocks there are; fails the test if one is not what it should be."""
    lease = client.lookup(keys)
    if lease is None:
        return 0
    out = np.zeros((lease.num_blocks, client.layout.block_bytes), np.uint8)
    count = client.read(lease, out)
    for key, row in zip(keys[:count], out, strict=False):
        assert np.array_equal(row, payload(key, client.layout.block_bytes)), f"block {key.hex()}"
    return count


def stats(path: Path) -> dict:
    return ask(path, GetStats(), PATIENT_S)


def leaks(path: Path) -> list[str]:
    return ask(path, Audit(), PATIENT_S)["leaks"]


def wait_until(condition, timeout_s: float = PATIENT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@contextmanager
def running(path: Path, *options: str, num_units: int = 32) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "specbackend.radix.server", "--socket", path]
    process = subprocess.Popen([*command, "--size", str(num_units * UNIT_BYTES), *options])
    try:
        wait_until(lambda: is_served(path))
        yield process
    finally:
        process.terminate()
        process.wait(PATIENT_S)


@contextmanager
def stopped(process: subprocess.Popen) -> Iterator[None]:
    """It hangs. What the signal needs to arrive is waited for: until then it would answer."""
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@contextmanager
def killed(process: subprocess.Popen) -> Iterator[None]:
    process.kill()
    process.wait()
    yield
