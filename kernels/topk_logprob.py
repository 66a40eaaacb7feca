"""The likeliest tokens of each row and their log-probabilities, in two passes over nothing but the logits.

Noise may be added first: that which the target will pick with, so that drafts of sampled text foresee it.

B = requests, R = rows, R / B of each request, W = width of a row: the draft's vocabulary, K = tokens wanted.
"""

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from specbackend.kernels.dependent_launch import launch_options, wait_for_previous
from specbackend.kernels.gumbel import gumbel_noise, gumbel_noise_ref
from specbackend.kernels.rank_key import key_index, key_value, rank_key, tile_width


@dataclass(frozen=True)
class TopK:
    logprob_RK: torch.Tensor  # float32, in falling order
    index_RK: torch.Tensor  # int64


def topk_logprob_ref(logits_RW: torch.Tensor, scale_B: torch.Tensor, k: int) -> TopK:
    scaled_RW = logits_RW.float() * _of_rows(scale_B, logits_RW)[:, None]
    index_RK = scaled_RW.sort(dim=1, descending=True, stable=True).indices[:, :k]
    logprob_RW = scaled_RW.log_softmax(dim=1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)  # nan: all are -inf
    return TopK(logprob_RW.gather(1, index_RK), index_RK)


def topk_noisy_logprob_ref(
    logits_RW: torch.Tensor,
    scale_B: torch.Tensor,
    noise_scale_B: torch.Tensor,
    seed_B: torch.Tensor,
    position_R: torch.Tensor,
    token_W: torch.Tensor,
    k: int,
) -> TopK:
    scale_R, noise_scale_R, seed_R = (_of_rows(each, logits_RW) for each in (scale_B, noise_scale_B, seed_B))
    noise_RW = noise_scale_R[:, None] * gumbel_noise_ref(seed_R, position_R, token_W)
    return topk_logprob_ref(logits_RW.float() * scale_R[:, None] + noise_RW, torch.ones_like(scale_R), k)


def _of_rows(x_B: torch.Tensor, logits_RW: torch.Tensor) -> torch.Tensor:
    return x_B.repeat_interleave(len(logits_RW) // len(x_B))


@triton.jit
def _sum_of_exp(x, weight):
    """The maximum of x, and the sum of weight * exp(x - maximum); 0 if all of x is -inf."""
    largest = tl.max(x)
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    return largest, tl.sum(weight * tl.exp(x - finite))


@triton.jit
def _tile_kernel(
    logits_ptr,  # [R, W]
    scale_ptr,  # [B]
    noise_scale_ptr,  # [B], or None: no row has noise
    seed_ptr,  # [B]
    position_ptr,  # [R]
    token_ptr,  # [W]
    key_ptr,  # [R, TILES, K] out: the tile's best, in falling order
    largest_ptr,  # [R, TILES] out
    sum_ptr,  # [R, TILES] out: of exp(scaled logit - largest)
    row_stride,
    W,
    N,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    r, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    w = tile * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(DEPENDENT)
    logits = tl.load(logits_ptr + r * row_stride + w, mask=w < W, other=float("-inf")).to(tl.float32)
    scaled = logits * tl.load(scale_ptr + r // N)
    if noise_scale_ptr is not None:
        noise_scale = tl.load(noise_scale_ptr + r // N)
        if noise_scale > 0:
            token = tl.load(token_ptr + w, mask=w < W, other=0)
            scaled += noise_scale * gumbel_noise(tl.load(seed_ptr + r // N), tl.load(position_ptr + r), token)
    place = r * tl.num_programs(1) + tile
    tl.store(key_ptr + place * K + tl.arange(0, K), tl.topk(rank_key(scaled, w), K))
    largest, sum_of_exp = _sum_of_exp(scaled, 1.0)
    tl.store(largest_ptr + place, largest)
    tl.store(sum_ptr + place, sum_of_exp)


@triton.jit
def _merge_kernel(
    key_ptr,  # [R, TILES, K]
    largest_ptr,  # [R, TILES]
    sum_ptr,  # [R, TILES]
    logprob_ptr,  # [R, k] out
    index_ptr,  # [R, k] out
    k,
    TILES,
    BLOCK_TILES: tl.constexpr,
    K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK_TILES)
    wait_for_previous(DEPENDENT)
    tile_largest = tl.load(largest_ptr + r * TILES + tile, mask=tile < TILES, other=float("-inf"))
    tile_sum = tl.load(sum_ptr + r * TILES + tile, mask=tile < TILES, other=0.0)
    largest, sum_of_exp = _sum_of_exp(tile_largest, tile_sum)

    c = tl.arange(0, BLOCK_TILES * K)
    best = tl.topk(tl.load(key_ptr + r * TILES * K + c, mask=c < TILES * K, other=0), K)
    scaled = key_value(best)
    logprob = tl.where(scaled == float("-inf"), scaled, scaled - largest - tl.log(sum_of_exp))
    rank = tl.arange(0, K)
    tl.store(logprob_ptr + r * k + rank, logprob, mask=rank < k)
    tl.store(index_ptr + r * k + rank, key_index(best), mask=rank < k)


def topk_logprob(logits_RW: torch.Tensor, scale_B: torch.Tensor, k: int) -> TopK:
    """Return the k largest of log_softmax(logits * scale) of each row, the first of equal logits first.

    logits_RW: bfloat16, float16 or float32, -inf allowed; rows may be strided. scale_B: float32, above 0. k: 1 to 16.
    A request's rows follow each other.
    The order is that of the scaled logits. A row of nothing but -inf gives -inf for its first k tokens.
    A row's result does not depend on the other rows, to the bit.
    """
    return _launch(logits_RW, scale_B, k)


def topk_noisy_logprob(
    logits_RW: torch.Tensor,
    scale_B: torch.Tensor,
    noise_scale_B: torch.Tensor,
    seed_B: torch.Tensor,
    position_R: torch.Tensor,
    token_W: torch.Tensor,
    k: int,
) -> TopK:
    """Return the k largest of log_softmax(logits * scale + noise * noise_scale) of each row, as `topk_logprob`.

    The noise is that of `argmax_pick`, a function of (seed, position, token) alone; at scale 0 it costs nothing.

    noise_scale_B: float32, not below 0. seed_B, position_R, token_W: int64; token_W: which tokens the logits are of.
    """
    R, W = logits_RW.shape
    assert noise_scale_B.shape == seed_B.shape == scale_B.shape and (position_R.shape, token_W.shape) == ((R,), (W,))
    assert noise_scale_B.dtype == torch.float32 and noise_scale_B.is_contiguous()
    for integers in (seed_B, position_R, token_W):
        assert integers.dtype == torch.int64 and integers.is_contiguous()
    return _launch(logits_RW, scale_B, k, noise_scale_B, seed_B, position_R, token_W)


def _launch(logits_RW, scale_B, k: int, noise_scale_B=None, seed_B=None, position_R=None, token_W=None) -> TopK:
    R, W = logits_RW.shape
    assert 1 <= k <= min(16, W) and logits_RW.stride(1) == 1
    assert R % len(scale_B) == 0 and scale_B.dtype == torch.float32 and scale_B.is_contiguous()
    BLOCK, K = tile_width(W), max(2, triton.next_power_of_2(k))  # a tl.topk of 1 fails in Triton 3.6
    TILES = triton.cdiv(W, BLOCK)

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=logits_RW.device)

    key, largest, sum_of_exp = new(R, TILES, K, dtype=torch.uint64), new(R, TILES), new(R, TILES)
    _tile_kernel[(R, TILES)](
        logits_RW, scale_B, noise_scale_B, seed_B, position_R, token_W, key, largest, sum_of_exp,
        logits_RW.stride(0), W, R // len(scale_B), BLOCK=BLOCK, K=K, **launch_options(),
    )  # fmt: skip
    top = TopK(new(R, k), new(R, k, dtype=torch.int64))
    _merge_kernel[(R,)](
        key, largest, sum_of_exp, top.logprob_RK, top.index_RK, k, TILES,
        BLOCK_TILES=triton.next_power_of_2(TILES), K=K, **launch_options(),
    )  # fmt: skip
    return top


def example_inputs(
    R: int, W: int, k: int, B: int | None = None, dtype=torch.bfloat16, device="cpu", seed: int = 0
) -> dict:
    """Without B each row is a request of its own."""
    g = torch.Generator().manual_seed(seed)
    return {
        "logits_RW": (3 * torch.randn(R, W, generator=g)).to(device, dtype),
        "scale_B": (0.5 + torch.rand(B or R, generator=g)).to(device),
        "k": k,
    }


def example_noisy_inputs(
    R: int, W: int, k: int, B: int | None = None, dtype=torch.bfloat16, device="cpu", seed: int = 0
) -> dict:
    """Every third request has no noise; the tokens are some of twice as many."""
    g, B = torch.Generator().manual_seed(seed), B or R
    noise_scale_B = (0.2 + torch.rand(B, generator=g)).masked_fill(torch.arange(B) % 3 == 2, 0.0)
    return example_inputs(R, W, k, B, dtype, device, seed) | {
        "noise_scale_B": noise_scale_B.to(device),
        "seed_B": torch.randint(-(2**63), 2**63 - 1, (B,), generator=g).to(device),
        "position_R": torch.randint(0, 2**17, (R,), generator=g).to(device),
        "token_W": torch.randperm(2 * W, generator=g)[:W].sort().values.to(device),
    }


VARIANTS = [
    (launcher, partial(inputs, R=4, W=W, k=k, B=1))
    for launcher, inputs in [(topk_logprob, example_inputs), (topk_noisy_logprob, example_noisy_inputs)]
    for W, k in [(32000, 4), (128256, 8)]
]
