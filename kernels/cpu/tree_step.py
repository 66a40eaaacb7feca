"""A speculative decode step with a draft head in one call, for requests with a temperature and limits alone.

The reference is `tree_decoder.TreeDecoder.step`.
"""

import functools
from ctypes import Structure, addressof, byref, c_double, c_float, c_int, c_long, c_void_p

import torch

from specbackend.kernels import cpu
from specbackend.kernels.cpu.growth import Growth
from specbackend.kernels.cpu.network import Linear, Network
from specbackend.kernels.cpu.trees import Limits

LIMIT_TYPES = c_long, c_double, c_float


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
        return cls(*map(cpu.pointer, tensors), table_RC.stride(0), target_kv_LS2GD.stride(0))


class Batch(Structure):
    """Of each request its row, how many tokens are computed, its last token, its tree's sizes and how it picks.

    From lists, as to make a tensor takes longer than all of the step that is neither a product nor attention.
    """

    _fields_ = [
        *[(name, c_void_p) for name in ("row", "length", "root", "topk", "num_steps", "num_nodes", "seed")],
        ("temperature", c_void_p),
        ("limits", Limits),
        *[(name, c_long) for name in ("B", "L", "most_steps", "most_nodes", "longest_path")],
    ]

    @classmethod
    def of(
        cls,
        rows: list[int],
        lengths: list[int],
        roots: list[int],
        topks: list[int],
        num_steps: list[int],
        num_nodes: list[int],
        longest_path: int,
        seeds: list[int],
        temperatures: list[float],
        limits: list[tuple[int, float, float]],
    ) -> "Batch":
        """longest_path: of any of the trees. seeds: as int64. A temperature of 0 is greedy.

        limits: top_k, top_p and the logarithm of min_p of each request, as in `trees.limit`.
        """
        B = len(rows)
        kept = [(c_long * B)(*values) for values in (rows, lengths, roots, topks, num_steps, num_nodes, seeds)]
        kept.append((c_float * B)(*temperatures))
        kept_limits = [(kind * B)(*values) for kind, values in zip(LIMIT_TYPES, zip(*limits, strict=True), strict=True)]
        sizes = (B, max(lengths), max(num_steps), max(num_nodes), longest_path)
        batch = cls(*map(addressof, kept), Limits(*map(addressof, kept_limits)), *sizes)
        batch.kept = (*kept, *kept_limits)
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
