"""Forwards of a network as CUDA graphs, for decode steps that cannot be recorded whole and for short prompts.

Penalties, grammars and logprobs need the host in the middle of a step. The networks, which are nearly all of its
kernels, do not: each of their forwards in a decode step has one of a few shapes. A lone prompt is padded to one.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from specbackend.batch import ForwardBatch
from specbackend.cache.slots import DUMMY_SLOT
from specbackend.cuda_graphs import Compute, Recorder

# Of a lone prompt's forward. Up to the largest, to launch the kernels one by one takes longer than to run them.
PROMPT_WIDTHS = (16, 32, 64, 96, 128, 192, 256, 384, 512)

# What a network makes of a batch and of the hidden states that it is fed beside it, if any: tensors of T rows.
Forwards = Callable[[ForwardBatch, torch.Tensor | None], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Inputs:
    """What a recorded forward reads."""

    batch: ForwardBatch
    hidden_BQD: torch.Tensor | None  # what a head is fed

    @classmethod
    def padding(cls, B: int, Q: int, W: int, num_columns: int, hidden_size: int | None, dtype, device) -> "Inputs":
        """Nobody's rows: each sees the first of its window, and all write where nobody reads."""

        def integers(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        mask_BQW = torch.zeros(B, Q, W, dtype=torch.bool, device=device)
        mask_BQW[:, :, 0] = True
        hidden_BQD = None if hidden_size is None else torch.zeros(B, Q, hidden_size, dtype=dtype, device=device)
        batch = ForwardBatch(
            token_BQ=integers(B, Q),
            position_BQ=integers(B, Q),
            slot_BQ=torch.full((B, Q), DUMMY_SLOT, dtype=torch.int64, device=device),
            prefix_slot_BL=integers(B, num_columns),
            prefix_len_B=integers(B),
            window_slot_BW=torch.full((B, W), DUMMY_SLOT, dtype=torch.int64, device=device),
            window_mask_BQW=mask_BQW,
        )
        return cls(batch, hidden_BQD)

    def take(self, batch: ForwardBatch, hidden_TD: torch.Tensor | None) -> None:
        """Of a batch of B sequences or fewer, the rest of which stays or becomes padding."""
        B, L = batch.prefix_slot_BL.shape
        self.batch.prefix_slot_BL[:B, :L] = batch.prefix_slot_BL
        for field in fields(ForwardBatch):
            if field.name not in ("prefix_slot_BL", "window_is_causal", "row_T"):
                getattr(self.batch, field.name)[:B] = getattr(batch, field.name)
        self.batch.slot_BQ[B:] = DUMMY_SLOT
        self.batch.prefix_len_B[B:] = 0
        if self.hidden_BQD is not None:
            self.hidden_BQD[:B] = hidden_TD.view(B, *self.hidden_BQD.shape[1:])


@dataclass(frozen=True)
class Forward:
    """A recording: `replay` leaves the outputs, each with B * Q rows, until the next one."""

    inputs: Inputs
    replay: Compute
    outputs: list[torch.Tensor]


class ForwardGraphs:
    """Stands before a network's forward and replays it for the shapes that were recorded."""

    def __init__(
        self,
        forward: Forwards,
        num_columns: int,
        hidden_size: int | None,
        dtype: torch.dtype,
        device: torch.device,
        record: Recorder,
    ):
        """hidden_size: of what is fed beside the batch, None if nothing is. num_columns: of the request table."""
        self._forward, self._record_compute = forward, record
        self._padding = {"num_columns": num_columns, "hidden_size": hidden_size, "dtype": dtype, "device": device}
        self._recorded: dict[tuple[int, int], list[Forward]] = {}  # by Q and W, smaller batches first

    def record(self, batch_sizes: list[int], Q: int, W: int) -> None:
        recorded = [self._record_one(Inputs.padding(B, Q, W, **self._padding)) for B in reversed(batch_sizes)]
        self._recorded[Q, W] = recorded[::-1]

    def record_prompts(self) -> None:
        for width in reversed(PROMPT_WIDTHS):
            if (width, width) not in self._recorded:  # for decode steps of any batch
                self.record([1], width, width)

    def _record_one(self, inputs: Inputs) -> Forward:
        outputs: list[torch.Tensor] = []
        forward = self._forward  # and not `self`: a recording that held its owner would outlive the engine

        def compute() -> None:
            hidden_TD = None if inputs.hidden_BQD is None else inputs.hidden_BQD.flatten(0, 1)
            outputs[:] = forward(inputs.batch, hidden_TD)

        return Forward(inputs, self._record_compute(compute), outputs)

    def __call__(self, batch: ForwardBatch, hidden_TD: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        B, Q, W = batch.window_mask_BQW.shape
        recorded = self._recorded.get((Q, W), [])
        fitting = (forward for forward in recorded if len(forward.inputs.batch.prefix_len_B) >= B)
        forward = next(fitting, None)
        if forward is None:
            return self._forward(batch, hidden_TD)
        forward.inputs.take(batch, hidden_TD)
        forward.replay()
        return tuple(output[: B * Q].clone() for output in forward.outputs)
