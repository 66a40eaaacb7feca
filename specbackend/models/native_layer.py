"""Decoder layers as single calls on a CPU: to call their kernels from Python takes up to a sixth of a decode step."""

import torch

from specbackend.attention.base import AttentionPlan
from specbackend.attention.native import NativePlan
from specbackend.kernels.cpu.decoder_layer import Layer, decoder_layer
from specbackend.kernels.cpu.decoder_layer import Linear as LinearPointers
from specbackend.models.draft import DraftModel
from specbackend.models.layers import DecoderLayer, RMSNorm
from specbackend.models.linear import PanelLinear
from specbackend.models.llama import LlamaModel


class NativeLayer(DecoderLayer):
    """The same as the layer it is made of, to the bit. Attention by another plan than NativePlan is called as there."""

    def __init__(self, layer: DecoderLayer):
        vars(self).update(vars(layer))
        attention, mlp = self.attention, self.mlp
        self._pointers = Layer(
            *map(_linear, (attention.qkv, attention.out, mlp.gate_up, mlp.down)),
            *map(_weight, (self.input_layernorm, attention.norm, self.post_attention_layernorm)),
            self.post_attention_layernorm.eps,
            *(attention.H, attention.G, attention.D),
        )

    @staticmethod
    def serves(layer: DecoderLayer) -> bool:
        attention, mlp = layer.attention, layer.mlp
        return all(isinstance(each, PanelLinear) for each in (attention.qkv, attention.out, mlp.gate_up, mlp.down))

    def __call__(self, x_TD, residual_TD, rope, slot_T, plan: AttentionPlan, kv_S2GD, shape_BQ) -> torch.Tensor:
        if isinstance(plan, NativePlan):
            return decoder_layer(self._pointers, plan.columns, x_TD, residual_TD, rope, slot_T, kv_S2GD)
        return super().__call__(x_TD, residual_TD, rope, slot_T, plan, kv_S2GD, shape_BQ)


def use_native_layers(model: LlamaModel, draft: DraftModel | None) -> None:
    """Put them in the place of the layers, where they serve. For when nothing replaces weights any more."""
    for network in (model, getattr(draft, "model", draft)):
        if isinstance(network, LlamaModel):
            network.layers = [_native(layer) for layer in network.layers]
        elif network:
            network.layer = _native(network.layer)


def _native(layer: DecoderLayer) -> DecoderLayer | NativeLayer:
    return NativeLayer(layer) if NativeLayer.serves(layer) else layer


def _linear(product: PanelLinear) -> LinearPointers:
    pointers = (_pointer(each) for each in (product.packed, product.scale_E, product.float_bias_E))
    return LinearPointers(*pointers, product.shape[1], product.shape[0])


def _weight(norm: RMSNorm | None) -> int | None:
    return _pointer(norm and norm.weight)


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
