"""A speculative decode step with a draft head in one call, from draft to draft.

Of requests that ask for nothing but a temperature.

The reference is `tree_decoder.TreeDecoder.step`.
"""

import functools
from ctypes import Structure, byref, c_int, c_long, c_void_p

import torch

from specbackend.kernels import cpu
from specbackend.kernels.cpu.growth import Growth
from specbackend.kernels.cpu.network import Linear, Network, pointer


class TreeStep(Structure):
    """fusion: makes what the head is fed of the target's features; null if it is fed these."""

    _fields_ = [("growth", Growth), ("target", Network), ("lm_head", Linear), ("fusion", Linear)]


class State(Structure):
    """The tensors that outlast a step. They are the caller's to keep, and are written to."""

    _fields_ = [(name, c_void_p) for name in ("table_RC", "target_kv_LS2GD", "draft_kv_S2GD", "hidden_RD")] + [
        ("scratch_RW", c_void_p),
        *[(name, c_long) for name in ("table_stride", "kv_stride")],
    ]

    @classmethod
    def of(
        cls,
        table_RC: torch.Tensor,
        target_kv_LS2GD: torch.Tensor,
        draft_kv_S2GD: torch.Tensor,
        hidden_RD: torch.Tensor,
        scratch_RW: torch.Tensor,
    ) -> "State":
        """R rows of the request table: its slots, where the last feed left the head, slots of drafted rows."""
        tensors = (table_RC, target_kv_LS2GD, draft_kv_S2GD, hidden_RD, scratch_RW)
        return cls(*map(pointer, tensors), table_RC.stride(0), target_kv_LS2GD.stride(0))


class Batch(Structure):
    """Of each request its row, how many tokens are computed, its last token, its tree's sizes and how it picks.

    It keeps its tensors.
    """

    _fields_ = [
        *[(name, c_void_p) for name in ("row", "length", "root", "prefix_slots", "topk", "num_steps", "num_nodes")],
        *[(name, c_void_p) for name in ("seed", "temperature")],
        *[(name, c_long) for name in ("B", "L", "most_steps", "most_nodes", "longest_path")],
    ]

    @classmethod
    def of(
        cls,
        row_B: torch.Tensor,
        length_B: torch.Tensor,
        root_B: torch.Tensor,
        prefix_slot_BL: torch.Tensor,
        topk_B: torch.Tensor,
        num_steps_B: torch.Tensor,
        num_nodes_B: torch.Tensor,
        seed_B: torch.Tensor,
        temperature_B: torch.Tensor | None,
        most_steps: int,
        most_nodes: int,
        longest_path: int,
    ) -> "Batch":
        """temperature_B: float32; None if all are greedy. The others are int64."""
        integers = (row_B, length_B, root_B, prefix_slot_BL, topk_B, num_steps_B, num_nodes_B, seed_B)
        kept = [each.contiguous() for each in integers]
        temperature_B = None if temperature_B is None else temperature_B.contiguous()
        places = map(pointer, (*kept, temperature_B))
        batch = cls(*places, *prefix_slot_BL.shape, most_steps, most_nodes, longest_path)
        batch.kept = kept, temperature_B
        return batch


def tree_step(step: TreeStep, state: State, batch: Batch, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """token_BP and count_B of Accepted. Permutes the windows in the table, and feeds the head what was accepted."""
    num_candidates = step.growth.K + (batch.most_steps - 1) * step.growth.K**2
    token_BP = torch.empty(batch.B, min(batch.longest_path, batch.most_nodes, num_candidates + 1), dtype=torch.int64)
    count_B = torch.empty(batch.B, dtype=torch.int64)
    outputs = (token_BP.data_ptr(), count_B.data_ptr())
    _tree_step(dtype)(byref(step), byref(state), byref(batch), *outputs, torch.get_num_threads())
    return token_BP, count_B


@functools.cache
def _tree_step(dtype: torch.dtype):
    return cpu.function(f"tree_step_{cpu.NAMES[dtype]}", *[c_void_p] * 5, c_int)
