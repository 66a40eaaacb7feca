"""Names of blocks: which KV they hold, for whom, and whether what is read is that."""

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgpack
import numpy as np
import xxhash

from specbackend.cache.radix_tree import prefix_keys

KEY_BYTES = 16
BYTES_PER_KEY = array("q").itemsize
READ_BYTES = 16 << 20
WEIGHTS = ("*.safetensors", "*.bin", "*.json")


@dataclass(frozen=True)
class Layout:
    """What the KV of one model is. Engines of equal layouts share blocks, others never see each other's."""

    fingerprint: bytes  # at most 64 bytes, of all that the KV's values and order depend on; see `fingerprint`
    bytes_per_token: int  # K and V of all of the target's layers, then the draft's
    block_tokens: int
    successor: bool  # the KV of a token depends on the one behind it, as a draft's does: see `prefix_keys`
    model_path: str = ""  # for people, and for who looks for its tokenizer

    @property
    def block_bytes(self) -> int:
        return self.block_tokens * self.bytes_per_token

    def keys(self, prefix_keys: Sequence[int], salt: str | None = None) -> list[bytes]:
        """A key for each whole block of a text, given as the radix tree knows it, an integer for each slot.

        Each is a hash of all of the text up to the block's end. `salt` is hashed in front: who does not know it can
        neither find these blocks nor learn whether they exist.
        """
        origin = msgpack.packb([salt, self.bytes_per_token, self.block_tokens, self.successor])
        key = _digest(origin, self.fingerprint)
        text = memoryview(array("q", prefix_keys).tobytes())
        size = self.block_tokens * BYTES_PER_KEY
        keys = []
        for start in range(0, len(text) - size + 1, size):
            key = _digest(text[start : start + size], key)
            keys.append(key)
        return keys

    def token_keys(self, token_ids: Sequence[int], salt: str | None = None) -> list[bytes]:
        """The same for a text given as tokens."""
        return self.keys(prefix_keys(token_ids, self.successor), salt)


def fingerprint(checkpoints: Sequence[Path], **facts: object) -> bytes:
    """Hash the checkpoints' files, which are best in the page cache, and facts that JSON can express.

    Facts are what else changes the KV: dtype, quantization, the algorithm, the order of the bytes.
    """
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=32)
    for folder in checkpoints:
        for path in sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)}):
            digest.update(path.name.encode() + _file_digest(path))
    return digest.digest()


def checksum(key: bytes, payload: bytes | np.ndarray) -> int:
    """Of a block and its name, so that a sound block in another's place shows, too."""
    return xxhash.xxh3_64_intdigest(payload, seed=int.from_bytes(key[:8], "little"))


def _digest(content: bytes | memoryview, key: bytes) -> bytes:
    return hashlib.blake2b(content, key=key, digest_size=KEY_BYTES).digest()


def _file_digest(path: Path) -> bytes:
    digest = xxhash.xxh3_128()  # not against forgers: who can write checkpoints need not forge
    with open(path, "rb") as file:
        while part := file.read(READ_BYTES):
            digest.update(part)
    return digest.digest()
