"""How the axes of each tensor grow so that the network computes what it did.

The residual stream holds r = H / h copies of the original's channels side by side, so its mean square, RMSNorm and its
epsilon stay as they are. What writes to the stream writes every copy; what reads it reads all, each with a part of the
weight: 1/2, 1/4, ... which sum to 1 and are exact in every dtype. What is new beside that, heads, dimensions of a head,
neurons and tokens, has random weights and is multiplied by zero before it can matter.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from widening import WideningError
from widening.shape import Shape

NOISE = 0.02  # standard deviation of the weights that do not matter
SILENT = ("v_proj", "up_proj")  # zeros here, and attention and MLP add nothing, whatever their other weights are


@dataclass(frozen=True)
class Axis:
    """New index i is the original's index source_N[i], times scale_N[i]; -1 is new and filled by `padding`."""

    old_size: int
    source_N: Tensor
    scale_N: Tensor
    padding: Literal["noise", "zero", "mean"]

    def stretch(self, tensor: Tensor, dim: int, generator: torch.Generator) -> Tensor:
        """Grow one dimension, on the tensor's device, which is the generator's.

        It may hold several blocks of the axis side by side, as the input of an `fc` does.
        """
        blocks, rest = divmod(tensor.shape[dim], self.old_size)
        if rest:
            raise WideningError(f"a dimension of {tensor.shape[dim]} is not made of blocks of {self.old_size}")
        first_B1 = torch.arange(blocks)[:, None] * self.old_size
        source = (first_B1 + self.source_N.clamp(min=0)).flatten().to(tensor.device)
        scale = self.scale_N.repeat(blocks).view([-1] + [1] * (tensor.dim() - 1 - dim)).to(tensor.device)
        wide = tensor.index_select(dim, source).mul_(scale)
        padded = (self.source_N < 0).repeat(blocks).nonzero().flatten().to(tensor.device)
        if self.padding == "noise":
            shape = [*wide.shape[:dim], len(padded), *wide.shape[dim + 1 :]]
            noise = torch.randn(shape, generator=generator, device=tensor.device)
            return wide.index_copy_(dim, padded, noise.mul_(NOISE))
        wide.index_fill_(dim, padded, 0)
        return wide.index_add_(dim, padded, self._mean(tensor, dim, padded)) if self.padding == "mean" else wide

    @staticmethod
    def _mean(tensor: Tensor, dim: int, padded: Tensor) -> Tensor:
        shape = [-1] * tensor.dim()
        shape[dim] = len(padded)
        return tensor.mean(dim, keepdim=True).expand(shape)


class Layout:
    """The axes of every tensor, by the module it belongs to: the same in targets, EAGLE heads and MTP layers."""

    def __init__(self, old: Shape, new: Shape):
        copy_H = torch.arange(new.hidden_size) // old.hidden_size
        channel_H = torch.arange(new.hidden_size) % old.hidden_size
        written = Axis(old.hidden_size, channel_H, torch.ones(new.hidden_size), "zero")
        read = Axis(old.hidden_size, channel_H, _parts(new.hidden_size // old.hidden_size)[copy_H], "zero")
        q_heads = _heads(old, new, old.group_size, new.group_size)
        kv_heads = _heads(old, new, 1, 1)
        # attention divides by the root of the new head size
        q = _head_axis(q_heads, old.head_dim, new.head_dim, "noise", scale=math.sqrt(new.head_dim / old.head_dim))
        k = _head_axis(kv_heads, old.head_dim, new.head_dim, "zero")
        v = _head_axis(kv_heads, old.head_dim, new.head_dim, "noise")
        attended = _head_axis(q_heads, old.head_dim, new.head_dim, "zero")
        neuron, activation = (_longer(old.intermediate_size, new.intermediate_size, fill) for fill in ("noise", "zero"))
        token = _longer(old.vocab_size, new.vocab_size, "noise")
        self._norm = (written,)
        self._axes = {
            "embed_tokens": (token, written),
            "q_proj": (q, read),
            "k_proj": (k, read),
            "v_proj": (v, read),
            "o_proj": (written, attended),
            "gate_proj": (neuron, read),
            "up_proj": (neuron, read),
            "down_proj": (written, activation),
            "fc": (written, read),
            "input_proj": (written, read),
            # a mean of logits is below their largest, so a new token is never the first choice
            "lm_head": (_longer(old.num_drafted, new.num_drafted, "mean"), read),
        }

    def widen(self, name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
        """A weight or bias, in float32."""
        module = module_of(name)
        if module not in self._axes and "norm" not in name:
            raise WideningError(f"{name}: a tensor of an unknown kind")
        tensor = tensor.float()
        for dim, axis in enumerate(self._axes.get(module, self._norm)[: tensor.dim()]):
            tensor = axis.stretch(tensor, dim, generator)
        return tensor


def module_of(name: str) -> str:
    """'q_proj' of 'model.layers.0.self_attn.q_proj.weight'."""
    return name.split(".")[-2] if "." in name else name


def make_identity_(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """In place, a widened tensor of any layer as that of one which costs its time and changes nothing."""
    if module_of(name) in SILENT or name.endswith(".bias"):
        return tensor.zero_()
    return tensor if "norm" in name else tensor.normal_(0, NOISE, generator=generator)


def _parts(count: int) -> Tensor:
    """`count` powers of two that sum to 1."""
    parts = [1.0]
    while len(parts) < count:
        half = parts.pop(0) / 2
        parts += [half, half]
    return torch.tensor(parts)


def _longer(old: int, new: int, padding: str) -> Axis:
    index_N = torch.arange(new)
    return Axis(old, index_N.where(index_N < old, -1), torch.ones(new), padding)


def _heads(old: Shape, new: Shape, old_group: int, new_group: int) -> Tensor:
    """The original's head at each place, -1 for a new one: groups grow at their ends, and new groups follow."""
    head = torch.full((new.num_key_value_heads, new_group), -1)
    head[: old.num_key_value_heads, :old_group] = torch.arange(old.num_key_value_heads * old_group).view(-1, old_group)
    return head.flatten()


def _head_axis(heads_H: Tensor, old_dim: int, new_dim: int, padding: str, scale: float = 1.0) -> Axis:
    """Dimension i of each half of a head goes to i * D / d, where RoPE turns at the same frequency."""
    dim = torch.full((2, new_dim // 2), -1)
    dim[:, :: new_dim // old_dim] = torch.arange(old_dim).view(2, -1)
    dim_D, head_H1 = dim.flatten(), heads_H[:, None]
    source = torch.where((head_H1 >= 0) & (dim_D >= 0), head_H1 * old_dim + dim_D, -1).flatten()
    return Axis(int(heads_H.max() + 1) * old_dim, source, torch.full(source.shape, scale), padding)
