"""torch.compile for decode steps; prefill runs as it is.

A target is compiled layer by layer: its layers are alike, so one compilation serves them all. A head is compiled whole.
Rows, requests and prefixes have symbolic sizes, and weights their own. A step of one request, or of one row a request,
is compiled apart, as torch gives the size 1 no symbol.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from specbackend.attention.base import AttentionPlan
from specbackend.batch import ForwardBatch
from specbackend.models.causal_draft import CausalDraftModel
from specbackend.models.draft import DraftModel
from specbackend.models.layers import DecoderLayer
from specbackend.models.llama import LlamaModel


@dataclass(frozen=True)
class StepSize:
    """The largest step that is compiled."""

    num_requests: int
    num_rows: int  # of each request

    def holds(self, shape_BQ: torch.Size) -> bool:
        B, Q = shape_BQ
        return B <= self.num_requests and Q <= self.num_rows


@dataclass(frozen=True)
class CompiledLayer:
    """A decoder layer whose small steps are compiled."""

    layer: DecoderLayer
    compiled: Callable
    largest: StepSize

    def __call__(self, x_TD, rope, slot_T, plan: AttentionPlan, kv_S2GD, shape_BQ) -> torch.Tensor:
        run = self.compiled if self.largest.holds(shape_BQ) else DecoderLayer.__call__
        return run(self.layer, x_TD, rope, slot_T, plan, kv_S2GD, shape_BQ)


@dataclass(frozen=True)
class CompiledForward:
    """A head's forward whose small steps are compiled."""

    forward: Callable
    compiled: Callable
    largest: StepSize

    def __call__(self, batch: ForwardBatch, *others) -> torch.Tensor:
        run = self.compiled if self.largest.holds(batch.token_BQ.shape) else self.forward
        return run(batch, *others)


def compile_steps(network: LlamaModel | DraftModel, largest: StepSize) -> None:
    """Compile a network in place. Compilation itself happens in the first steps of each kind."""
    if isinstance(network, CausalDraftModel):
        network = network.model
    compile_ = _compiler(network.rope.device)
    if isinstance(network, LlamaModel):
        for layer in network.layers:
            _fix_sizes(layer)
        compiled = compile_(DecoderLayer.__call__)
        network.layers = [CompiledLayer(layer, compiled, largest) for layer in network.layers]
    else:
        _fix_sizes(network)
        network.forward = CompiledForward(network.forward, compile_(network.forward), largest)


def _compiler(device: torch.device) -> Callable[[Callable], Callable]:
    """On a GPU matrix products are chosen by timing them, as SGLang does. Steps are recorded by `step_graphs`."""
    torch._dynamo.disallow_in_graph(torch.ops.mkldnn._linear_pointwise)  # Inductor takes packed weights as constants
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"
    return lambda run: torch.compile(run, dynamic=True, mode=mode)


def _fix_sizes(block: object) -> None:
    """Mark the block's weights as of sizes that do not change, unlike those of all other tensors."""
    for value in vars(block).values():
        if isinstance(value, torch.Tensor):
            torch._dynamo.mark_static(value)
        elif type(value).__module__.startswith("specbackend.models"):
            _fix_sizes(value)
