"""Attention from a few rows of each sequence to its paged prefix and a window of new rows."""

import functools
from ctypes import c_int, c_long, c_void_p

import torch

from specbackend.kernels import cpu

WIDTH = 16  # head_dim is a multiple of it


def attention(
    q_BQHD: torch.Tensor,
    kv_S2GD: torch.Tensor,
    prefix_slot_BL: torch.Tensor,
    prefix_len_B: torch.Tensor,
    window_slot_BW: torch.Tensor,
    window_mask_BQW: torch.Tensor,
) -> torch.Tensor:
    """[B, Q, H * D], scaled by 1/sqrt(D). All as in ForwardBatch, contiguous but for the rows of q."""
    B, Q, H, D = q_BQHD.shape
    L, W, G = prefix_slot_BL.shape[1], window_slot_BW.shape[1], kv_S2GD.shape[2]
    q_THD = q_BQHD.flatten(0, 1)  # its rows' stride is not stride(1) if Q is 1
    y_BQE = q_BQHD.new_empty(B, Q, H * D)
    inputs = (q_THD, kv_S2GD, prefix_slot_BL, prefix_len_B, window_slot_BW, window_mask_BQW)
    pointers = [tensor.data_ptr() for tensor in (*inputs, y_BQE)]
    _function(q_BQHD.dtype)(*pointers, B, Q, H, G, D, L, W, q_THD.stride(0), torch.get_num_threads())
    return y_BQE


@functools.cache
def _function(dtype: torch.dtype):
    return cpu.function(f"attention_{cpu.NAMES[dtype]}", *[c_void_p] * 7, *[c_long] * 8, c_int)
