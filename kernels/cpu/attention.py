"""Attention from a few rows of each sequence to its paged prefix and a window of new rows."""

import functools
from ctypes import Structure, byref, c_int, c_long, c_void_p

import torch

from specbackend.kernels import cpu

WIDTH = 16  # head_dim is a multiple of it


class Columns(Structure):
    """What the rows of a forward attend to, as the kernels read it: pointers to tensors, which it keeps."""

    _fields_ = [(name, c_void_p) for name in ("_prefix", "_prefix_len", "_window", "_mask", "_first")] + [
        (name, c_long) for name in ("B", "Q", "L", "W")
    ]

    def __init__(
        self,
        prefix_slot_BL: torch.Tensor,
        prefix_len_B: torch.Tensor,
        window_slot_BW: torch.Tensor,
        window_mask_BQW: torch.Tensor,
        row_T: torch.Tensor | None = None,
    ):
        """All as in ForwardBatch. row_T: the forward has these rows, side by side; None: all B * Q."""
        self._kept = [tensor.contiguous() for tensor in (prefix_slot_BL, prefix_len_B, window_slot_BW)]
        B, Q, W = window_mask_BQW.shape
        super().__init__(*[tensor.data_ptr() for tensor in self._kept], 0, 0, B, Q, prefix_slot_BL.shape[1], W)
        self.set_mask(window_mask_BQW)
        if row_T is not None:
            self._kept_first = torch.searchsorted(row_T, torch.arange(B + 1) * Q)
            self._first = self._kept_first.data_ptr()

    def set_mask(self, window_mask_BQW: torch.Tensor) -> None:
        self._kept_mask = window_mask_BQW.contiguous()
        self._mask = self._kept_mask.data_ptr()


def attention(q_BQHD: torch.Tensor, kv_S2GD: torch.Tensor, columns: Columns) -> torch.Tensor:
    """[B, Q, H * D], scaled by 1/sqrt(D). All contiguous but for the rows of q.

    Of rows that stand side by side, B is 1 and Q their number.
    """
    B, Q, H, D = q_BQHD.shape
    q_THD = q_BQHD.flatten(0, 1)  # its rows' stride is not stride(1) if Q is 1
    y_BQE = q_BQHD.new_empty(B, Q, H * D)
    pointers = (q_THD.data_ptr(), kv_S2GD.data_ptr(), byref(columns), y_BQE.data_ptr())
    sizes = (H, kv_S2GD.shape[2], D, q_THD.stride(0))
    _function(q_BQHD.dtype)(*pointers, *sizes, torch.get_num_threads())
    return y_BQE


@functools.cache
def _function(dtype: torch.dtype):
    return cpu.function(f"attention_{cpu.NAMES[dtype]}", *[c_void_p] * 4, *[c_long] * 4, c_int)
