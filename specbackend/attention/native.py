"""Attention on a CPU by the project's own kernel, which reads keys and values where they are."""

import torch

from specbackend.attention.torch_sdpa import TorchPlan
from specbackend.batch import ForwardBatch
from specbackend.kernels.cpu.attention import Columns, attention

# Of a sequence; with more, as prompts have, torch's products of matrices are faster.
MOST_ROWS = {torch.float32: 256, torch.bfloat16: 64}


class NativePlan:
    def __init__(self, batch: ForwardBatch, row_T: torch.Tensor | None = None):
        """row_T: the rows are [1, T], these of the batch's."""
        columns = batch.prefix_slot_BL, batch.prefix_len_B, batch.window_slot_BW, batch.window_mask_BQW
        self.columns = Columns(*columns, row_T)

    def set_window_mask(self, window_mask_BQW: torch.Tensor) -> None:
        self.columns.set_mask(window_mask_BQW)

    def run(self, q_BQHD: torch.Tensor, kv_S2GD: torch.Tensor) -> torch.Tensor:
        return attention(q_BQHD, kv_S2GD, self.columns)


class NativeAttention:
    is_on_device = True

    def plan(self, batch: ForwardBatch, dtype: torch.dtype) -> NativePlan | TorchPlan:
        return NativePlan(batch) if batch.token_BQ.shape[1] <= MOST_ROWS[dtype] else TorchPlan(batch, dtype)
