"""Attention of new rows to a paged prefix and to a window under a mask: prefill chunks, decoding, verifying, drafting.

Dimension key:
    B = sequences, Q = new rows of each, H = query heads, G = key heads, D = head dimension
    S = slots of the KV pool, L = columns of the slot table, W = columns of the window
In the kernels:
    M = rows of a tile: the heads that share a key head, padded to a power of two, for as many new rows as fit
    N = columns of a tile

A sequence's columns are cut into tiles, prefix first, then window, and the tiles are dealt out to `num_splits` programs
by the length found on the device: the grid depends on shapes only. If there is more than one, a second kernel joins the
parts.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from specbackend.kernels.dependent_launch import current_arch, launch_options, wait_for_previous

NUM_SMS = 132  # of an H100 or H200; elsewhere the number of splits is a little off its best
WAVES = 2  # programs per SM to aim at

# Score of a column that a row may not see, and the highest before any is seen. Finite, so that differences are numbers:
# what a row adds up before it sees anything has weights of 1, and the first score it sees shrinks that to 0.
MASKED = tl.constexpr(-1e30)


def tree_attention_ref(
    q_BQHD: torch.Tensor,
    kv_S2GD: torch.Tensor,
    prefix_slot_BL: torch.Tensor,
    prefix_len_B: torch.Tensor,
    window_slot_BW: torch.Tensor,
    window_mask_BQW: torch.Tensor,
) -> torch.Tensor:
    """The definition, in float64 and one sequence at a time."""
    B, Q, H, D = q_BQHD.shape
    G = kv_S2GD.shape[2]
    out_BQHD = torch.empty(B, Q, H, D, dtype=torch.float64, device=q_BQHD.device)
    for b, prefix_len in enumerate(prefix_len_B.tolist()):
        slot_C = torch.cat([prefix_slot_BL[b, :prefix_len], window_slot_BW[b]])
        k_CGD, v_CGD = kv_S2GD[slot_C].double().unbind(1)
        q_QGRD = q_BQHD[b].double().view(Q, G, H // G, D)
        score_GRQC = torch.einsum("qgrd,cgd->grqc", q_QGRD, k_CGD) / math.sqrt(D)
        score_GRQC[..., prefix_len:].masked_fill_(~window_mask_BQW[b], -math.inf)
        out_BQHD[b] = torch.einsum("grqc,cgd->qgrd", score_GRQC.softmax(dim=-1), v_CGD).reshape(Q, H, D)
    return out_BQHD


@triton.jit
def _load_kv(kv_ptr, slot_N, s_slot, s_v, inside_N):
    k_ptr = kv_ptr + slot_N[:, None] * s_slot
    return (
        tl.load(k_ptr, mask=inside_N[:, None], other=0.0),
        tl.load(k_ptr + s_v, mask=inside_N[:, None], other=0.0),
    )


@triton.jit
def _attend(q_MD, k_ND, v_ND, visible_MN, scale, highest_M, total_M, out_MD):
    """One step of the running softmax: a tile joins the maximum, the sum of the weights and the weighted values."""
    score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale
    score_MN = tl.where(visible_MN, score_MN, MASKED)
    higher_M = tl.maximum(highest_M, tl.max(score_MN, 1))
    weight_MN = tl.exp2(score_MN - higher_M[:, None])
    shrink_M = tl.exp2(highest_M - higher_M)
    total_M = total_M * shrink_M + tl.sum(weight_MN, 1)
    out_MD = tl.dot(weight_MN.to(v_ND.dtype), v_ND, out_MD * shrink_M[:, None], input_precision="ieee")
    return higher_M, total_M, out_MD


# Integers that change from call to call: specialising on their values would compile a server's kernels again and again.
@triton.jit(do_not_specialize=["Q", "W", "num_splits", "num_rows", "s_window_b", "s_mask_b", "s_mask_q"])
def _tree_attention_kernel(
    q_ptr,  # [B, Q, H, D]
    kv_ptr,  # [S, 2, G, D]
    prefix_slot_ptr,  # [B, L]
    prefix_len_ptr,  # [B]
    window_slot_ptr,  # [B, W]
    window_mask_ptr,  # [B, Q, W]
    out_ptr,  # [B, Q, H, D], written if there is one split
    part_ptr,  # [num_splits, B, Q, H, D], like the next two written if there are several; not where total is 0
    highest_ptr,  # [num_splits, B, Q, H]
    total_ptr,  # [num_splits, B, Q, H]
    scale,
    Q,
    W,
    num_splits,
    num_rows,  # B * Q * H
    s_q_b,
    s_q_q,
    s_q_h,
    s_kv_slot,
    s_kv_v,
    s_kv_g,
    s_prefix_b,
    s_window_b,
    s_mask_b,
    s_mask_q,
    G: tl.constexpr,
    GROUP: tl.constexpr,  # heads of a group, H / G
    PADDED_GROUP: tl.constexpr,  # the power of two that they are laid out in
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) % G
    split = tl.program_id(2)

    first_row = tl.program_id(1) // G * (BLOCK_M // PADDED_GROUP)
    m = tl.arange(0, BLOCK_M)
    new_row = first_row + m // PADDED_GROUP
    head = g * GROUP + m % PADDED_GROUP
    exists = (new_row < Q) & (m % PADDED_GROUP < GROUP)
    d = tl.arange(0, D)
    q_row = q_ptr + b * s_q_b + new_row * s_q_q + head * s_q_h
    wait_for_previous(DEPENDENT)
    q_MD = tl.load(q_row[:, None] + d[None, :], mask=exists[:, None], other=0.0)
    kv_head_ptr = kv_ptr + g * s_kv_g + d[None, :]
    mask_row = first_row + tl.arange(0, BLOCK_M // PADDED_GROUP)
    mask_ptr = window_mask_ptr + b * s_mask_b + (mask_row * s_mask_q)[:, None]

    prefix_len = tl.load(prefix_len_ptr + b).to(tl.int32)
    prefix_tiles = tl.cdiv(prefix_len, BLOCK_N)
    tiles = prefix_tiles + tl.cdiv(W, BLOCK_N)
    tiles_per_split = tl.cdiv(tiles, num_splits)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)

    highest_M = tl.full([BLOCK_M], MASKED, tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    out_MD = tl.zeros([BLOCK_M, D], tl.float32)

    # Slots are fetched a tile ahead of their keys and values, or these could not be on their way during the products.
    n = first * BLOCK_N + tl.arange(0, BLOCK_N)
    slots_ptr = prefix_slot_ptr + b * s_prefix_b
    slot_N = tl.load(slots_ptr + n, mask=n < prefix_len, other=0)
    for _ in range(first, tl.minimum(last, prefix_tiles)):
        inside = n < prefix_len
        k_ND, v_ND = _load_kv(kv_head_ptr, slot_N, s_kv_slot, s_kv_v, inside)
        n += BLOCK_N
        slot_N = tl.load(slots_ptr + n, mask=n < prefix_len, other=0)
        highest_M, total_M, out_MD = _attend(q_MD, k_ND, v_ND, inside[None, :], scale, highest_M, total_M, out_MD)

    first = tl.maximum(first - prefix_tiles, 0)
    n = first * BLOCK_N + tl.arange(0, BLOCK_N)
    slots_ptr = window_slot_ptr + b * s_window_b
    slot_N = tl.load(slots_ptr + n, mask=n < W, other=0)
    for _ in range(first, last - prefix_tiles):
        inside = n < W
        k_ND, v_ND = _load_kv(kv_head_ptr, slot_N, s_kv_slot, s_kv_v, inside)
        seen = tl.load(mask_ptr + n[None, :], mask=(mask_row < Q)[:, None] & inside[None, :], other=False)
        seen_MN = tl.broadcast_to(seen[:, None, :], [BLOCK_M // PADDED_GROUP, PADDED_GROUP, BLOCK_N])
        seen_MN = tl.reshape(seen_MN, [BLOCK_M, BLOCK_N])
        n += BLOCK_N
        slot_N = tl.load(slots_ptr + n, mask=n < W, other=0)
        highest_M, total_M, out_MD = _attend(q_MD, k_ND, v_ND, seen_MN, scale, highest_M, total_M, out_MD)

    row = (b * Q + new_row) * (G * GROUP) + head
    if num_splits == 1:
        total_M = tl.where(exists, total_M, 1.0)
        out_MD = out_MD / total_M[:, None]
        tl.store(out_ptr + row[:, None] * D + d[None, :], out_MD.to(out_ptr.dtype.element_ty), mask=exists[:, None])
    else:
        row += split.to(tl.int64) * num_rows
        tl.store(highest_ptr + row, highest_M, mask=exists)
        tl.store(total_ptr + row, total_M, mask=exists)
        tl.store(part_ptr + row[:, None] * D + d[None, :], out_MD, mask=(exists & (total_M > 0))[:, None])


@triton.jit(do_not_specialize=["num_splits", "num_rows"])
def _join_splits_kernel(
    part_ptr,  # [num_splits, R, D], not written where total is 0
    highest_ptr,  # [num_splits, R]
    total_ptr,  # [num_splits, R]
    out_ptr,  # [R, D]
    num_splits,
    num_rows,  # R
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    d = tl.arange(0, D)
    row_of_split = split * num_rows + row
    wait_for_previous(DEPENDENT)
    highest_S = tl.load(highest_ptr + row_of_split, mask=split < num_splits, other=MASKED)
    total_S = tl.load(total_ptr + row_of_split, mask=split < num_splits, other=0.0)
    wrote = total_S > 0
    part_SD = tl.load(part_ptr + row_of_split[:, None] * D + d[None, :], mask=wrote[:, None], other=0.0)
    weight_S = tl.exp2(highest_S - tl.max(highest_S, 0))
    out_D = tl.sum(part_SD * weight_S[:, None], 0) / tl.sum(total_S * weight_S, 0)
    tl.store(out_ptr + row * D + d, out_D.to(out_ptr.dtype.element_ty))


@dataclass(frozen=True)
class Tiling:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_tiling(rows: int, D: int, itemsize: int, arch: int) -> Tiling:
    """For `rows` rows (new rows times heads of a group) of D numbers of `itemsize` bytes on a GPU of sm_`arch`.

    A tile of columns takes 16 KB. Hopper's tensor cores read it from shared memory; on an A100 it passes through
    registers, which then do not suffice for 128 rows.
    """
    block_n = 64 * 256 // max(D * itemsize, 256)
    most = (128 if arch >= 90 else 64) if D * itemsize <= 256 else 32
    block_m = min(max(16, triton.next_power_of_2(rows)), most)
    num_warps = 8 if block_m == 128 or (block_m == 64 and arch < 90) else 4
    return Tiling(block_m, block_n, num_warps, num_stages=3)


def choose_num_splits(num_programs: int, num_tiles: int) -> int:
    """How many ways to share out each sequence's columns when `num_programs` programs can work without sharing."""
    return max(1, min(num_tiles, WAVES * NUM_SMS // num_programs))


def tree_attention(
    q_BQHD: torch.Tensor,
    kv_S2GD: torch.Tensor,
    prefix_slot_BL: torch.Tensor,
    prefix_len_B: torch.Tensor,
    window_slot_BW: torch.Tensor,
    window_mask_BQW: torch.Tensor,
    num_splits: int | None = None,
) -> torch.Tensor:
    """Attend from each row of q to its sequence's prefix and to what the mask shows it of the window.

    q_BQHD: [B, Q, H, D], float16, bfloat16 or float32. D: a power of two from 16 to 256.
    kv_S2GD: [S, 2, G, D] of q's dtype, K and V of every slot of a layer. H is a multiple of G.
    prefix_slot_BL: int64 [B, L]. Columns from prefix_len on are not read.
    prefix_len_B: int64 [B], from 0 to L.
    window_slot_BW: int64 [B, W]. These slots hold finite numbers, also where the mask is False.
    window_mask_BQW: bool [B, Q, W]; may be expanded over B. Every row sees at least one column.
    num_splits: how many programs share a sequence's columns; chosen from the shapes if not given.

    Returns [B, Q, H, D] of q's dtype, scaled by 1/sqrt(D), computed in float32.
    """
    B, Q, H, D = q_BQHD.shape
    W, G = window_slot_BW.shape[1], kv_S2GD.shape[2]
    assert H % G == 0, f"{H} query heads do not share {G} key heads evenly"
    assert q_BQHD.dtype == kv_S2GD.dtype, f"queries are {q_BQHD.dtype}, keys and values {kv_S2GD.dtype}"
    assert q_BQHD.stride(3) == kv_S2GD.stride(3) == 1, "heads lie in one piece"
    assert prefix_slot_BL.stride(1) == window_slot_BW.stride(1) == window_mask_BQW.stride(2) == 1, (
        "columns are adjacent"
    )

    padded_group = triton.next_power_of_2(H // G)
    tiling = choose_tiling(Q * padded_group, D, q_BQHD.element_size(), current_arch())
    block_m = max(tiling.block_m, padded_group)
    programs = G * triton.cdiv(Q * padded_group, block_m)
    if num_splits is None:
        num_splits = choose_num_splits(B * programs, triton.cdiv(prefix_slot_BL.shape[1], tiling.block_n))
    out_BQHD = torch.empty(B, Q, H, D, dtype=q_BQHD.dtype, device=q_BQHD.device)
    parts = num_splits if num_splits > 1 else 0
    part_PBQHD = torch.empty(parts, B, Q, H, D, dtype=torch.float32, device=q_BQHD.device)
    highest_PBQH, total_PBQH = torch.empty(2, parts, B, Q, H, dtype=torch.float32, device=q_BQHD.device)
    _tree_attention_kernel[(B, programs, num_splits)](
        q_BQHD, kv_S2GD, prefix_slot_BL, prefix_len_B, window_slot_BW, window_mask_BQW,
        out_BQHD, part_PBQHD, highest_PBQH, total_PBQH, math.log2(math.e) / math.sqrt(D), Q, W, num_splits, B * Q * H,
        *q_BQHD.stride()[:3], *kv_S2GD.stride()[:3], prefix_slot_BL.stride(0), window_slot_BW.stride(0),
        *window_mask_BQW.stride()[:2],
        G=G, GROUP=H // G, PADDED_GROUP=padded_group, D=D, BLOCK_M=block_m, BLOCK_N=tiling.block_n,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, **launch_options(),
    )  # fmt: skip
    if num_splits > 1:
        _join_splits_kernel[(B * Q * H,)](
            part_PBQHD, highest_PBQH, total_PBQH, out_BQHD, num_splits, B * Q * H,
            D=D, BLOCK_S=triton.next_power_of_2(num_splits), num_warps=4, **launch_options(),
        )  # fmt: skip
    return out_BQHD


def example_inputs(
    B: int,
    Q: int,
    L: int,
    W: int,
    H: int,
    G: int,
    D: int,
    prefix_len: list[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Prefixes of L slots, or of fewer, scattered over a pool; a random mask. What may not be read is NaN."""
    torch.manual_seed(seed)
    lengths = prefix_len or [L] * B
    slot_BC = 1 + torch.randperm(B * (L + W), device=device).view(B, L + W)
    kv_S2GD = torch.randn(1 + B * (L + W), 2, G, D, device=device).to(dtype)
    kv_S2GD[0] = math.nan
    for b in range(B):
        kv_S2GD[slot_BC[b, lengths[b] : L]] = math.nan
    mask_BQW = torch.rand(B, Q, W, device=device) < 0.5
    mask_BQW[:, torch.arange(Q), torch.arange(Q) % W] = True
    return {
        "q_BQHD": torch.randn(B, Q, H, D, device=device).to(dtype),
        "kv_S2GD": kv_S2GD,
        "prefix_slot_BL": slot_BC[:, :L],
        "prefix_len_B": torch.tensor(lengths, device=device),
        "window_slot_BW": slot_BC[:, L:],
        "window_mask_BQW": mask_BQW,
    }


_llama = partial(example_inputs, H=32, G=8, D=128)
VARIANTS = [
    *[
        (tree_attention, partial(_llama, B=B, Q=Q, L=L, W=Q))
        for B in (1, 8, 64)
        for L in (1024, 8192)
        for Q in (1, 8, 16, 64)
    ],
    (tree_attention, partial(_llama, B=1, Q=2048, L=0, W=2048)),
]
