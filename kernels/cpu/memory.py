"""Memory that a CPU reads fast."""

import mmap

import torch

HUGE_PAGE = 2 << 20
CHUNK = 64 << 20


class HugePages:
    """Tensors in huge pages, side by side; a chunk of them is returned when the last of its tensors goes.

    Reading weights through pages of 4 KB a core waits for addresses, and its prefetcher stops at the end of each. All
    are zeros: that is what the kernel gives, page by page when somebody writes, and nothing is given out twice.
    """

    def __init__(self):
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        padded = -(-size // 64) * 64  # the next one starts at a cache line
        if padded > len(self._chunk):
            self._chunk = _map(max(CHUNK, padded))
        taken, self._chunk = self._chunk.split((padded, len(self._chunk) - padded))
        return taken[:size].view(dtype).view(shape)


def _map(size: int) -> torch.Tensor:
    # private: shared memory has huge pages by another setting of the kernel, which is off nearly everywhere
    mapped = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    chunk = torch.frombuffer(mapped, dtype=torch.uint8)
    return chunk[-chunk.data_ptr() % HUGE_PAGE :][:size]


weights = HugePages()
