"""Forwards over the rows that are no padding: of prompts side by side a good part is."""

from collections.abc import Callable
from dataclasses import replace

import torch

from specbackend.attention.base import AttentionPlan
from specbackend.batch import ForwardBatch


class UnpaddedPlan:
    """Shows a network one sequence of rows, and attends from them where they stand in the batch."""

    def __init__(self, plan: AttentionPlan, batch: ForwardBatch):
        self._plan, self._row_T, self._shape_BQ = plan, batch.row_T, batch.token_BQ.shape

    def run(self, q_1THD: torch.Tensor, kv_S2GD: torch.Tensor) -> torch.Tensor:
        q_BQHD = spread(q_1THD[0], self._row_T, self._shape_BQ.numel()).view(*self._shape_BQ, *q_1THD.shape[2:])
        return self._plan.run(q_BQHD, kv_S2GD).flatten(0, 1)[self._row_T][None]


def run_unpadded(
    forward: Callable[[ForwardBatch, AttentionPlan], tuple[torch.Tensor, ...]], batch: ForwardBatch, plan: AttentionPlan
) -> tuple[torch.Tensor, ...]:
    """What `forward` returns of a batch, B * Q rows each; the rows of padding are zero."""
    of_rows = {
        name: getattr(batch, name).flatten()[batch.row_T][None] for name in ("token_BQ", "position_BQ", "slot_BQ")
    }
    outputs = forward(replace(batch, **of_rows, row_T=None), UnpaddedPlan(plan, batch))
    return tuple(spread(output, batch.row_T, batch.token_BQ.numel()) for output in outputs)


def spread(x: torch.Tensor, row_T: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[num_rows, ...] with x's rows in their places and zeros elsewhere."""
    return x.new_zeros(num_rows, *x.shape[1:]).index_copy_(0, row_T, x)
