"""The tier below an engine's prefix cache: the sidecar's memory, which other engines of this model share.

Nothing here fails or waits for long because of the sidecar: without one the cache is the pool alone.
"""

from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from specbackend.cache.kv_pool import KVPool
from specbackend.cache.radix_tree import UNDRAFTED, CachedPrefix
from specbackend.cache.slots import SlotManager
from specbackend.config import EngineConfig
from specbackend.radix.client import Lease, RadixClient
from specbackend.radix.keys import Layout, fingerprint

BLOCK_TOKENS = 16
BLOCK_VERSION = 1  # of the order of a block's bytes
MOST_UNWRITTEN_BYTES = 512 << 20  # copied for the sidecar and not there yet; what is more has to wait for its next use
STAGING_BYTES = 64 << 20
MOST_KNOWN_KEYS = 1 << 16


def kv_layout(config: EngineConfig, pools: Sequence[KVPool], successor_keys: bool) -> Layout:
    """What the sidecar must know of an engine's KV. pools: the target's, and the draft's if it has KV.

    Reads the checkpoints. The shape of trees leaves the KV as it is, and so does a draft without KV.
    """
    draft = config.speculative_algorithm if len(pools) > 1 else None
    paths = [config.model_path, config.speculative_draft_model_path if draft else None]
    facts = {
        "version": BLOCK_VERSION,
        "draft": draft,
        "quantization": config.quantization,
        "draft_quantization": config.speculative_draft_model_quantization if draft else None,
        "device": pools[0].device.type,
        "pools": [pool.layout() for pool in pools],
    }
    return Layout(
        fingerprint([Path(path) for path in paths if path], **facts),
        bytes_per_token=sum(pool.slot_bytes for pool in pools),
        block_tokens=BLOCK_TOKENS,
        successor=successor_keys,
        model_path=config.model_path,
    )


@dataclass(frozen=True)
class HostCopy:
    """Blocks that are out of the pool, or on their way: uint8 [num_blocks, block_bytes]."""

    blocks: np.ndarray
    arrival: torch.cuda.Event | None

    @classmethod
    def of(cls, block_NB: torch.Tensor) -> "HostCopy":
        if block_NB.device.type == "cpu":
            return cls(block_NB.numpy(), None)
        host_NB = torch.empty(block_NB.shape, dtype=block_NB.dtype, pin_memory=True)
        host_NB.copy_(block_NB, non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record()
        return cls(host_NB.numpy(), arrival)

    def wait(self, places: list[int]) -> np.ndarray:
        """Those at these places. For any thread."""
        if self.arrival:
            self.arrival.synchronize()
        return self.blocks[places]


class HostTier:
    """For the engine's thread."""

    def __init__(self, client: RadixClient, pools: Sequence[KVPool]):
        """The pools are those of the client's layout, and have their slots' numbers in common."""
        self._client, self._layout, self._pools = client, client.layout, pools
        self._device = pools[0].device
        self._staged_NB = torch.empty(
            (max(1, STAGING_BYTES // self._layout.block_bytes), self._layout.block_bytes),
            dtype=torch.uint8,
            pin_memory=self._device.type == "cuda",
        )
        self._known: OrderedDict[bytes, None] = OrderedDict()  # keys that the sidecar has, or had; the latest last
        self._unwritten: deque[tuple[Future, int]] = deque()  # writes, and of how many bytes

    def keep(self, prefix: CachedPrefix) -> None:
        """Store what the sidecar is not known to have. The slots may be used again as soon as this returns."""
        num_drafted = bisect_left(prefix.keys, UNDRAFTED, key=lambda key: key & UNDRAFTED)
        keys = self._layout.keys(prefix.keys[:num_drafted], prefix.salt)
        places = [place for place, key in enumerate(keys) if key not in self._known][: self._num_copyable()]
        if not places:
            return
        copy, fresh = HostCopy.of(self._blocks(prefix.slots, places)), [keys[place] for place in places]
        written = self._client.store(fresh, copy.wait)
        if written is not None:
            self._unwritten.append((written, copy.blocks.nbytes))
            self._remember(fresh)

    def bring(self, slots: SlotManager, token_ids: Sequence[int], salt: str | None) -> None:
        """Cache what the sidecar has of a text and the pool lacks, as far as there is room.

        It is asked about the whole text, so that it learns what is in use, and this side what has to be stored again.
        """
        keys = self._layout.keys(slots.keys(token_ids), salt)
        lease = self._client.lookup(keys) if keys else None
        num_found = lease.num_blocks if lease else 0
        self._remember(keys[:num_found])
        self._forget(keys[num_found:])
        if lease:
            poisoned = self._adopt(slots, lease, token_ids, salt)
            self._client.release(lease, poisoned)
            self._forget(keys[place] for place in poisoned)

    def prefetch(self, slots: SlotManager, token_ids: Sequence[int], salt: str | None) -> None:
        """What will be brought is fetched from further away in the meantime."""
        if keys := self._layout.keys(slots.keys(token_ids), salt):
            self._client.prefetch(keys)

    def close(self) -> None:
        """Wait until all is written."""
        for written, _ in self._unwritten:
            written.exception()
        self._client.close()

    def _adopt(self, slots: SlotManager, lease: Lease, token_ids: Sequence[int], salt: str | None) -> list[int]:
        """Returns the place of the first block that is poisoned, if there is one."""
        start = slots.cached_length(token_ids, salt) // BLOCK_TOKENS
        while start < lease.num_blocks:
            staged_NB = self._staged_NB[: lease.num_blocks - start]
            end = start + self._client.copy(lease, start, staged_NB.numpy())
            num_cached = slots.adopt(token_ids, end * BLOCK_TOKENS, partial(self._fill, staged_NB, start), salt)
            if end < start + len(staged_NB):
                return [end]
            if num_cached < end * BLOCK_TOKENS:  # there is no room
                break
            start = end
        return []

    def _fill(self, staged_NB: torch.Tensor, first_block: int, start: int, slots: list[int]) -> None:
        """Write the KV of the tokens from `start` on to these slots."""
        payload_TB = staged_NB.view(-1, self._layout.bytes_per_token)[start - first_block * BLOCK_TOKENS :]
        payload_TB = payload_TB[: len(slots)].to(self._device)
        slot_T = torch.tensor(slots, device=self._device)
        sizes = [pool.slot_bytes for pool in self._pools]
        for pool, part_TB in zip(self._pools, payload_TB.split(sizes, dim=1), strict=True):
            pool.write(slot_T, part_TB)

    def _blocks(self, slots: list[int], places: list[int]) -> torch.Tensor:
        """A copy of the blocks at these places, uint8 [N, block_bytes]."""
        num_whole = len(slots) // BLOCK_TOKENS * BLOCK_TOKENS
        slot_NT = np.array(slots[:num_whole]).reshape(-1, BLOCK_TOKENS)[places]
        slot_T = torch.from_numpy(slot_NT.ravel()).to(self._device)
        return torch.cat([pool.payload(slot_T) for pool in self._pools], dim=1).view(len(places), -1)

    def _num_copyable(self) -> int:
        """How many blocks there is memory for now."""
        while self._unwritten and self._unwritten[0][0].done():
            self._unwritten.popleft()
        return (MOST_UNWRITTEN_BYTES - sum(size for _, size in self._unwritten)) // self._layout.block_bytes

    def _remember(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._known[key] = None
            self._known.move_to_end(key)
        while len(self._known) > MOST_KNOWN_KEYS:
            self._known.popitem(last=False)

    def _forget(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._known.pop(key, None)
