"""Matrix product of a few rows with a weight: at the speed of reading the weight, and the same for every row alone.

Dimension key:
    T = rows; E = outputs, D = inputs; S = parts into which the inputs are split

The weight takes the place of the left matrix, so that its many rows fill the tensor cores' fixed height and the few
rows of x their variable width. Tiles, their order and the split of the inputs depend on the weight's shape only.
A weight of 8 bits, int8 or fp8, becomes x's dtype in registers, which is exact; its outputs are scaled at the end.
"""

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from specbackend.kernels.dependent_launch import LINE_BYTES, launch_options, prefetch, wait_for_previous

NUM_SMS = 132  # of an H100 or H200
MAX_BLOCK_T = 64
BLOCK_D = 128  # inputs of a tile: 256 bytes of each of its weight rows
PREFETCHED_LINES = 512  # 64 KB of a program's weight
SHARED_BYTES = 96 * 1024  # for the tiles on their way; two programs fit into an SM


def linear_small_m_ref(
    x_TD: torch.Tensor,
    weight_ED: torch.Tensor,
    bias_E: torch.Tensor | None = None,
    residual_TE: torch.Tensor | None = None,
    scale_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition, in float64."""
    y_TE = x_TD.double() @ weight_ED.double().t()
    if scale_E is not None:
        y_TE *= scale_E
    if bias_E is not None:
        y_TE += bias_E
    if residual_TE is not None:
        y_TE += residual_TE
    return y_TE


@triton.jit
def _store(y_ET, y_ptr, bias_ptr, residual_ptr, s_residual, t, e, T, E, BIAS: tl.constexpr, RESIDUAL: tl.constexpr):
    """Add bias and residual to the outputs e of the rows t, round, store."""
    exists = (e < E)[:, None] & (t < T)[None, :]
    if BIAS:
        y_ET += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)[:, None]
    if RESIDUAL:
        residual = tl.load(residual_ptr + t[None, :] * s_residual + e[:, None], mask=exists, other=0.0)
        y_ET += residual.to(tl.float32)
    tl.store(y_ptr + t[None, :] * E + e[:, None], y_ET.to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["T"])
def _linear_small_m_kernel(
    x_ptr,  # [T, D]
    weight_ptr,  # [E, D]
    bias_ptr,  # [E]
    residual_ptr,  # [T, E]
    scale_ptr,  # [E], or None
    y_ptr,  # [T, E], or if SPLIT sums over a part of the inputs, [S, T, E]
    T,
    E,
    D,
    part,  # inputs of a part, a multiple of BLOCK_D
    s_x,
    s_weight,
    s_residual,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    LINES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    split = tl.program_id(2)
    d = tl.arange(0, BLOCK_D)
    # outputs that do not exist repeat the last one: no mask to compute, and nothing of them is stored
    weight_row = weight_ptr + tl.minimum(e, E - 1).to(tl.int64) * s_weight
    x_row = x_ptr + t * s_x

    first, end = split * part, tl.minimum((split + 1) * part, D)
    if DEPENDENT:  # the weight is not the previous kernel's: its first lines are on their way while that still runs
        LINE_D: tl.constexpr = 8 * LINE_BYTES // weight_ptr.dtype.element_ty.primitive_bitwidth
        line_d = tl.minimum(first + LINE_D * tl.arange(0, LINES), end - 1)
        prefetch(weight_row[:, None] + line_d[None, :])
    wait_for_previous(DEPENDENT)
    y_ET = tl.zeros([BLOCK_E, BLOCK_T], tl.float32)
    for start in range(first, end, BLOCK_D):
        inside = start + d < D
        weight_ED = tl.load(weight_row[:, None] + (start + d)[None, :], mask=inside[None, :], other=0.0)
        x_TD = tl.load(x_row[:, None] + (start + d)[None, :], mask=(t < T)[:, None] & inside[None, :], other=0.0)
        y_ET = tl.dot(weight_ED.to(x_TD.dtype), tl.trans(x_TD), y_ET, input_precision="ieee")
    if scale_ptr is not None:
        y_ET *= tl.load(scale_ptr + e, mask=e < E, other=0.0)[:, None]

    if SPLIT:
        sums_ptr = y_ptr + split.to(tl.int64) * T * E
        _store(y_ET, sums_ptr, bias_ptr, residual_ptr, s_residual, t, e, T, E, BIAS=False, RESIDUAL=False)
    else:
        _store(y_ET, y_ptr, bias_ptr, residual_ptr, s_residual, t, e, T, E, BIAS, RESIDUAL)


@triton.jit(do_not_specialize=["T"])
def _add_parts_kernel(
    sums_ptr,  # [S, T, E]
    bias_ptr,  # [E]
    residual_ptr,  # [T, E]
    y_ptr,  # [T, E]
    T,
    E,
    s_residual,
    NUM_SPLITS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    t = tl.program_id(1) + tl.arange(0, 1)
    y_E = tl.zeros([BLOCK_E], tl.float32)
    wait_for_previous(DEPENDENT)
    for split in tl.static_range(NUM_SPLITS):
        y_E += tl.load(sums_ptr + (split * T + tl.program_id(1)).to(tl.int64) * E + e, mask=e < E, other=0.0)
    _store(y_E[:, None], y_ptr, bias_ptr, residual_ptr, s_residual, t, e, T, E, BIAS, RESIDUAL)


@dataclass(frozen=True)
class Split:
    """How the programs share out a weight: tiles of `block_e` outputs times `num_splits` parts of the inputs."""

    block_e: int
    num_splits: int
    part: int


def make_split(D: int, block_e: int, num_splits: int) -> Split:
    """As near to num_splits parts as whole blocks of inputs allow."""
    part_blocks = triton.cdiv(triton.cdiv(D, BLOCK_D), num_splits)
    return Split(block_e, triton.cdiv(triton.cdiv(D, BLOCK_D), part_blocks), part_blocks * BLOCK_D)


def choose_split(E: int, D: int) -> Split:
    """64 outputs are the height of Hopper's tensor cores; where that gives less than a tile an SM, it is 32."""
    block_e = 64 if E >= 64 * NUM_SMS else 32
    return make_split(D, block_e, max(1, min(NUM_SMS // triton.cdiv(E, block_e), triton.cdiv(D, BLOCK_D) // 4)))


def choose_num_stages(block_e: int, weight_itemsize: int, block_t: int, itemsize: int) -> int:
    return max(2, min(8, SHARED_BYTES // ((block_e * weight_itemsize + block_t * itemsize) * BLOCK_D)))


def linear_small_m(
    x_TD: torch.Tensor,
    weight_ED: torch.Tensor,
    bias_E: torch.Tensor | None = None,
    residual_TE: torch.Tensor | None = None,
    scale_E: torch.Tensor | None = None,
    split: Split | None = None,
) -> torch.Tensor:
    """x @ weight.T * scale + bias + residual, summed in float32 and rounded once.

    x_TD: [T, D], float16, bfloat16 or float32. weight_ED: [E, D] of x's dtype, or with scales of int8 or float8_e4m3fn,
    which takes sm_89. Unit stride along D. bias_E: [E]; residual_TE: [T, E] with unit stride along E; scale_E: float32
    [E]. split: chosen from the weight's shape if not given.

    Returns [T, E] of x's dtype. Each row has the same bits whatever the other rows are and whatever their number within
    1 to 16, 17 to 32 or from 33 on: inputs are added in an order that depends on the split only. (Between these ranges
    only the tensor core instruction's width differs.)
    """
    T, D = x_TD.shape
    E = weight_ED.shape[0]
    assert weight_ED.shape[1] == D, f"weight takes {weight_ED.shape[1]} inputs, x has {D}"
    assert (x_TD.dtype == weight_ED.dtype) == (scale_E is None), f"x is {x_TD.dtype}, the weight {weight_ED.dtype}"
    assert scale_E is None or (scale_E.shape == (E,) and scale_E.is_contiguous() and scale_E.dtype == torch.float32)
    assert x_TD.stride(1) == weight_ED.stride(1) == 1, "inputs are adjacent"
    assert residual_TE is None or residual_TE.stride(1) == 1, "outputs are adjacent"

    split = split or choose_split(E, D)
    block_t = 16 if T <= 16 else 32 if T <= 32 else MAX_BLOCK_T
    epilogue = {"BIAS": bias_E is not None, "RESIDUAL": residual_TE is not None}
    s_residual = 0 if residual_TE is None else residual_TE.stride(0)
    y_TE = torch.empty(T, E, dtype=x_TD.dtype, device=x_TD.device)
    sums_STE = y_TE
    if split.num_splits > 1:
        sums_STE = torch.empty(split.num_splits, T, E, dtype=torch.float32, device=x_TD.device)
    num_stages = choose_num_stages(split.block_e, weight_ED.element_size(), block_t, x_TD.element_size())
    _linear_small_m_kernel[(triton.cdiv(T, block_t), triton.cdiv(E, split.block_e), split.num_splits)](
        x_TD, weight_ED, bias_E, residual_TE, scale_E, sums_STE, T, E, D, split.part,
        x_TD.stride(0), weight_ED.stride(0), s_residual,
        BLOCK_E=split.block_e, BLOCK_T=block_t, BLOCK_D=BLOCK_D, SPLIT=split.num_splits > 1, **epilogue,
        LINES=PREFETCHED_LINES // split.block_e, num_warps=8 if block_t == 64 else 4, num_stages=num_stages,
        **launch_options(),
    )  # fmt: skip
    if split.num_splits > 1:
        _add_parts_kernel[(triton.cdiv(E, 512), T)](
            sums_STE, bias_E, residual_TE, y_TE, T, E, s_residual,
            NUM_SPLITS=split.num_splits, BLOCK_E=512, **epilogue, num_warps=4, **launch_options(),
        )  # fmt: skip
    return y_TE


def example_inputs(
    T: int,
    E: int,
    D: int,
    bias: bool = False,
    residual: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    device: str = "cuda",
    seed: int = 0,
) -> dict[str, torch.Tensor | None]:
    """weight_dtype: int8 or float8_e4m3fn, which brings scales."""
    torch.manual_seed(seed)
    weight_ED = torch.randn(E, D, device=device, dtype=dtype)
    return {
        "x_TD": torch.randn(T, D, device=device, dtype=dtype),
        "weight_ED": weight_ED / D**0.5 if weight_dtype is None else (30 * weight_ED).to(weight_dtype),
        "bias_E": torch.randn(E, device=device, dtype=dtype) if bias else None,
        "residual_TE": torch.randn(T, E, device=device, dtype=dtype) if residual else None,
        "scale_E": None if weight_dtype is None else torch.rand(E, device=device) / D**0.5 / 30,
    }


LLAMA_WEIGHTS = {  # of Llama-3.1-8B and its EAGLE-3 head: outputs, inputs
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "lm_head": (128256, 4096),
    "draft lm_head": (32000, 4096),
    "fc": (4096, 12288),
    "EAGLE-3 qkv": (6144, 8192),
}
VARIANTS = [
    *[
        (linear_small_m, partial(example_inputs, T=T, E=E, D=D))
        for E, D in LLAMA_WEIGHTS.values()
        for T in (1, 8, 16, 32, 64)
    ],
    *[(linear_small_m, partial(example_inputs, T=8, E=4096, D=D, residual=True)) for D in (4096, 14336)],
    (linear_small_m, partial(example_inputs, T=8, E=4608, D=3584, bias=True)),  # qkv of Qwen2-7B
    (linear_small_m, partial(example_inputs, T=8, E=1024, D=4096)),
    *[
        (linear_small_m, partial(example_inputs, T=T, E=E, D=D, weight_dtype=weight_dtype))
        for weight_dtype in (torch.int8, torch.float8_e4m3fn)
        for E, D in [LLAMA_WEIGHTS[name] for name in ("qkv", "o", "gate_up", "down")]
        for T in (1, 8, 64, 256)
    ],
]
