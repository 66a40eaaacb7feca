"""Plain torch attention: gather the columns, add a mask. The reference for every kernel, and the CPU's backend."""

import torch
import torch.nn.functional as F

from specbackend.batch import ForwardBatch


class TorchPlan:
    """Column slots [B, L + W] and an additive mask [B, 1, Q, L + W], shared by all layers of a forward."""

    def __init__(self, batch: ForwardBatch, dtype: torch.dtype):
        B, Q, _ = batch.window_mask_BQW.shape
        L = batch.prefix_slot_BL.shape[1]
        in_prefix_BL = torch.arange(L, device=batch.prefix_len_B.device) < batch.prefix_len_B[:, None]
        mask_BQC = torch.cat([in_prefix_BL[:, None, :].expand(B, Q, L), batch.window_mask_BQW], dim=2)
        self._bias = _additive(mask_BQC, dtype)
        self._window_bias = self._bias[..., L:]
        self._slots = torch.cat([batch.prefix_slot_BL, batch.window_slot_BW], dim=1).flatten()

    def set_window_mask(self, window_mask_BQW: torch.Tensor) -> None:
        self._window_bias.copy_(_additive(window_mask_BQW, self._bias.dtype))

    def run(self, q_BQHD: torch.Tensor, kv_S2GD: torch.Tensor) -> torch.Tensor:
        B, Q, H, D = q_BQHD.shape
        kv = kv_S2GD.index_select(0, self._slots).view(B, -1, 2, kv_S2GD.shape[2], D)
        k_BGCD, v_BGCD = kv.permute(2, 0, 3, 1, 4).unbind()
        out_BHQD = F.scaled_dot_product_attention(
            q_BQHD.transpose(1, 2), k_BGCD, v_BGCD, attn_mask=self._bias, enable_gqa=True
        )
        return out_BHQD.transpose(1, 2).reshape(B, Q, H * D)


def _additive(mask_BQC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, 1, Q, C]: 0 where the mask lets a row look, -inf elsewhere."""
    return torch.where(mask_BQC, 0.0, float("-inf")).to(dtype)[:, None]


class TorchAttention:
    is_on_device = True

    def plan(self, batch: ForwardBatch, dtype: torch.dtype) -> TorchPlan:
        return TorchPlan(batch, dtype)
