"""torch.compile for decode steps: the projections before attention, and the MLP, which are most of a step's time.

Both see rows only, so neither batch nor prefix has a part in what is compiled: there is one compilation for one row and
one for any other number, whatever the network, and the layers share them. Attention keeps its kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from specbackend.models.draft import DraftModel
from specbackend.models.layers import Attention, GatedMLP
from specbackend.models.llama import LlamaModel


@dataclass(frozen=True)
class FewRows:
    """A part of a layer that is compiled for up to `most` rows; prefill, which has more, takes it as it is."""

    part: Callable
    compiled: Callable
    most: int

    def __call__(self, x_TD: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        if len(x_TD) > self.most:
            return self.part(x_TD, *others)
        for tensor in (x_TD, *others):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return self.compiled(x_TD, *others)


def compile_steps(network: LlamaModel | DraftModel, most_rows: int, device: torch.device) -> None:
    """Compile a network in place, for forwards of up to most_rows rows; it happens when the first of them run.

    On a GPU matrix products are chosen by timing them, as SGLang has it; to record steps is left to `step_graphs`.
    """
    if device.type == "cpu":  # Inductor wants packed weights as constants
        torch._dynamo.disallow_in_graph(torch.ops.mkldnn._linear_pointwise)
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"

    def few_rows(part: Callable) -> FewRows:
        # dynamic=False: all sizes are as they are, but for the number of rows, which is marked
        return FewRows(part, torch.compile(part, dynamic=False, mode=mode), most_rows)

    _replace_parts(network, few_rows)


def _replace_parts(block: object, few_rows: Callable[[Callable], FewRows]) -> None:
    for name, value in list(vars(block).items()):
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, GatedMLP):
                setattr(block, name, few_rows(each.__call__))
            elif isinstance(each, Attention):
                each.project = few_rows(each.project)
            elif _is_ours(each):
                _replace_parts(each, few_rows)


def _is_ours(value: object) -> bool:
    return type(value).__module__.startswith("specbackend.models")
