"""The target's pick in each row: the best token, or a sample, which is the best one after adding Gumbel noise.

B = requests, R = rows, R / B of each request, V = vocabulary.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from specbackend.kernels.dependent_launch import launch_options, wait_for_previous
from specbackend.kernels.gumbel import gumbel_noise, gumbel_noise_ref
from specbackend.kernels.rank_key import key_index, rank_key, tile_width


def argmax_pick_ref(
    logits_RV: torch.Tensor, temperature_B: torch.Tensor, seed_B: torch.Tensor, position_R: torch.Tensor
) -> torch.Tensor:
    temperature_R, seed_R = (each.repeat_interleave(len(logits_RV) // len(each)) for each in (temperature_B, seed_B))
    logits_RV, greedy_R1 = logits_RV.float(), (temperature_R == 0)[:, None]
    below_best_RV = logits_RV - logits_RV.amax(dim=1, keepdim=True)
    noise_RV = gumbel_noise_ref(seed_R, position_R, torch.arange(logits_RV.shape[1], device=seed_B.device))
    sampled_RV = below_best_RV / temperature_R[:, None] + noise_RV
    return logits_RV.where(greedy_R1, sampled_RV).argmax(dim=1)


@triton.jit
def _tile_max_kernel(
    logits_ptr,  # [R, V]
    largest_ptr,  # [R, TILES] out
    row_stride,
    V,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    r, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = tile * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(DEPENDENT)
    logits = tl.load(logits_ptr + r * row_stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
    tl.store(largest_ptr + r * tl.num_programs(1) + tile, tl.max(logits))


@triton.jit
def _tile_pick_kernel(
    logits_ptr,  # [R, V]
    temperature_ptr,  # [B]
    seed_ptr,  # [B]
    position_ptr,  # [R]
    largest_ptr,  # [R, TILES]
    key_ptr,  # [R, TILES] out: the rank_key of the tile's pick
    row_stride,
    V,
    N,
    BLOCK: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    r, tile, TILES = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    v = tile * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(DEPENDENT)
    value = tl.load(logits_ptr + r * row_stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperature_ptr + r // N)
    if temperature > 0:
        t = tl.arange(0, BLOCK_TILES)
        best = tl.max(tl.load(largest_ptr + r * TILES + t, mask=t < TILES, other=float("-inf")))
        noise = gumbel_noise(tl.load(seed_ptr + r // N), tl.load(position_ptr + r), v)
        value = tl.div_rn(value - best, temperature) + noise
    tl.store(key_ptr + r * TILES + tile, tl.max(rank_key(value, v)))


@triton.jit
def _row_pick_kernel(
    key_ptr,  # [R, TILES]
    token_ptr,  # [R] out
    TILES,
    BLOCK_TILES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK_TILES)
    wait_for_previous(DEPENDENT)
    tl.store(token_ptr + r, key_index(tl.max(tl.load(key_ptr + r * TILES + t, mask=t < TILES, other=0))))


def argmax_pick(
    logits_RV: torch.Tensor, temperature_B: torch.Tensor, seed_B: torch.Tensor, position_R: torch.Tensor
) -> torch.Tensor:
    """Return the token picked in each row, int64 [R].

    At temperature 0 the first of the largest logits; above, argmax((logits - largest) / temperature + noise), where the
    noise is a function of (seed, position, token) alone, so a row's pick does not depend on the other rows.

    logits_RV: bfloat16, float16 or float32, -inf allowed; rows may be strided. temperature_B: float32. seed_B and
    position_R: int64. A request's rows follow each other.
    """
    (R, V), (B,) = logits_RV.shape, temperature_B.shape
    assert seed_B.shape == (B,) and position_R.shape == (R,) and R % B == 0 and logits_RV.stride(1) == 1
    assert temperature_B.dtype == torch.float32 and seed_B.dtype == position_R.dtype == torch.int64
    assert temperature_B.is_contiguous() and seed_B.is_contiguous() and position_R.is_contiguous()
    BLOCK, device = tile_width(V), logits_RV.device
    TILES = triton.cdiv(V, BLOCK)
    BLOCK_TILES = triton.next_power_of_2(TILES)
    largest = torch.empty((R, TILES), dtype=torch.float32, device=device)
    _tile_max_kernel[(R, TILES)](logits_RV, largest, logits_RV.stride(0), V, BLOCK=BLOCK, **launch_options())
    key = torch.empty((R, TILES), dtype=torch.uint64, device=device)
    _tile_pick_kernel[(R, TILES)](
        logits_RV, temperature_B, seed_B, position_R, largest, key, logits_RV.stride(0), V, R // B,
        BLOCK=BLOCK, BLOCK_TILES=BLOCK_TILES, **launch_options(),
    )  # fmt: skip
    token_R = torch.empty(R, dtype=torch.int64, device=device)
    _row_pick_kernel[(R,)](key, token_R, TILES, BLOCK_TILES=BLOCK_TILES, **launch_options())
    return token_R


def example_inputs(R: int, V: int, B: int | None = None, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> dict:
    """Every third request is greedy. Without B each row is a request of its own."""
    g, B = torch.Generator().manual_seed(seed), B or R
    temperature_B = (0.2 + torch.rand(B, generator=g)).masked_fill(torch.arange(B) % 3 == 2, 0.0)
    return {
        "logits_RV": (3 * torch.randn(R, V, generator=g)).to(device, dtype),
        "temperature_B": temperature_B.to(device),
        "seed_B": torch.randint(-(2**63), 2**63 - 1, (B,), generator=g).to(device),
        "position_R": torch.randint(0, 2**17, (R,), generator=g).to(device),
    }


VARIANTS = [(argmax_pick, partial(example_inputs, R=8, V=128256, B=1))]
