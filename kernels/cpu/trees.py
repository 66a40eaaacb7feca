"""What grows, builds and checks draft trees on a CPU, and picks the tokens after their nodes.

The references are those of the kernels for GPUs, `topk_logprob_ref`, `build_tree_ref`, `accept_path_ref`, and torch's
operators in `sampling.pick`, `sampling.limits` and `cache.kv_pool`.
"""

import functools
from ctypes import Structure, byref, c_float, c_int, c_long, c_void_p

import torch

from specbackend.kernels import cpu


class Limits(Structure):
    """Of B requests: int64, float64, float32; their tensors are the caller's to keep. Null: no request has any."""

    _fields_ = [(name, c_void_p) for name in ("top_k", "top_p", "log_min_p")]


def limit(
    logits_BNV: torch.Tensor,
    temperature_B: torch.Tensor,
    top_k_B: torch.Tensor,
    top_p_B: torch.Tensor,
    log_min_p_B: torch.Tensor,
) -> torch.Tensor:
    """The logits with -inf where top_k, top_p or min_p leaves a token out: `sampling.limits.Limits.apply`.

    Where the probability above a token is within a millionth of top_p, it is rounding that says whether it stays. The
    others are float32, int64 (V or more: all), float64 (1 or more: all) and float32. A temperature of 0 has no limits.
    """
    limited_BNV = logits_BNV.clone(memory_format=torch.contiguous_format)
    kept = [each.contiguous() for each in (temperature_B, top_k_B, top_p_B, log_min_p_B)]
    temperature, *others = map(cpu.pointer, kept)
    pointers = (limited_BNV.data_ptr(), temperature, byref(Limits(*others)))
    _limit(logits_BNV.dtype)(*pointers, *logits_BNV.shape, torch.get_num_threads())
    return limited_BNV


def pick(
    logits_BNV: torch.Tensor, seed_B: torch.Tensor, temperature_B: torch.Tensor | None, position_BN: torch.Tensor
) -> torch.Tensor:
    """int64 [B, N]: the best of each row once noise is added, of equals the first. See `sampling.pick.pick_from`.

    temperature_B: float32, 0 is greedy; None: all are.
    """
    (B, N), V = position_BN.shape, logits_BNV.shape[2]
    logits_BNV, index_BN = logits_BNV.contiguous(), torch.empty(B, N, dtype=torch.int64)
    noise = [cpu.contiguous(each) for each in (temperature_B, seed_B, position_BN)]
    pointers = (logits_BNV.data_ptr(), *map(cpu.pointer, noise))
    _pick(logits_BNV.dtype)(*pointers, 0, index_BN.data_ptr(), B, N, V, torch.get_num_threads())
    return index_BN


def topk_logprob(
    k: int,
    logits_BNW: torch.Tensor,
    token_W: torch.Tensor,
    lowest: float,
    seed_B: torch.Tensor,
    temperature_B: torch.Tensor | None,
    position_BN: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the k best of `sampling.forecast`, in falling order, and their tokens: [B, N, k].

    float32 and int64. Ties go to the lower index. A logit of -inf has that log-probability, too. lowest: temperature of
    a forecast. temperature_B: as in `pick`.
    """
    B, N, W = logits_BNW.shape
    assert 1 <= k <= W, f"the {k} best of {W}"
    logits_RW = logits_BNW.reshape(B * N, W)
    logits_RW = logits_RW if logits_RW.stride(1) == 1 else logits_RW.contiguous()
    noise = [cpu.contiguous(each) for each in (temperature_B, seed_B, position_BN)]
    logprob_BNK = torch.empty(B, N, k)
    token_BNK = torch.empty(B, N, k, dtype=torch.int64)
    inputs = (logits_RW.data_ptr(), token_W.data_ptr(), *map(cpu.pointer, noise), lowest)
    outputs = (logprob_BNK.data_ptr(), token_BNK.data_ptr())
    _topk_logprob(logits_RW.dtype)(*inputs, *outputs, B, N, W, k, logits_RW.stride(0), torch.get_num_threads())
    return logprob_BNK, token_BNK


def build_tree(
    root_token_B: torch.Tensor,
    score_BC: torch.Tensor,
    token_BC: torch.Tensor,
    parent_BC: torch.Tensor,
    num_nodes_B: torch.Tensor,
    most: int,
) -> tuple[torch.Tensor, ...]:
    """The fields of a DraftTree of `most` nodes, or the root and all candidates, in their order."""
    inputs = [each.contiguous() for each in (root_token_B, score_BC, token_BC, parent_BC, num_nodes_B)]
    B, C = score_BC.shape
    N = min(most, C + 1)
    token_BN, parent_BN, depth_BN = torch.empty(3, B, N, dtype=torch.int64).unbind()
    mask_BNN, drafted_BN = torch.zeros(B, N, N, dtype=torch.bool), torch.empty(B, N, dtype=torch.bool)
    tree = (token_BN, parent_BN, mask_BNN, depth_BN, drafted_BN)
    _build_tree()(*(each.data_ptr() for each in (*inputs, *tree)), B, C, N)
    return tree


def accept_path(
    token_BN: torch.Tensor, parent_BN: torch.Tensor, drafted_BN: torch.Tensor, pick_BN: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """order_BN and count_B of an AcceptedPath. A parent comes before its children."""
    inputs = [each.contiguous() for each in (token_BN, parent_BN, drafted_BN, pick_BN)]
    B, N = token_BN.shape
    order_BN, count_B = torch.empty(B, N, dtype=torch.int64), torch.empty(B, dtype=torch.int64)
    _accept_path()(*(each.data_ptr() for each in (*inputs, order_BN, count_B)), B, N)
    return order_BN, count_B


def permute_windows_(
    slots_RC: torch.Tensor, row_B: torch.Tensor, first_B: torch.Tensor, slot_BN: torch.Tensor, order_BN: torch.Tensor
) -> None:
    """slots_RC[row_B[b], first_B[b] + n] becomes slot_BN[b, order_BN[b, n]]."""
    inputs = [each.contiguous() for each in (row_B, first_B, slot_BN, order_BN)]
    B, N = order_BN.shape
    _permute_windows()(slots_RC.data_ptr(), *(each.data_ptr() for each in inputs), slots_RC.stride(0), B, N)


@functools.cache
def _limit(dtype: torch.dtype):
    return cpu.function(f"limit_{cpu.NAMES[dtype]}", *[c_void_p] * 3, *[c_long] * 3, c_int)


@functools.cache
def _pick(dtype: torch.dtype):
    name = f"pick_{cpu.NAMES[dtype]}"
    return cpu.function(name, *[c_void_p] * 4, c_long, c_void_p, *[c_long] * 3, c_int)


@functools.cache
def _topk_logprob(dtype: torch.dtype):
    name = f"topk_logprob_{cpu.NAMES[dtype]}"
    return cpu.function(name, *[c_void_p] * 5, c_float, *[c_void_p] * 2, *[c_long] * 5, c_int)


@functools.cache
def _permute_windows():
    return cpu.function("permute_windows", *[c_void_p] * 5, *[c_long] * 3)


@functools.cache
def _build_tree():
    return cpu.function("build_tree", *[c_void_p] * 10, *[c_long] * 3)


@functools.cache
def _accept_path():
    return cpu.function("accept_path", *[c_void_p] * 6, *[c_long] * 2)
