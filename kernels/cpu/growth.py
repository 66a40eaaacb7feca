"""Growing draft trees with a head: all levels, and what is chosen between them, in one call.

The reference is `tree_growth.TreeGrower.grow`.
"""

import functools
from ctypes import Structure, byref, c_float, c_int, c_long, c_void_p

import torch

from specbackend.kernels import cpu
from specbackend.kernels.cpu.network import Head, Linear


class Growth(Structure):
    """logits_norm: of hidden states before the LM head, or null. token_W: the target's, of the LM head's outputs.

    scale: of logits. K nodes of a level are continued, so each request has W = (num_steps - 1) * K drafted rows.
    """

    _fields_ = [
        ("head", Head),
        ("lm_head", Linear),
        *[(name, c_void_p) for name in ("logits_norm", "token_W")],
        ("scale", c_float),
        *[(name, c_long) for name in ("K", "W")],
    ]


def grow(
    growth: Growth,
    prefix_slot_BL: torch.Tensor,
    prefix_len_B: torch.Tensor,
    scratch_slot_BW: torch.Tensor,
    topk_B: torch.Tensor,
    num_steps_B: torch.Tensor,
    most_steps: int,
    hidden_BD: torch.Tensor,
    kv_S2GD: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """The fields of Candidates. hidden_BD: the head's at the rows that saw the roots. The rest as in TreeShapes."""
    inputs = (prefix_slot_BL, prefix_len_B, scratch_slot_BW, topk_B, num_steps_B, hidden_BD)
    inputs = [each.contiguous() for each in inputs]
    B, C = len(prefix_len_B), growth.K + (most_steps - 1) * growth.K**2
    score_BC, (token_BC, parent_BC) = torch.empty(B, C), torch.empty(2, B, C, dtype=torch.int64)
    pointers = [each.data_ptr() for each in (*inputs, kv_S2GD, score_BC, token_BC, parent_BC)]
    sizes = (B, prefix_slot_BL.shape[1], most_steps)
    _grow(hidden_BD.dtype)(byref(growth), *pointers, *sizes, torch.get_num_threads())
    return score_BC, token_BC, parent_BC


@functools.cache
def _grow(dtype: torch.dtype):
    return cpu.function(f"grow_{cpu.NAMES[dtype]}", *[c_void_p] * 11, *[c_long] * 3, c_int)
