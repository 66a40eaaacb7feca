"""A decoder layer in one call. For one row, nine calls from Python take longer than all between the products does."""

import functools
from ctypes import Structure, byref, c_float, c_int, c_long, c_void_p

import torch

from specbackend.kernels import cpu
from specbackend.kernels.cpu.attention import Columns


class Linear(Structure):
    """A product by a packed weight (see `linear.pack`) of E outputs and D inputs."""

    _fields_ = [(name, c_void_p) for name in ("weight", "scale", "bias")] + [(name, c_long) for name in ("D", "E")]


class Layer(Structure):
    """What all rows of a layer share. head_norm: [H + G, D] or null, as input_norm and scale and bias may be."""

    _fields_ = [
        *[(name, Linear) for name in ("qkv", "out", "gate_up", "down")],
        *[(name, c_void_p) for name in ("input_norm", "head_norm", "post_attention_norm")],
        ("eps", c_float),
        *[(name, c_long) for name in ("H", "G", "D")],
    ]


def decoder_layer(
    layer: Layer,
    columns: Columns,
    x_TD: torch.Tensor,
    residual_TD: torch.Tensor,
    rope: torch.Tensor,
    slot_T: torch.Tensor,
    kv_S2GD: torch.Tensor,
) -> torch.Tensor:
    """y = residual + attention(norm(x)), then y + MLP(norm(y)), in the residual's place, which x may be.

    The tensors that `layer` points to are the caller's to keep. Each step rounds as its own kernel does.
    """
    x_TD, y_TD, rope, slot_T = x_TD.contiguous(), residual_TD.contiguous(), rope.contiguous(), slot_T.contiguous()
    pointers = [tensor.data_ptr() for tensor in (x_TD, rope, slot_T, kv_S2GD, y_TD)]
    _function(x_TD.dtype)(byref(layer), byref(columns), *pointers, torch.get_num_threads())
    return y_TD


@functools.cache
def _function(dtype: torch.dtype):
    return cpu.function(f"decoder_layer_{cpu.NAMES[dtype]}", *[c_void_p] * 7, c_int)
