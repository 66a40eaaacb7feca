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

KEY_BYTES = 16
TOKEN = array("q").itemsize
READ_BYTES = 16 << 20
WEIGHTS = ("*.safetensors", "*.bin", "*.json")


@dataclass(frozen=True)
class Layout:
    """What the KV of one model is. Engines of equal layouts share blocks, others never see each other's."""

    fingerprint: bytes  # at most 64 bytes, of all that the KV's values and order depend on; see `fingerprint`
    bytes_per_token: int  # K and V of all of the target's layers, then the draft's
    block_tokens: int
    successor: bool  # the KV of a token depends on the one behind it: a draft model's
    model_path: str = ""  # for people, and for who looks for its tokenizer

    @property
    def block_bytes(self) -> int:
        return self.block_tokens * self.bytes_per_token

    def keys(self, token_ids: Sequence[int], salt: str = "") -> list[bytes]:
        """A key for each whole block of the tokens: a hash of all of the text up to the block's end.

        `salt` is hashed in front: who does not know it can neither find these blocks nor learn whether they exist.
        """
        origin = msgpack.packb([salt, self.bytes_per_token, self.block_tokens, self.successor])
        key = _digest(origin, self.fingerprint)
        tokens = memoryview(array("q", token_ids).tobytes())
        step, length = self.block_tokens * TOKEN, (self.block_tokens + self.successor) * TOKEN
        keys = []
        for start in range(0, len(tokens) - length + 1, step):
            key = _digest(tokens[start : start + length], key)
            keys.append(key)
        return keys


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
