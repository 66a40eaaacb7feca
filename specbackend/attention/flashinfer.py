"""FlashInfer's FA2 attention, for eager forwards on a CUDA device: planning waits for the device.

A slot is a page of one token, so that a layer of a KVPool is FlashInfer's paged cache as it lies. Sequence b has
C_b = prefix_len_B[b] + W columns, prefix then window. The mask is flat: for every sequence Q rows of C_b bits.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F

from specbackend.batch import ForwardBatch
from specbackend.errors import ConfigError

WORKSPACE_BYTES = 128 * 2**20  # FlashInfer's advice; partial results of long sequences lie there
DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128, 256)


class FlashInferPlan:
    """The page table and mask of a forward. FlashInfer's own plan waits for a layer's tensors: they tell its heads."""

    def __init__(self, wrapper, batch: ForwardBatch, dtype: torch.dtype):
        B, Q, W = batch.window_mask_BQW.shape
        device = batch.prefix_len_B.device
        in_prefix_BL = torch.arange(batch.prefix_slot_BL.shape[1], device=device) < batch.prefix_len_B[:, None]
        is_column_BC = F.pad(in_prefix_BL, (0, W), value=True)
        num_columns_B = batch.prefix_len_B + W
        self._wrapper, self._dtype, self._planned = wrapper, dtype, False
        self._slots = torch.cat([batch.prefix_slot_BL, batch.window_slot_BW], dim=1)[is_column_BC].int()
        self._first_slot = F.pad(num_columns_B.cumsum(0), (1, 0)).int()
        self._first_row = torch.arange(0, B * Q + 1, Q, device=device, dtype=torch.int32)
        self._window_bit_BQW = _window_bits(num_columns_B, Q, W)
        self._mask: torch.Tensor | None = None  # the window is causal, which needs no bits
        if not batch.window_is_causal:
            self.set_window_mask(batch.window_mask_BQW)

    def set_window_mask(self, window_mask_BQW: torch.Tensor) -> None:
        if self._mask is None:
            Q = window_mask_BQW.shape[1]
            self._mask = torch.ones(Q * len(self._slots), dtype=torch.bool, device=self._slots.device)
        self._mask[self._window_bit_BQW] = window_mask_BQW
        self._planned = False  # FlashInfer keeps a packed copy

    def run(self, q_BQHD: torch.Tensor, kv_S2GD: torch.Tensor) -> torch.Tensor:
        B, Q, H, D = q_BQHD.shape
        if not self._planned:
            self._plan(num_qo_heads=H, num_kv_heads=kv_S2GD.shape[2], head_dim_qk=D)
        out_THD = self._wrapper.run(q=q_BQHD.flatten(0, 1), paged_kv_cache=kv_S2GD[:, :, None])
        return out_THD.view(B, Q, H * D)

    def _plan(self, **heads: int) -> None:
        self._wrapper.plan(
            qo_indptr=self._first_row,
            paged_kv_indptr=self._first_slot,
            paged_kv_indices=self._slots,
            paged_kv_last_page_len=torch.ones_like(self._first_row[1:]),
            page_size=1,
            custom_mask=self._mask,
            causal=self._mask is None,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
            **heads,
        )
        self._planned = True


def _window_bits(num_columns_B: torch.Tensor, Q: int, W: int) -> torch.Tensor:
    """int64 [B, Q, W]: the window's places in the flat mask, which are the last W bits of each row."""
    num_columns_BQ = num_columns_B[:, None].expand(-1, Q)
    row_end_BQ = num_columns_BQ.flatten().cumsum(0).view(-1, Q)
    return row_end_BQ[:, :, None] + torch.arange(-W, 0, device=num_columns_B.device)


class FlashInferAttention:
    """Plans share the workspace and nothing else, so an older one stays good. Raises ConfigError without FlashInfer."""

    is_on_device = False

    def __init__(self, device: torch.device):
        try:
            from flashinfer import BatchPrefillWithPagedKVCacheWrapper
        except ImportError as error:
            raise ConfigError(
                f"attention_backend: flashinfer cannot be imported ({error}); pip install 'specbackend[flashinfer]'"
            ) from error
        self._wrapper_class = BatchPrefillWithPagedKVCacheWrapper
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def plan(self, batch: ForwardBatch, dtype: torch.dtype) -> FlashInferPlan:
        wrapper = self._wrapper_class(float_workspace_buffer=self._workspace, kv_layout="NHD", backend="fa2")
        return FlashInferPlan(wrapper, batch, dtype)


def flashinfer_attention(device: torch.device, dtype: torch.dtype, head_dims: Collection[int]) -> FlashInferAttention:
    """The backend for models with these head dimensions. Raises ConfigError for what FlashInfer does not compute."""
    if device.type != "cuda":
        raise ConfigError(f"attention_backend: flashinfer needs a CUDA device, not {device}")
    if dtype not in DTYPES:
        raise ConfigError(f"attention_backend: flashinfer computes in float16 or bfloat16, not in {dtype}")
    for head_dim in head_dims:
        if head_dim not in HEAD_DIMS:
            raise ConfigError(f"attention_backend: flashinfer takes heads of {HEAD_DIMS} dimensions, not {head_dim}")
    return FlashInferAttention(device)
