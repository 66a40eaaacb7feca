"""Between the fused projection and attention: rotate q and k, and write k and v to their slots.

T = rows, H = query heads, G = key-value heads, D = head size, C = D / 2 pairs, E = (H + 2 * G) * D, S = slots.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from specbackend.kernels.dependent_launch import launch_options, wait_for_previous


def rope_kv_write_ref(
    qkv_TE: torch.Tensor, rope_TC2: torch.Tensor, slot_T: torch.Tensor, kv_S2GD: torch.Tensor, num_heads: int
) -> torch.Tensor:
    _, _, G, D = kv_S2GD.shape
    heads = qkv_TE.unflatten(1, (num_heads + 2 * G, D))
    q_and_k, v = heads.split((num_heads + G, G), dim=1)
    pairs = torch.view_as_complex(q_and_k.float().unflatten(2, (D // 2, 2)).contiguous())
    rotated = torch.view_as_real(pairs * torch.view_as_complex(rope_TC2)[:, None]).flatten(2).to(qkv_TE.dtype)
    q_THD, k_TGD = rotated.split((num_heads, G), dim=1)
    kv_S2GD.index_copy_(0, slot_T, torch.stack([k_TGD, v], dim=1))
    return q_THD.contiguous()


@triton.jit
def _rope_kv_write_kernel(
    qkv_ptr,  # [T, H + 2 * G, D]
    rope_ptr,  # [T, D], cos and sin of each pair
    slot_ptr,  # [T]
    q_ptr,  # [T, H, D] out
    kv_ptr,  # [S, 2 * G, D] out: a slot holds its key heads and then its value heads, as a row of qkv does
    qkv_stride,
    slot_t_stride,
    kv_slot_stride,
    H,
    G,
    D,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    in_row = (head < H + 2 * G) & (d < D)
    wait_for_previous(DEPENDENT)
    x = tl.load(qkv_ptr + t * qkv_stride + head * D + d, mask=in_row, other=0.0)
    cos, sin = tl.split(tl.reshape(tl.load(rope_ptr + t * D + d, mask=d < D, other=0.0), (1, BLOCK_D // 2, 2)))
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (BLOCK_H, BLOCK_D // 2, 2)))
    rotated = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK_H, BLOCK_D))
    x = tl.where(head < H + G, rotated.to(x.dtype), x)
    tl.store(q_ptr + (t * H + head) * D + d, x, mask=in_row & (head < H))
    slot = tl.load(slot_ptr + t * slot_t_stride)
    tl.store(kv_ptr + slot * kv_slot_stride + (head - H) * D + d, x, mask=in_row & (head >= H))


def rope_kv_write(
    qkv_TE: torch.Tensor, rope_TC2: torch.Tensor, slot_T: torch.Tensor, kv_S2GD: torch.Tensor, num_heads: int
) -> torch.Tensor:
    """Write rotated k and v of each row to its slot, and return rotated q [T, H, D], contiguous.

    qkv_TE: H query heads, G key heads, G value heads; rows may be strided. The heads' pairs are adjacent (2i, 2i + 1).
    rope_TC2: float32, contiguous, cosine and sine of each row's angles. slot_T: int64, may be strided, as may the slots
    of kv_S2GD.
    Rows that share a slot may race: padding rows share one that nobody reads.
    """
    (T, E), (_, _, G, D), H = qkv_TE.shape, kv_S2GD.shape, num_heads
    assert E == (H + 2 * G) * D and rope_TC2.shape == (T, D // 2, 2) and slot_T.shape == (T,)
    assert qkv_TE.stride(1) == 1 and rope_TC2.is_contiguous() and kv_S2GD[0].is_contiguous()
    assert rope_TC2.dtype == torch.float32 and slot_T.dtype == torch.int64 and qkv_TE.dtype == kv_S2GD.dtype
    q_THD = torch.empty((T, H, D), dtype=qkv_TE.dtype, device=qkv_TE.device)
    BLOCK_H = 8
    _rope_kv_write_kernel[(T, triton.cdiv(H + 2 * G, BLOCK_H))](
        qkv_TE, rope_TC2, slot_T, q_THD, kv_S2GD, qkv_TE.stride(0), slot_T.stride(0), kv_S2GD.stride(0), H, G, D,
        BLOCK_H=BLOCK_H, BLOCK_D=triton.next_power_of_2(D), **launch_options(),
    )  # fmt: skip
    return q_THD


def example_inputs(
    T: int, H: int, G: int, D: int, num_slots: int = 0, dtype=torch.bfloat16, device="cpu", seed: int = 0
) -> dict:
    """Rows go to different slots of the second layer of a pool of two."""
    g = torch.Generator().manual_seed(seed)
    num_slots = num_slots or 2 * T
    angle_TC = 6 * torch.rand(T, D // 2, generator=g)
    pool = torch.randn(2, num_slots, 2, G, D, generator=g).to(device, dtype)
    return {
        "qkv_TE": torch.randn(T, (H + 2 * G) * D, generator=g).to(device, dtype),
        "rope_TC2": torch.stack([angle_TC.cos(), angle_TC.sin()], dim=2).to(device),
        "slot_T": torch.randperm(num_slots, generator=g)[:T].to(device),
        "kv_S2GD": pool[1],
        "num_heads": H,
    }


VARIANTS = [(rope_kv_write, partial(example_inputs, T=8, H=32, G=8, D=128))]
