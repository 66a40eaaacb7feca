"""Products of a few rows on a GPU: by our kernel where it is quicker than the library, which is measured at load."""

import functools
import logging
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from specbackend.cuda_graphs import graph_timer
from specbackend.kernels.linear_small_m import Split, linear_small_m, make_split
from specbackend.models.linear import Linear

TUNED_ROWS = 16  # a tile of the kernel; up to as many, a row's bits do not depend on the others
CACHE_BYTES = 200e6  # weights take turns in the timing until they overflow any L2 cache
BLOCKS_E, NUM_SPLITS = (32, 64), (1, 2, 3, 4, 6, 8)
MOST_PROGRAMS = 2048  # more parts of a weight than that only add work
NUM_RUNS = 5

log = logging.getLogger(__name__)


class TunedLinear(Linear):
    def __init__(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None = None):
        super().__init__(weight_ED, bias_E)
        self._split = fastest_split(*weight_ED.shape, weight_ED.dtype, weight_ED.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x_TD = x.flatten(0, -2)
        if self._split is None or len(x_TD) > TUNED_ROWS:
            return super().__call__(x)
        return linear_small_m(x_TD, self._weight_ED, self.bias_E, split=self._split).view(*x.shape[:-1], -1)

    def plus_(self, residual_TE: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        if self._split is None or len(x_TD) > TUNED_ROWS:
            return super().plus_(residual_TE, x_TD)
        return linear_small_m(x_TD, self._weight_ED, self.bias_E, residual_TE, split=self._split)


@functools.cache
def fastest_split(E: int, D: int, dtype: torch.dtype, device: torch.device) -> Split | None:
    """How the kernel is quickest for a weight of this shape; None if the library is quicker still."""
    weight_bytes = E * D * dtype.itemsize
    weights = [torch.randn(E, D, dtype=dtype, device=device) for _ in range(1 + int(CACHE_BYTES / weight_bytes))]
    x_TD = torch.randn(TUNED_ROWS, D, dtype=dtype, device=device)
    best, best_seconds = None, _seconds(lambda weight_ED: F.linear(x_TD, weight_ED), weights)
    library_seconds = best_seconds
    for split in _candidates(E, D):
        seconds = _seconds(lambda weight_ED, split=split: linear_small_m(x_TD, weight_ED, split=split), weights)
        if seconds < best_seconds:
            best, best_seconds = split, seconds
    del weights
    torch.cuda.empty_cache()  # who comes next sizes its own memory by what is free
    log.info("%d x %d: %.1f us by the library, %.1f by %s", E, D, 1e6 * library_seconds, 1e6 * best_seconds, best)
    return best


def _candidates(E: int, D: int) -> Iterator[Split]:
    splits = {make_split(D, block_e, num_splits) for block_e in BLOCKS_E for num_splits in NUM_SPLITS}
    return (s for s in splits if s.num_splits == 1 or -(-E // s.block_e) * s.num_splits <= MOST_PROGRAMS)


def _seconds(product: Callable[[torch.Tensor], torch.Tensor], weights: list[torch.Tensor]) -> float:
    """Of one product, the best of some runs over all weights."""
    timed = graph_timer(lambda: [product(weight_ED) for weight_ED in weights])
    return min(timed() for _ in range(NUM_RUNS)) / len(weights)
