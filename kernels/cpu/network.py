"""Networks in one call each: a target from its tokens to its final norm, and a draft head.

After a layer's weights have gone through the caches, nothing of Python or torch is left there: the first operator that
is called then takes 10 to 100 us, whatever it does.
"""

import functools
from collections.abc import Sequence
from ctypes import Structure, byref, c_float, c_int, c_long, c_void_p, cast

import torch

from specbackend.kernels import cpu
from specbackend.kernels.cpu.attention import Columns


class Linear(Structure):
    """A product by a packed weight (see `linear.pack`) of E outputs and D inputs. scale and bias may be null."""

    _fields_ = [(name, c_void_p) for name in ("weight", "scale", "bias")] + [(name, c_long) for name in ("D", "E")]

    @classmethod
    def of(
        cls, packed: torch.Tensor, scale_E: torch.Tensor | None, bias_E: torch.Tensor | None, shape_ED: Sequence[int]
    ) -> "Linear":
        """The tensors are the caller's to keep, as in all that follows."""
        return cls(*map(cpu.pointer, (packed, scale_E, bias_E)), shape_ED[1], shape_ED[0])


class Layer(Structure):
    """What all rows of a layer share. head_norm: [H + G, D] or null, as input_norm may be."""

    _fields_ = [
        *[(name, Linear) for name in ("qkv", "out", "gate_up", "down")],
        *[(name, c_void_p) for name in ("input_norm", "head_norm", "post_attention_norm")],
        ("eps", c_float),
        *[(name, c_long) for name in ("H", "G", "D")],
    ]


class Network(Structure):
    """A target. rope: complex64 [positions, 1, head_dim / 2]. captured: layers whose inputs are features, rising."""

    _fields_ = [(name, c_void_p) for name in ("layers", "embedding", "norm", "rope", "captured")] + [
        (name, c_long) for name in ("num_layers", "num_captured")
    ]

    @classmethod
    def of(
        cls,
        layers: Sequence[Layer],
        embedding_VD: torch.Tensor,
        norm_D: torch.Tensor,
        rope: torch.Tensor,
        captured: Sequence[int],
    ) -> "Network":
        kept = (Layer * len(layers))(*layers), (c_long * len(captured))(*captured)
        places = cast(kept[0], c_void_p), *map(cpu.pointer, (embedding_VD, norm_D, rope)), cast(kept[1], c_void_p)
        network = cls(*places, len(layers), len(captured))
        network.kept = kept
        return network


class Head(Structure):
    """A draft head: a layer over each token's embedding and the hidden state that is fed beside it.

    With a projection of the two, which its input and residual come from; or the two are its input side by side, and
    what is fed is the residual, normed or not. Norms may be null. first_is_blank: at position 0 the embedding is 0.
    """

    _fields_ = [
        ("layer", Layer),
        ("projection", Linear),
        *[(name, c_void_p) for name in ("embedding", "token_norm", "hidden_norm", "output_norm", "rope")],
        *[(name, c_long) for name in ("hidden_first", "normed_residual", "first_is_blank")],
    ]


def network(
    network: Network,
    columns: Columns,
    token_T: torch.Tensor,
    position_T: torch.Tensor,
    slot_T: torch.Tensor,
    kv_LS2GD: torch.Tensor,
    hidden_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [T, D] after the final norm, and features [T, captured * D], in the pool's dtype.

    token_T, position_T, slot_T: int64 of any shape.
    """
    rows = [each.contiguous() for each in (token_T, position_T, slot_T)]
    T = token_T.numel()
    hidden_TD = kv_LS2GD.new_empty(T, hidden_size)
    feature_TF = kv_LS2GD.new_empty(T, network.num_captured * hidden_size)
    pointers = [each.data_ptr() for each in (*rows, kv_LS2GD, feature_TF, hidden_TD)]
    run = _network(kv_LS2GD.dtype)
    run(byref(network), byref(columns), *pointers, kv_LS2GD.stride(0), torch.get_num_threads())
    return hidden_TD, feature_TF


def head(
    head: Head,
    columns: Columns,
    token_T: torch.Tensor,
    position_T: torch.Tensor,
    slot_T: torch.Tensor,
    kv_S2GD: torch.Tensor,
    fed_TD: torch.Tensor,
) -> torch.Tensor:
    """The head's hidden states [T, D] of rows that are fed others. token_T, position_T, slot_T: as above."""
    inputs = [each.contiguous() for each in (token_T, position_T, slot_T)]
    fed_TD = fed_TD.contiguous()
    y_TD = torch.empty_like(fed_TD)
    pointers = [each.data_ptr() for each in (*inputs, kv_S2GD, fed_TD, y_TD)]
    _head(fed_TD.dtype)(byref(head), byref(columns), *pointers, torch.get_num_threads())
    return y_TD


@functools.cache
def _network(dtype: torch.dtype):
    return cpu.function(f"network_{cpu.NAMES[dtype]}", *[c_void_p] * 8, c_long, c_int)


@functools.cache
def _head(dtype: torch.dtype):
    return cpu.function(f"head_{cpu.NAMES[dtype]}", *[c_void_p] * 8, c_int)
