"""x @ weight.T for few rows at the speed at which the weight can be read, and for many about as fast as oneDNN.

A row of the result is the same to the bit whatever rows it is computed with.
"""

import functools
from ctypes import c_int, c_long, c_void_p

import torch
import torch.nn.functional as F
from torch import library

from specbackend.kernels import cpu
from specbackend.kernels.cpu import memory

WIDTH = 16  # outputs of a panel


def pack(weight_ED: torch.Tensor) -> torch.Tensor:
    """The weight as the kernel wants it, D even: [E / 16, D / 2, 2, 16], in bfloat16 [E / 16, D / 2, 16, 2]."""
    E, D = weight_ED.shape
    padded_ED = F.pad(weight_ED, (0, 0, 0, -E % WIDTH))
    panels = padded_ED.view(-1, WIDTH, D // 2, 2).permute(_order(weight_ED.dtype))
    return memory.weights.zeros(panels.shape, panels.dtype).copy_(panels)


def unpack(packed: torch.Tensor, num_outputs: int) -> torch.Tensor:
    """The inverse of `pack`: [E, D]."""
    panels = packed.permute(0, 3, 1, 2) if packed.dtype != torch.bfloat16 else packed.permute(0, 2, 1, 3)
    return panels.flatten(2).flatten(0, 1)[:num_outputs]


def linear(
    x_TD: torch.Tensor,
    packed: torch.Tensor,
    num_outputs: int,
    bias_E: torch.Tensor | None = None,
    residual_TE: torch.Tensor | None = None,
    scale_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + x @ weight.T * scale + bias, rounded once. packed: see `pack`.

    The weight is in x's dtype or in int8, the residual in x's, bias and scale in float32.
    """
    T, D = x_TD.shape
    x_TD, y_TE = x_TD.contiguous(), x_TD.new_empty(T, num_outputs)
    tensors = (x_TD, packed, scale_E, bias_E, cpu.contiguous(residual_TE), y_TE)
    if T:
        _function(x_TD.dtype, packed.dtype)(*map(cpu.pointer, tensors), T, D, num_outputs, torch.get_num_threads())
    return y_TE


# As torch.compile takes it. Every call of it costs more than one of the function itself.
linear_in_graph = library.custom_op("specbackend::cpu_linear", linear, mutates_args=())


@linear_in_graph.register_fake
def _(x_TD, packed, num_outputs, bias_E=None, residual_TE=None, scale_E=None):
    return x_TD.new_empty(x_TD.shape[0], num_outputs)  # len() would make a constant of it


@functools.cache
def _function(dtype: torch.dtype, weight_dtype: torch.dtype):
    weight = "int8" if weight_dtype == torch.int8 else cpu.NAMES[weight_dtype]
    return cpu.function(f"linear_{cpu.NAMES[dtype]}_{weight}", *[c_void_p] * 6, *[c_long] * 3, c_int)


def _order(dtype: torch.dtype) -> tuple[int, ...]:
    return (0, 2, 1, 3) if dtype == torch.bfloat16 else (0, 2, 3, 1)
