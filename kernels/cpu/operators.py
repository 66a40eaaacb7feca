"""What stands between the matrix products of a layer, each in one pass over the rows."""

import functools
from ctypes import c_float, c_int, c_long, c_void_p

import torch

from specbackend.kernels import cpu

ARGTYPES = {
    "rms_norm": (*[c_void_p] * 3, *[c_long] * 3, c_float, c_int),
    "rope_kv_write": (*[c_void_p] * 4, *[c_long] * 4, c_int),
    "silu_mul": (*[c_void_p] * 2, *[c_long] * 2, c_int),
}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension. weight: [D], or [H, D] with x [..., H, D]; in x's dtype."""
    x, D = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    sizes = (x.numel() // D, D, weight.numel() // D)
    pointers = (x.data_ptr(), weight.data_ptr(), y.data_ptr())
    _function("rms_norm", x.dtype)(*pointers, *sizes, eps, torch.get_num_threads())
    return y


def rope_kv_write(
    qkv_TE: torch.Tensor, rope: torch.Tensor, slot_T: torch.Tensor, kv_S2GD: torch.Tensor, num_heads: int
) -> torch.Tensor:
    """Rotate queries in place and keys on the way to their slots; write values there. Returns q, a view [T, H, D].

    rope: complex64 [T, 1, D / 2], of adjacent pairs.
    """
    G, D = kv_S2GD.shape[2:]
    qkv_TE, rope, slot_T = qkv_TE.contiguous(), rope.contiguous(), slot_T.contiguous()
    pointers = (qkv_TE.data_ptr(), rope.data_ptr(), slot_T.data_ptr(), kv_S2GD.data_ptr())
    sizes = (len(qkv_TE), num_heads, G, D)
    _function("rope_kv_write", qkv_TE.dtype)(*pointers, *sizes, torch.get_num_threads())
    return qkv_TE[:, : num_heads * D].view(-1, num_heads, D)


def silu_mul(gate_up_TE: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up; gate is the first half of each row."""
    gate_up_TE, T, size = gate_up_TE.contiguous(), len(gate_up_TE), gate_up_TE.shape[1] // 2
    y = gate_up_TE.new_empty(T, size)
    pointers = (gate_up_TE.data_ptr(), y.data_ptr())
    _function("silu_mul", y.dtype)(*pointers, T, size, torch.get_num_threads())
    return y


@functools.cache
def _function(name: str, dtype: torch.dtype):
    return cpu.function(f"{name}_{cpu.NAMES[dtype]}", *ARGTYPES[name])
