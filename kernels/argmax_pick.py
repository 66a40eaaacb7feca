"""The target's pick in each row: the best token, or a sample, which is the best one after adding Gumbel noise.

R = rows, V = vocabulary.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from specbackend.kernels.rank_key import key_index, rank_key, tile_width


def argmax_pick_ref(
    logits_RV: torch.Tensor, temperature_R: torch.Tensor, seed_R: torch.Tensor, position_R: torch.Tensor
) -> torch.Tensor:
    logits_RV, greedy_R1 = logits_RV.float(), (temperature_R == 0)[:, None]
    below_best_RV = logits_RV - logits_RV.amax(dim=1, keepdim=True)
    sampled_RV = below_best_RV / temperature_R[:, None] + gumbel_noise_ref(seed_R, position_R, logits_RV.shape[1])
    return logits_RV.where(greedy_R1, sampled_RV).argmax(dim=1)


def gumbel_noise_ref(seed_R: torch.Tensor, position_R: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise [R, V] float32, a pure function of (seed, position, token)."""
    token_V = torch.arange(vocab_size, device=seed_R.device)
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
def _gumbel_noise(seed, position, token):
    stream = _mix(_mix(seed.to(tl.uint64)) + position.to(tl.uint64))
    bits = _mix(stream + token.to(tl.uint64)) >> 41
    uniform = (bits.to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23: both ends stay strictly inside (0, 1)
    # The largest noise comes from uniforms next to 1, where the hardware's logarithm is all error. tl.log is not that
    # one: it compiles to libdevice's, as torch.log does.
    return -tl.log(-tl.log(uniform))


@triton.jit
def _tile_max_kernel(
    logits_ptr,  # [R, V]
    largest_ptr,  # [R, TILES] out
    row_stride,
    V,
    BLOCK: tl.constexpr,
):
    r, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = tile * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + r * row_stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
    tl.store(largest_ptr + r * tl.num_programs(1) + tile, tl.max(logits))


@triton.jit
def _tile_pick_kernel(
    logits_ptr,  # [R, V]
    temperature_ptr,  # [R]
    seed_ptr,  # [R]
    position_ptr,  # [R]
    largest_ptr,  # [R, TILES]
    key_ptr,  # [R, TILES] out: the rank_key of the tile's pick
    row_stride,
    V,
    BLOCK: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    r, tile, TILES = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    v = tile * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits_ptr + r * row_stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperature_ptr + r)
    if temperature > 0:
        t = tl.arange(0, BLOCK_TILES)
        best = tl.max(tl.load(largest_ptr + r * TILES + t, mask=t < TILES, other=float("-inf")))
        noise = _gumbel_noise(tl.load(seed_ptr + r), tl.load(position_ptr + r), v)
        value = tl.div_rn(value - best, temperature) + noise
    tl.store(key_ptr + r * TILES + tile, tl.max(rank_key(value, v)))


@triton.jit
def _row_pick_kernel(
    key_ptr,  # [R, TILES]
    token_ptr,  # [R] out
    TILES,
    BLOCK_TILES: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK_TILES)
    tl.store(token_ptr + r, key_index(tl.max(tl.load(key_ptr + r * TILES + t, mask=t < TILES, other=0))))


def argmax_pick(
    logits_RV: torch.Tensor, temperature_R: torch.Tensor, seed_R: torch.Tensor, position_R: torch.Tensor
) -> torch.Tensor:
    """Return the token picked in each row, int64 [R].

    At temperature 0 the first of the largest logits; above, argmax((logits - largest) / temperature + noise), where the
    noise is a function of (seed, position, token) alone, so a row's pick does not depend on the other rows.

    logits_RV: bfloat16, float16 or float32, -inf allowed; rows may be strided. temperature_R: float32. seed_R and
    position_R: int64.
    """
    R, V = logits_RV.shape
    assert temperature_R.shape == seed_R.shape == position_R.shape == (R,) and logits_RV.stride(1) == 1
    assert temperature_R.dtype == torch.float32 and seed_R.dtype == position_R.dtype == torch.int64
    assert temperature_R.is_contiguous() and seed_R.is_contiguous() and position_R.is_contiguous()
    BLOCK, device = tile_width(V), logits_RV.device
    TILES = triton.cdiv(V, BLOCK)
    BLOCK_TILES = triton.next_power_of_2(TILES)
    largest = torch.empty((R, TILES), dtype=torch.float32, device=device)
    _tile_max_kernel[(R, TILES)](logits_RV, largest, logits_RV.stride(0), V, BLOCK=BLOCK)
    key = torch.empty((R, TILES), dtype=torch.uint64, device=device)
    _tile_pick_kernel[(R, TILES)](
        logits_RV, temperature_R, seed_R, position_R, largest, key, logits_RV.stride(0), V,
        BLOCK=BLOCK, BLOCK_TILES=BLOCK_TILES,
    )  # fmt: skip
    token_R = torch.empty(R, dtype=torch.int64, device=device)
    _row_pick_kernel[(R,)](key, token_R, TILES, BLOCK_TILES=BLOCK_TILES)
    return token_R


def example_inputs(R: int, V: int, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> dict:
    """Every third row is greedy."""
    g = torch.Generator().manual_seed(seed)
    temperature_R = (0.2 + torch.rand(R, generator=g)).masked_fill(torch.arange(R) % 3 == 2, 0.0)
    return {
        "logits_RV": (3 * torch.randn(R, V, generator=g)).to(device, dtype),
        "temperature_R": temperature_R.to(device),
        "seed_R": torch.randint(-(2**63), 2**63 - 1, (R,), generator=g).to(device),
        "position_R": torch.randint(0, 2**17, (R,), generator=g).to(device),
    }


VARIANTS = [(argmax_pick, partial(example_inputs, R=8, V=128256))]
