"""Blocks in a file, so that a restarted sidecar is warm."""

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import BinaryIO

import msgpack
import numpy as np

from specbackend.radix.cache import BlockCache
from specbackend.radix.keys import KEY_BYTES, Layout, checksum

RECORD = struct.Struct(f"<{KEY_BYTES}sQQ")  # key, checksum and length of the payload, which follows
LAYOUTS = bytes(KEY_BYTES)  # the key of the first record
LONGEST_PAYLOAD = 1 << 30


def save(path: Path, cache: BlockCache, layouts: Iterable[Layout]) -> int:
    """Write all published blocks, the longest unused first; returns their number. Replaces `path` when it is done.

    For one thread at a time.
    """
    fresh = path.with_name(f"{path.name}.new")
    with cache.index.holding() as holder, open(fresh, "wb", opener=_open_private) as file:
        blocks = cache.index.lease_all(holder).blocks
        _write(file, LAYOUTS, msgpack.packb([astuple(layout) for layout in layouts]))
        for block in blocks:
            if (payload := cache.read(block)) is not None:
                _write(file, block.key, payload)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    return len(blocks)


def restore(path: Path, cache: BlockCache) -> list[Layout]:
    """Publish what is sound in a snapshot and return its layouts. Raises OSError if there is none."""
    layouts: list[Layout] = []
    with cache.index.holding() as holder, open(path, "rb") as file:
        for key, payload in _sound_records(file):
            if key == LAYOUTS:
                layouts = [Layout(*values) for values in msgpack.unpackb(payload)]
            else:
                cache.publish(holder, key, np.frombuffer(payload, np.uint8))
    return layouts


def _open_private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)


def _write(file: BinaryIO, key: bytes, payload: bytes | np.ndarray) -> None:
    file.write(RECORD.pack(key, checksum(key, payload), len(payload)))
    file.write(payload)


def _sound_records(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Keys and payloads. A flipped bit costs its block; in a length, also what follows."""
    while len(header := file.read(RECORD.size)) == RECORD.size:
        key, expected, length = RECORD.unpack(header)
        if length > LONGEST_PAYLOAD:
            return
        payload = file.read(length)
        if len(payload) == length and checksum(key, payload) == expected:
            yield key, payload
