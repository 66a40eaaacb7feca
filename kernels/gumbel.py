"""The noise that samples are drawn with: the same for the target's pick and for the drafts that foresee it.

R = rows, V = tokens.
"""

import torch
import triton
import triton.language as tl


def gumbel_noise_ref(seed_R: torch.Tensor, position_R: torch.Tensor, token_V: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise [R, V] float32, a pure function of (seed, position, token)."""
    bits_RV = _mix_ref(_mix_ref(_mix_ref(seed_R) + position_R)[:, None] + token_V) >> 41 & 0x7FFFFF
    return -torch.log(-torch.log((bits_RV + 0.5) * 2.0**-23))


def _mix_ref(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finalizer. Constants of 64 bits are written as the int64 of the same bits."""
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * (0x94D049BB133111EB - 2**64)
    return x ^ (x >> 31 & (1 << 33) - 1)


@triton.jit
def _mix(x):
    """splitmix64's finalizer on uint64. Source: Steele, Lea, Flood 2014."""
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def gumbel_noise(seed, position, token):
    """float32, for each of `token`; integers of 64 bits, but `token` of any number."""
    stream = _mix(_mix(seed.to(tl.uint64)) + position.to(tl.uint64))
    bits = _mix(stream + token.to(tl.uint64)) >> 41
    uniform = (bits.to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23: both ends stay strictly inside (0, 1)
    # The largest noise comes from uniforms next to 1, where the hardware's logarithm is all error. tl.log is not that
    # one: it compiles to libdevice's, as torch.log does.
    return -tl.log(-tl.log(uniform))
