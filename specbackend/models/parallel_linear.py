"""Matrix products whose weight is spread over ranks. On one rank they are ordinary ones.

A product whose output is split needs no class: it is an ordinary one with fewer rows. What is small beside the layers,
as embeddings and a draft head's fc, every rank has whole: to put parts together would take a further collective.
"""

import torch
import torch.nn.functional as F

from specbackend.models.linear import Linear, linear
from specbackend.ranks import Ranks


class RowParallelLinear:
    """Each rank has some of the weight's columns and of x's, which makes the ranks' products terms of a sum."""

    def __init__(self, part: Linear, ranks: Ranks):
        self._part, self._ranks = part, ranks

    def plus_(self, residual_TE: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        """As Linear.plus_. Rank 0 brings residual and bias, so that all ranks go on with the same sum."""
        part_TE = self._part.plus_(residual_TE, x_TD) if self._ranks.rank == 0 else self._part(x_TD)
        return self._ranks.sum_(part_TE)


def row_parallel(weight_ED: torch.Tensor, bias_E: torch.Tensor | None, ranks: Ranks) -> Linear | RowParallelLinear:
    """weight_ED: this rank's columns. bias_E: the whole bias."""
    if ranks.size == 1:
        return linear(weight_ED, bias_E)
    return RowParallelLinear(linear(weight_ED, bias_E if ranks.rank == 0 else None), ranks)


class VocabularyParallelLinear:
    """An LM head of which each rank has an equal number of rows, the last one's filled up; all get all logits."""

    def __init__(self, weight_VD: torch.Tensor, ranks: Ranks):
        self.shape, self.dtype, self.device = weight_VD.shape, weight_VD.dtype, weight_VD.device
        self._ranks = ranks
        V = len(weight_VD)
        self._num_rows = -(-V // ranks.size)
        padded_VD = F.pad(weight_VD, (0, 0, 0, self._num_rows * ranks.size - V))
        self._part = linear(ranks.part(padded_VD, dim=0))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._ranks.gather(self._part(x))[..., : self.shape[0]].contiguous()

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """As Linear.rows; all ranks must ask for the same."""
        index = index - self._ranks.rank * self._num_rows
        is_mine = (index >= 0) & (index < self._num_rows)
        return self._ranks.sum_(self._part.rows(index.where(is_mine, 0)) * is_mine[:, None])


def vocabulary_parallel(weight_VD: torch.Tensor, ranks: Ranks) -> Linear | VocabularyParallelLinear:
    """weight_VD: the whole of it."""
    return linear(weight_VD) if ranks.size == 1 else VocabularyParallelLinear(weight_VD, ranks)
