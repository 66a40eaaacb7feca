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
        self._split = fastest_split(*self.shape, self.dtype, self.dtype, self.device)

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
def fastest_split(E: int, D: int, dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device) -> Split | None:
    """How the kernel is quickest for a weight of this shape and few rows of `dtype`.

    None if the library is quicker still. It is not asked about weights of another dtype.
    """
    weight_bytes = E * D * weight_dtype.itemsize
    weights = [
        torch.randn(E, D, dtype=dtype, device=device).to(weight_dtype)
        for _ in range(1 + int(CACHE_BYTES / weight_bytes))
    ]
    x_TD = torch.randn(TUNED_ROWS, D, dtype=dtype, device=device)
    scale_E = None if weight_dtype == dtype else torch.ones(E, device=device)

    def kernel(split: Split) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda weight_ED: linear_small_m(x_TD, weight_ED, scale_E=scale_E, split=split)

    seconds = {split: _seconds(kernel(split), weights) for split in _candidates(E, D)}
    if weight_dtype == dtype:
        seconds[None] = _seconds(lambda weight_ED: F.linear(x_TD, weight_ED), weights)
    del weights
    torch.cuda.empty_cache()  # who comes next sizes its own memory by what is free
    best = min(seconds, key=seconds.get)
    others = f"{1e6 * seconds[None]:.1f} by the library" if None in seconds else "the library is not asked"
    log.info("%d x %d of %s: %.1f us by %s, %s", E, D, weight_dtype, 1e6 * seconds[best], best, others)
    return best


def _candidates(E: int, D: int) -> Iterator[Split]:
    splits = {make_split(D, block_e, num_splits) for block_e in BLOCKS_E for num_splits in NUM_SPLITS}
    return (s for s in splits if s.num_splits == 1 or -(-E // s.block_e) * s.num_splits <= MOST_PROGRAMS)


def _seconds(product: Callable[[torch.Tensor], torch.Tensor], weights: list[torch.Tensor]) -> float:
    """Of one product, the best of some runs over all weights."""
    timed = graph_timer(lambda: [product(weight_ED) for weight_ED in weights])
    return min(timed() for _ in range(NUM_RUNS)) / len(weights)
