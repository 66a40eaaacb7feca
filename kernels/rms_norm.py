"""RMSNorm.

T = rows, D = what is normalised: the hidden size, or that of a head when q and k have norms of their own (H heads).
"""

from functools import partial

import torch
import triton
import triton.language as tl

from specbackend.kernels.dependent_launch import launch_options, wait_for_previous


def rms_norm_ref(x_TD: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """In float32, and back to x's dtype before the weight, as Hugging Face does."""
    x = x_TD.float()
    inverse_rms = (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (x * inverse_rms).to(x_TD.dtype) * weight


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [T, H, D]
    weight_ptr,  # [H, D]
    y_ptr,  # [T, H, D] out
    stride_t,
    stride_h,
    eps,
    H,
    D,
    BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    wait_for_previous(DEPENDENT)
    x = tl.load(x_ptr + t * stride_t + h * stride_h + d, mask=d < D, other=0.0)
    weight = tl.load(weight_ptr + h * D + d, mask=d < D, other=0.0)
    x_float = x.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x_float * x_float) / D + eps)
    normalized = (x_float * inverse_rms).to(x.dtype)
    y = (normalized.to(tl.float32) * weight.to(tl.float32)).to(x.dtype)
    tl.store(y_ptr + (t * H + h) * D + d, y, mask=d < D)


def rms_norm(x_TD: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / rms(x) * weight, contiguous, in x's dtype.

    x_TD [T, D] with weight [D], or [T, H, D] with weight [H, D], one weight per head; only the last dimension must have
    unit stride.
    """
    x_THD = x_TD if x_TD.dim() == 3 else x_TD[:, None]
    T, H, D = x_THD.shape
    assert weight.numel() == H * D and weight.is_contiguous(), "one weight per head, or one for all rows"
    assert x_THD.stride(2) == 1 and x_TD.dtype == weight.dtype
    y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    _rms_norm_kernel[(T, H)](
        x_THD, weight, y_TD, x_THD.stride(0), x_THD.stride(1), eps, H, D, **_config(D), **launch_options(),
    )  # fmt: skip
    return y_TD


def _config(D: int) -> dict:
    block = triton.next_power_of_2(D)
    return {"BLOCK_D": block, "num_warps": min(max(block // 512, 1), 16)}


def example_inputs(T: int, D: int, H: int | None = None, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> dict:
    """With H heads, x is the first H of a row that holds as many more, as q and k are of qkv."""
    g = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(T, D, generator=g) if H is None else torch.randn(T, 2 * H, D, generator=g)
    weight = torch.randn(*x_TD.shape[1:-1], D, generator=g)
    x_TD, weight = x_TD.to(device, dtype), weight.to(device, dtype)
    return {"x_TD": x_TD[:, :H] if H else x_TD, "weight": weight[:H] if H else weight, "eps": 1e-5}


VARIANTS = [
    (rms_norm, partial(example_inputs, T=8, D=4096)),
    (rms_norm, partial(example_inputs, T=8, D=128, H=40)),
]
