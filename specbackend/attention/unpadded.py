"""Forwards over the rows that are no padding: of prompts side by side a good part is."""

from collections.abc import Callable
from dataclasses import replace

import torch

from specbackend.attention.base import AttentionPlan
from specbackend.attention.native import NativePlan
from specbackend.batch import ForwardBatch

Network = Callable[[ForwardBatch, torch.Tensor | None, AttentionPlan], tuple[torch.Tensor, ...]]


class UnpaddedPlan:
    """Shows a network one sequence of rows, and attends from them where they stand in the batch."""

    def __init__(self, plan: AttentionPlan, batch: ForwardBatch):
        self._plan, self._row_T, self._shape_BQ = plan, batch.row_T, batch.token_BQ.shape

    def run(self, q_1THD: torch.Tensor, kv_S2GD: torch.Tensor) -> torch.Tensor:
        q_BQHD = spread(q_1THD[0], self._row_T, self._shape_BQ.numel()).view(*self._shape_BQ, *q_1THD.shape[2:])
        return self._plan.run(q_BQHD, kv_S2GD).flatten(0, 1)[self._row_T][None]


def run_unpadded(
    network: Network, batch: ForwardBatch, hidden_TD: torch.Tensor | None, plan: AttentionPlan
) -> tuple[torch.Tensor, ...]:
    """What `network` returns of a batch and the hidden states beside it, if any: B * Q rows each.

    If the batch knows its padding, the network does not see it, and its rows are zero.
    """
    if batch.row_T is None:
        return network(batch, hidden_TD, plan)
    token_1T, position_1T, slot_1T = (
        each.flatten()[batch.row_T][None] for each in (batch.token_BQ, batch.position_BQ, batch.slot_BQ)
    )
    rows = replace(batch, token_BQ=token_1T, position_BQ=position_1T, slot_BQ=slot_1T, row_T=None)
    fed_TD = hidden_TD if hidden_TD is None else hidden_TD[batch.row_T]
    outputs = network(rows, fed_TD, _plan_of_rows(plan, batch))
    return tuple(spread(output, batch.row_T, batch.token_BQ.numel()) for output in outputs)


def _plan_of_rows(plan: AttentionPlan, batch: ForwardBatch) -> AttentionPlan:
    return NativePlan(batch, batch.row_T) if isinstance(plan, NativePlan) else UnpaddedPlan(plan, batch)


def spread(x: torch.Tensor, row_T: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[num_rows, ...] with x's rows in their places and zeros elsewhere."""
    return x.new_zeros(num_rows, *x.shape[1:]).index_copy_(0, row_T, x)
