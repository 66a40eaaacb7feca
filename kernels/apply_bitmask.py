"""Forbid the tokens that a grammar does not allow.

R = rows, V = vocabulary; a mask holds 32 tokens in a word, the first in its lowest bit.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from specbackend.kernels.dependent_launch import launch_options, wait_for_previous


def apply_bitmask_ref_(logits_RV: torch.Tensor, bits_RW: torch.Tensor) -> torch.Tensor:
    allowed = bits_RW[:, :, None] >> torch.arange(32, dtype=torch.int32, device=bits_RW.device) & 1
    return logits_RV.masked_fill_(allowed.flatten(1)[:, : logits_RV.shape[1]] == 0, -torch.inf)


@triton.jit
def _apply_bitmask_kernel(
    logits_ptr,  # [R, V] in and out
    bits_ptr,  # [R, W]
    logits_stride,
    bits_stride,
    V,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(DEPENDENT)
    word = tl.load(bits_ptr + r * bits_stride + v // 32, mask=v < V, other=0)
    forbidden = (word >> (v % 32) & 1) == 0
    tl.store(logits_ptr + r * logits_stride + v, float("-inf"), mask=(v < V) & forbidden)


def apply_bitmask_(logits_RV: torch.Tensor, bits_RW: torch.Tensor) -> torch.Tensor:
    """Set logits to -inf, in place, where the token's bit is 0; return them.

    bits_RW: int32 [R, at least V / 32], as llguidance and xgrammar write them. Rows of both may be strided.
    """
    (R, V), (_, W) = logits_RV.shape, bits_RW.shape
    assert bits_RW.shape[0] == R and 32 * W >= V and bits_RW.dtype == torch.int32
    assert logits_RV.stride(1) == bits_RW.stride(1) == 1
    BLOCK = 1024
    _apply_bitmask_kernel[(R, triton.cdiv(V, BLOCK))](
        logits_RV, bits_RW, logits_RV.stride(0), bits_RW.stride(0), V, BLOCK=BLOCK, **launch_options(),
    )  # fmt: skip
    return logits_RV


def example_inputs(R: int, V: int, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {
        "logits_RV": torch.randn(R, V, generator=g).to(device, dtype),
        "bits_RW": torch.randint(-(2**31), 2**31, (R, (V + 31) // 32), generator=g).to(device, torch.int32),
    }


VARIANTS = [(apply_bitmask_, partial(example_inputs, R=8, V=128256))]
