"""What grows, builds and checks draft trees, on a CPU.

The references are those of the kernels for GPUs: `topk_logprob_ref`, `build_tree_ref`, `accept_path_ref`.
"""

import functools
from ctypes import c_float, c_int, c_long, c_void_p

import torch

from specbackend.kernels import cpu


def topk_logprob(logits_RW: torch.Tensor, scale: float, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """log_softmax(logits * scale) of the k best of each row, in falling order: float32 and int64 [R, k].

    Ties go to the lower index. A logit of -inf has that log-probability, too.
    """
    R, W = logits_RW.shape
    assert 1 <= k <= W, f"the {k} best of {W}"
    logits_RW = logits_RW if logits_RW.stride(1) == 1 else logits_RW.contiguous()
    logprob_RK = torch.empty(R, k)
    index_RK = torch.empty(R, k, dtype=torch.int64)
    outputs, sizes = (logprob_RK.data_ptr(), index_RK.data_ptr()), (R, W, k, logits_RW.stride(0))
    _topk_logprob(logits_RW.dtype)(logits_RW.data_ptr(), scale, *outputs, *sizes, torch.get_num_threads())
    return logprob_RK, index_RK


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


@functools.cache
def _topk_logprob(dtype: torch.dtype):
    return cpu.function(f"topk_logprob_{cpu.NAMES[dtype]}", c_void_p, c_float, *[c_void_p] * 2, *[c_long] * 4, c_int)


@functools.cache
def _build_tree():
    return cpu.function("build_tree", *[c_void_p] * 10, *[c_long] * 3)


@functools.cache
def _accept_path():
    return cpu.function("accept_path", *[c_void_p] * 6, *[c_long] * 2)
