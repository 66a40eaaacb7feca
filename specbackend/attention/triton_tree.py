"""Attention by the project's own Triton kernel: no column is gathered, and no length read on the host."""

from dataclasses import dataclass, replace

import torch

from specbackend.batch import ForwardBatch
from specbackend.kernels.tree_attention import tree_attention


@dataclass
class TritonPlan:
    """Nothing is prepared: the kernel reads the batch as it is."""

    batch: ForwardBatch

    def set_window_mask(self, window_mask_BQW: torch.Tensor) -> None:
        self.batch = replace(self.batch, window_mask_BQW=window_mask_BQW)

    def run(self, q_BQHD: torch.Tensor, kv_S2GD: torch.Tensor) -> torch.Tensor:
        batch = self.batch
        out_BQHD = tree_attention(
            q_BQHD,
            kv_S2GD,
            batch.prefix_slot_BL,
            batch.prefix_len_B,
            batch.window_slot_BW,
            batch.window_mask_BQW,
        )
        return out_BQHD.flatten(2)


class TritonAttention:
    is_on_device = True

    def plan(self, batch: ForwardBatch, dtype: torch.dtype) -> TritonPlan:
        return TritonPlan(batch)
