"""Growing draft trees with a head: all levels, and what is chosen between them, in one call.

The reference is `tree_growth.TreeGrower.grow`.
"""

import functools
from collections.abc import Sequence
from ctypes import Structure, byref, c_float, c_int, c_long, c_void_p

import torch

from specbackend.kernels import cpu
from specbackend.kernels.cpu.network import Head, Linear
from specbackend.kernels.cpu.trees import Limits


class Growth(Structure):
    """logits_norm: of hidden states before the LM head, or null. token_W: the target's, of the LM head's outputs.

    lowest: temperature of a forecast (see `sampling.pick`). K nodes of a level are continued, so each request has
    W = (num_steps - 1) * K drafted rows.
    """

    _fields_ = [
        ("head", Head),
        ("lm_head", Linear),
        *[(name, c_void_p) for name in ("logits_norm", "token_W")],
        ("lowest", c_float),
        *[(name, c_long) for name in ("K", "W")],
    ]


class Requests(Structure):
    """Who is drafted for. They keep their tensors."""

    _fields_ = [
        *[(name, c_void_p) for name in ("prefix", "prefix_len", "scratch", "length", "topk", "num_steps", "seed")],
        ("temperature", c_void_p),
        ("limits", Limits),
        *[(name, c_long) for name in ("B", "L", "most_steps")],
    ]

    @classmethod
    def of(
        cls,
        prefix_slot_BL: torch.Tensor,
        prefix_len_B: torch.Tensor,
        scratch_slot_BW: torch.Tensor,
        length_B: torch.Tensor,
        topk_B: torch.Tensor,
        num_steps_B: torch.Tensor,
        seed_B: torch.Tensor,
        temperature_B: torch.Tensor | None,
        limits: Sequence[torch.Tensor],
        most_steps: int,
    ) -> "Requests":
        """What the draft and the target have computed, the trees' sizes, and how the target will pick.

        temperature_B: float32; None if all are greedy. limits: top_k_B, top_p_B and log_min_p_B of `trees.limit`, or
        nothing. The others are int64.
        """
        integers = (prefix_slot_BL, prefix_len_B, scratch_slot_BW, length_B, topk_B, num_steps_B, seed_B)
        kept = [cpu.contiguous(each) for each in (*integers, temperature_B)]
        kept_limits = [each.contiguous() for each in limits]
        limits = Limits(*map(cpu.pointer, kept_limits))
        requests = cls(*map(cpu.pointer, kept), limits, *prefix_slot_BL.shape, most_steps)
        requests.kept = (*kept, *kept_limits)
        return requests


def grow(
    growth: Growth, requests: Requests, hidden_BD: torch.Tensor, kv_S2GD: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The fields of Candidates. hidden_BD: the head's at the rows that saw the roots."""
    hidden_BD = hidden_BD.contiguous()
    B, C = requests.B, growth.K + (requests.most_steps - 1) * growth.K**2
    score_BC, (token_BC, parent_BC) = torch.empty(B, C), torch.empty(2, B, C, dtype=torch.int64).unbind()
    pointers = [each.data_ptr() for each in (hidden_BD, kv_S2GD, score_BC, token_BC, parent_BC)]
    _grow(hidden_BD.dtype)(byref(growth), byref(requests), *pointers, torch.get_num_threads())
    return score_BC, token_BC, parent_BC


@functools.cache
def _grow(dtype: torch.dtype):
    return cpu.function(f"grow_{cpu.NAMES[dtype]}", *[c_void_p] * 7, c_int)
