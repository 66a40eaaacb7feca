"""What every attention backend offers."""

from typing import Protocol

import torch

from specbackend.batch import ForwardBatch


class AttentionPlan(Protocol):
    """Everything about a forward that its layers share."""

    def run(self, q_BQHD: torch.Tensor, kv_S2GD: torch.Tensor) -> torch.Tensor:
        """Attend from Q rows to prefix and window.

        q_BQHD: [B, Q, H, D]. kv_S2GD: one layer of a KVPool, [S, 2, H_kv, D], the new rows already written.
        Returns [B, Q, H * D], scaled by 1/sqrt(D).
        """

    def set_window_mask(self, window_mask_BQW: torch.Tensor) -> None:
        """Show the rows other parts of the same window, for a further forward over the same prefix and window."""


class AttentionBackend(Protocol):
    is_on_device: bool  # plan() and run() read nothing on the host and bring nothing from it

    def plan(self, batch: ForwardBatch, dtype: torch.dtype) -> AttentionPlan: ...
