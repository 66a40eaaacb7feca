"""The smallest logit that top_k and top_p jointly let stay, found without sorting, by bisection.

A token stays if fewer than top_k tokens, and less than top_p of the probability, are above it. Both only grow on the
way down, so what stays is all from some value up, and equal logits stay or go together. Distances from the best are
bisected as integers of the same bits, which are in the same order; each half is cut down to the tokens in it.

B = requests, R = rows, R / B of each request, V = vocabulary.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from specbackend.kernels.dependent_launch import launch_options, wait_for_previous


def limit_threshold_ref(scaled_RV: torch.Tensor, top_k_B: torch.Tensor, top_p_B: torch.Tensor) -> torch.Tensor:
    top_k_R1, top_p_R1 = (each.repeat_interleave(len(scaled_RV) // len(each))[:, None] for each in (top_k_B, top_p_B))
    best_RV = scaled_RV.sort(dim=1, descending=True).values
    mass_RV = torch.nn.functional.pad(best_RV.double().exp().cumsum(dim=1), (1, 0))
    above_RV = torch.searchsorted(-best_RV, -best_RV)  # how many are larger
    stays_RV = (above_RV < top_k_R1) & (mass_RV.gather(1, above_RV) < top_p_R1 * mass_RV[:, -1:]) & best_RV.isfinite()
    threshold_R = best_RV.masked_fill(~stays_RV, torch.inf).amin(dim=1)
    is_limited_R1 = (top_k_R1 < scaled_RV.shape[1]) | (top_p_R1 < 1)
    return threshold_R.where(is_limited_R1[:, 0], -torch.inf)


@triton.jit
def _measure(scaled_ptr, V, pivot, BLOCK: tl.constexpr):
    """Of the tokens nearer to 0 than the pivot: number, sum of exp, the farthest distance; and the next one's."""
    count, mass = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float32)
    last, next = tl.zeros([BLOCK], tl.float32), tl.full([BLOCK], float("inf"), tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        distance = tl.abs(tl.load(scaled_ptr + v, mask=v < V, other=float("-inf")))
        is_nearer = distance < pivot
        count += is_nearer.to(tl.int32)
        mass += tl.where(is_nearer, tl.exp(-distance), 0.0)
        last = tl.maximum(last, tl.where(is_nearer, distance, 0.0))
        next = tl.minimum(next, tl.where(is_nearer, float("inf"), distance))
    return tl.sum(count), tl.sum(mass), tl.max(last), tl.min(next)


@triton.jit
def _threshold_kernel(
    scaled_ptr,  # [R, V]
    top_k_ptr,  # [B]
    top_p_ptr,  # [B]
    threshold_ptr,  # [R] out
    V,
    N,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    scaled_ptr += r * V
    wait_for_previous(DEPENDENT)
    top_k, top_p = tl.load(top_k_ptr + r // N), tl.load(top_p_ptr + r // N)
    threshold = -float("inf")
    if (top_k < V) | (top_p < 1.0):
        _, total, last, _ = _measure(scaled_ptr, V, float("inf"), BLOCK)
        stays = tl.zeros([], tl.int32)  # the farthest known to stay: at first the best
        goes = last.to(tl.int32, bitcast=True) + 1  # nothing from here on stays
        while goes - stays > 1:
            pivot = stays + (goes - stays) // 2
            count, mass, last, next = _measure(scaled_ptr, V, pivot.to(tl.float32, bitcast=True), BLOCK)
            # What is true of the pivot is true from behind the last token before it to the next one.
            if (count < top_k) & (mass < top_p * total):
                stays = next.to(tl.int32, bitcast=True)
            else:
                goes = last.to(tl.int32, bitcast=True) + 1
        threshold = -stays.to(tl.float32, bitcast=True)
    tl.store(threshold_ptr + r, threshold)


def limit_threshold(scaled_RV: torch.Tensor, top_k_B: torch.Tensor, top_p_B: torch.Tensor) -> torch.Tensor:
    """Return the smallest logit in each row that is above -inf and stays, float32 [R]; -inf in rows without limits.

    Those stay that are among the top_k largest and have less than top_p of the softmax above. Sums are of float32:
    where the probability above a logit is within a millionth of top_p, it is rounding that says whether it stays.
    A row's result does not depend on the other rows, to the bit.

    scaled_RV: float32, contiguous, the best of each row 0, -inf allowed. top_k_B: int64, at least 1; V or more: all.
    top_p_B: float64, above 0; 1 or more: all. A request's rows follow each other.
    """
    (R, V), (B,) = scaled_RV.shape, top_k_B.shape
    assert scaled_RV.dtype == torch.float32 and scaled_RV.is_contiguous() and R % B == 0
    assert top_k_B.dtype == torch.int64 and top_k_B.is_contiguous()
    assert top_p_B.dtype == torch.float64 and top_p_B.is_contiguous() and top_p_B.shape == (B,)
    threshold_R = torch.empty(R, dtype=torch.float32, device=scaled_RV.device)
    BLOCK = min(8192, max(128, triton.next_power_of_2(V)))
    _threshold_kernel[(R,)](
        scaled_RV, top_k_B, top_p_B, threshold_R, V, R // B,
        BLOCK=BLOCK, num_warps=max(1, BLOCK // 256), **launch_options(),
    )  # fmt: skip
    return threshold_R


def example_inputs(R: int, V: int, B: int | None = None, device="cpu", seed: int = 0) -> dict:
    """Of logits in bfloat16. Requests have in turn top_p, top_k, both, nothing. Without B each row is a request."""
    g, B = torch.Generator().manual_seed(seed), B or R
    logits_RV = (3 * torch.randn(R, V, generator=g)).bfloat16().float()
    kind_B = torch.arange(B) % 4
    top_k_B = torch.randint(1, min(V, 200) + 1, (B,), generator=g)
    top_p_B = 0.3 + 0.69 * torch.rand(B, generator=g, dtype=torch.float64)
    return {
        "scaled_RV": ((logits_RV - logits_RV.amax(dim=1, keepdim=True)) / 0.8).to(device),
        "top_k_B": top_k_B.masked_fill(kind_B % 3 == 0, torch.iinfo(torch.int64).max).to(device),
        "top_p_B": top_p_B.masked_fill(kind_B % 2 == 1, torch.inf).to(device),
    }


VARIANTS = [(limit_threshold, partial(example_inputs, R=8, V=128256, B=1))]
