"""The likeliest tokens of each row and their log-probabilities, in two passes over nothing but the logits.

Noise may be added first: that which the target will pick with, so that drafts of sampled text foresee it.

R = rows, W = width of a row: the draft's vocabulary, K = tokens wanted.
"""

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from specbackend.kernels.gumbel import gumbel_noise, gumbel_noise_ref
from specbackend.kernels.rank_key import key_index, key_value, rank_key, tile_width


@dataclass(frozen=True)
class TopK:
    logprob_RK: torch.Tensor  # float32, in falling order
    index_RK: torch.Tensor  # int64


def topk_logprob_ref(logits_RW: torch.Tensor, scale_R: torch.Tensor, k: int) -> TopK:
    scaled_RW = logits_RW.float() * scale_R[:, None]
    index_RK = scaled_RW.sort(dim=1, descending=True, stable=True).indices[:, :k]
    logprob_RW = scaled_RW.log_softmax(dim=1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)  # nan: all are -inf
    return TopK(logprob_RW.gather(1, index_RK), index_RK)


def topk_noisy_logprob_ref(
    logits_RW: torch.Tensor,
    scale_R: torch.Tensor,
    noise_scale_R: torch.Tensor,
    seed_R: torch.Tensor,
    position_R: torch.Tensor,
    token_W: torch.Tensor,
    k: int,
) -> TopK:
    noise_RW = noise_scale_R[:, None] * gumbel_noise_ref(seed_R, position_R, token_W)
    return topk_logprob_ref(logits_RW.float() * scale_R[:, None] + noise_RW, torch.ones_like(scale_R), k)


@triton.jit
def _sum_of_exp(x, weight):
    """The maximum of x, and the sum of weight * exp(x - maximum); 0 if all of x is -inf."""
    largest = tl.max(x)
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    return largest, tl.sum(weight * tl.exp(x - finite))


@triton.jit
def _tile_kernel(
    logits_ptr,  # [R, W]
    scale_ptr,  # [R]
    noise_scale_ptr,  # [R], or None: no row has noise
    seed_ptr,  # [R]
    position_ptr,  # [R]
    token_ptr,  # [W]
    key_ptr,  # [R, TILES, K] out: the tile's best, in falling order
    largest_ptr,  # [R, TILES] out
    sum_ptr,  # [R, TILES] out: of exp(scaled logit - largest)
    row_stride,
    W,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
):
    r, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    w = tile * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + r * row_stride + w, mask=w < W, other=float("-inf")).to(tl.float32)
    scaled = logits * tl.load(scale_ptr + r)
    if noise_scale_ptr is not None:
        noise_scale = tl.load(noise_scale_ptr + r)
        if noise_scale > 0:
            token = tl.load(token_ptr + w, mask=w < W, other=0)
            scaled += noise_scale * gumbel_noise(tl.load(seed_ptr + r), tl.load(position_ptr + r), token)
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
):
    r = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK_TILES)
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


def topk_logprob(logits_RW: torch.Tensor, scale_R: torch.Tensor, k: int) -> TopK:
    """Return the k largest of log_softmax(logits * scale) of each row, the first of equal logits first.

    logits_RW: bfloat16, float16 or float32, -inf allowed; rows may be strided. scale_R: float32, above 0. k: 1 to 16.
    The order is that of the scaled logits. A row of nothing but -inf gives -inf for its first k tokens.
    A row's result does not depend on the other rows, to the bit.
    """
    return _launch(logits_RW, scale_R, k)


def topk_noisy_logprob(
    logits_RW: torch.Tensor,
    scale_R: torch.Tensor,
    noise_scale_R: torch.Tensor,
    seed_R: torch.Tensor,
    position_R: torch.Tensor,
    token_W: torch.Tensor,
    k: int,
) -> TopK:
    """Return the k largest of log_softmax(logits * scale + noise * noise_scale) of each row, as `topk_logprob`.

    The noise is that of `argmax_pick`, a function of (seed, position, token) alone; at scale 0 it costs nothing.

    noise_scale_R: float32, not below 0. seed_R, position_R, token_W: int64; token_W: which tokens the logits are of.
    """
    R, W = logits_RW.shape
    assert noise_scale_R.shape == seed_R.shape == position_R.shape == (R,) and token_W.shape == (W,)
    assert noise_scale_R.dtype == torch.float32 and noise_scale_R.is_contiguous()
    for integers in (seed_R, position_R, token_W):
        assert integers.dtype == torch.int64 and integers.is_contiguous()
    return _launch(logits_RW, scale_R, k, noise_scale_R, seed_R, position_R, token_W)


def _launch(logits_RW, scale_R, k: int, noise_scale_R=None, seed_R=None, position_R=None, token_W=None) -> TopK:
    R, W = logits_RW.shape
    assert 1 <= k <= min(16, W) and logits_RW.stride(1) == 1
    assert scale_R.shape == (R,) and scale_R.dtype == torch.float32 and scale_R.is_contiguous()
    BLOCK, K = tile_width(W), max(2, triton.next_power_of_2(k))  # a tl.topk of 1 fails in Triton 3.6
    TILES = triton.cdiv(W, BLOCK)

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=logits_RW.device)

    key, largest, sum_of_exp = new(R, TILES, K, dtype=torch.uint64), new(R, TILES), new(R, TILES)
    _tile_kernel[(R, TILES)](
        logits_RW, scale_R, noise_scale_R, seed_R, position_R, token_W, key, largest, sum_of_exp,
        logits_RW.stride(0), W, BLOCK=BLOCK, K=K,
    )  # fmt: skip
    top = TopK(new(R, k), new(R, k, dtype=torch.int64))
    _merge_kernel[(R,)](
        key, largest, sum_of_exp, top.logprob_RK, top.index_RK, k, TILES,
        BLOCK_TILES=triton.next_power_of_2(TILES), K=K,
    )  # fmt: skip
    return top


def example_inputs(R: int, W: int, k: int, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {
        "logits_RW": (3 * torch.randn(R, W, generator=g)).to(device, dtype),
        "scale_R": (0.5 + torch.rand(R, generator=g)).to(device),
        "k": k,
    }


def example_noisy_inputs(R: int, W: int, k: int, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> dict:
    """Every third row has no noise; the tokens are some of twice as many."""
    inputs = example_inputs(R, W, k, dtype, device, seed)
    g = torch.Generator().manual_seed(seed)
    noise_scale_R = (0.2 + torch.rand(R, generator=g)).masked_fill(torch.arange(R) % 3 == 2, 0.0)
    return inputs | {
        "noise_scale_R": noise_scale_R.to(device),
        "seed_R": torch.randint(-(2**63), 2**63 - 1, (R,), generator=g).to(device),
        "position_R": torch.randint(0, 2**17, (R,), generator=g).to(device),
        "token_W": torch.randperm(2 * W, generator=g)[:W].sort().values.to(device),
    }


VARIANTS = [
    (launcher, partial(inputs, R=4, W=W, k=k))
    for launcher, inputs in [(topk_logprob, example_inputs), (topk_noisy_logprob, example_noisy_inputs)]
    for W, k in [(32000, 4), (128256, 8)]
]
