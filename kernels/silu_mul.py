"""The gate of a gated MLP: silu(gate) * up, both from one projection.

T = rows, I = inner size of the MLP, E = 2 * I.
"""

from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra import libdevice

from specbackend.kernels.dependent_launch import launch_options, wait_for_previous

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def silu_mul_ref(gate_up_TE: torch.Tensor) -> torch.Tensor:
    gate_TI, up_TI = gate_up_TE.chunk(2, dim=-1)
    return F.silu(gate_TI).mul_(up_TI)


@triton.jit
def _exp(x):
    """As torch computes it on a GPU; tl.exp is the hardware's approximation."""
    if INTERPRETED:  # then there is no libdevice, and tl.exp is numpy's
        return tl.exp(x)
    else:
        return libdevice.exp(x)


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr,  # [T, 2 * inner]
    out_ptr,  # [T, inner] out
    stride_t,
    inner,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_ptr = gate_up_ptr + t * stride_t
    wait_for_previous(DEPENDENT)
    gate = tl.load(row_ptr + i, mask=i < inner, other=0.0)
    up = tl.load(row_ptr + inner + i, mask=i < inner, other=0.0)
    # as torch rounds: an IEEE division, and to the dtype before the product
    silu = tl.div_rn(gate.to(tl.float32), 1.0 + _exp(-gate.to(tl.float32))).to(gate.dtype)
    tl.store(out_ptr + t * inner + i, (silu.to(tl.float32) * up.to(tl.float32)).to(up.dtype), mask=i < inner)


def silu_mul(gate_up_TE: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up [T, I], contiguous. gate_up_TE [T, 2 * I] holds gate, then up; its rows may be strided."""
    T, E = gate_up_TE.shape
    assert E % 2 == 0 and gate_up_TE.stride(1) == 1
    out_TI = torch.empty((T, E // 2), dtype=gate_up_TE.dtype, device=gate_up_TE.device)
    BLOCK = 1024
    _silu_mul_kernel[(T, triton.cdiv(E // 2, BLOCK))](
        gate_up_TE, out_TI, gate_up_TE.stride(0), E // 2, BLOCK=BLOCK, **launch_options()
    )
    return out_TI


def example_inputs(T: int, inner: int, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {"gate_up_TE": (2 * torch.randn(T, 2 * inner, generator=g)).to(device, dtype)}


VARIANTS = [(silu_mul, partial(example_inputs, T=8, inner=14336))]
