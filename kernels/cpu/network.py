"""A target from its tokens to its final norm in one call.

After a layer's weights have gone through the caches, nothing of Python or torch is left there: the first operator that
is called then takes 50 to 100 us, whatever it does.
"""

import functools
from ctypes import Array, Structure, byref, c_int, c_long, c_void_p, cast

import torch

from specbackend.kernels import cpu
from specbackend.kernels.cpu.attention import Columns
from specbackend.kernels.cpu.decoder_layer import Layer


class Network(Structure):
    """What all forwards share. It keeps its tensors, but for those that the layers point to."""

    _fields_ = [(name, c_void_p) for name in ("_layers", "_embedding", "_norm", "_rope", "_captured")] + [
        (name, c_long) for name in ("num_layers", "num_captured")
    ]

    def __init__(
        self,
        layers: list[Layer],
        embedding_VD: torch.Tensor,
        norm_D: torch.Tensor,
        rope: torch.Tensor,
        captured: tuple[int, ...],
    ):
        """rope: complex64 [positions, 1, head_dim / 2]. captured: layers whose inputs are features, in rising order."""
        self._kept = (embedding_VD.contiguous(), norm_D.contiguous(), rope.contiguous(), torch.tensor(captured).long())
        self._kept_layers: Array = (Layer * len(layers))(*layers)
        pointers = [tensor.data_ptr() for tensor in self._kept]
        super().__init__(cast(self._kept_layers, c_void_p), *pointers, len(layers), len(captured))


def network(
    network: Network,
    columns: Columns,
    token_T: torch.Tensor,
    position_T: torch.Tensor,
    slot_T: torch.Tensor,
    kv_LS2GD: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [T, D] after the final norm, and features [T, captured * D]. All rows int64 and side by side."""
    kept = [rows.contiguous() for rows in (token_T, position_T, slot_T)]
    embedding_VD = network._kept[0]
    T, D = token_T.numel(), embedding_VD.shape[1]
    hidden_TD = embedding_VD.new_empty(T, D)
    feature_TF = embedding_VD.new_empty(T, network.num_captured * D)
    pointers = [tensor.data_ptr() for tensor in (*kept, kv_LS2GD, feature_TF, hidden_TD)]
    _function(embedding_VD.dtype)(
        byref(network), byref(columns), *pointers, kv_LS2GD.stride(0), torch.get_num_threads()
    )
    return hidden_TD, feature_TF


@functools.cache
def _function(dtype: torch.dtype):
    return cpu.function(f"network_{cpu.NAMES[dtype]}", *[c_void_p] * 8, c_long, c_int)
