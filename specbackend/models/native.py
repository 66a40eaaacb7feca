"""Networks in as few calls as possible on a CPU: to call their kernels from Python takes up to a sixth of a step."""

import torch

from specbackend.attention.base import AttentionPlan
from specbackend.attention.native import NativePlan
from specbackend.batch import ForwardBatch
from specbackend.cache.kv_pool import KVPool
from specbackend.kernels.cpu.decoder_layer import Layer, decoder_layer
from specbackend.kernels.cpu.decoder_layer import Linear as LinearPointers
from specbackend.kernels.cpu.network import Network, network
from specbackend.models.causal_draft import CausalDraftModel
from specbackend.models.draft import DraftModel
from specbackend.models.layers import DecoderLayer, RMSNorm
from specbackend.models.linear import PanelLinear
from specbackend.models.llama import LlamaModel, TargetOutput


class NativeLayer(DecoderLayer):
    """The same as the layer it is made of, to the bit. Attention by another plan than NativePlan is called as there."""

    def __init__(self, layer: DecoderLayer):
        vars(self).update(vars(layer))
        attention, mlp = self.attention, self.mlp
        self.pointers = Layer(
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
            return decoder_layer(self.pointers, plan.columns, x_TD, residual_TD, rope, slot_T, kv_S2GD)
        return super().__call__(x_TD, residual_TD, rope, slot_T, plan, kv_S2GD, shape_BQ)


class NativeLlama(LlamaModel):
    """The same as the network it is made of, to the bit. Attention by another plan than NativePlan is called as there.

    Its weights and captured layers stay what they are.
    """

    def __init__(self, model: LlamaModel):
        vars(self).update(vars(model))
        pointers = [layer.pointers for layer in self.layers]
        self._network = Network(pointers, self.embed_tokens, self.norm.weight, self.rope, self.captured_layers)

    @staticmethod
    def serves(model: LlamaModel) -> bool:
        return all(isinstance(layer, NativeLayer) for layer in model.layers)

    def forward(self, batch: ForwardBatch, plan: AttentionPlan, kv_pool: KVPool) -> TargetOutput:
        if not isinstance(plan, NativePlan):
            return super().forward(batch, plan, kv_pool)
        rows = (batch.token_BQ, batch.position_BQ, batch.slot_BQ)
        hidden_TD, feature_TF = network(self._network, plan.columns, *rows, kv_pool.kv_LS2GD)
        return TargetOutput(hidden_TD, feature_TF if self.captured_layers else hidden_TD)


def native_target(model: LlamaModel) -> LlamaModel:
    """The network in one call, or as many of its layers as can be. For when nothing replaces its weights any more."""
    model.layers = [_native(layer) for layer in model.layers]
    return NativeLlama(model) if NativeLlama.serves(model) else model


def native_draft(draft: DraftModel) -> DraftModel:
    """The same of a draft, in place."""
    if isinstance(draft, CausalDraftModel):
        draft.model = native_target(draft.model)
    else:
        draft.layer = _native(draft.layer)
    return draft


def _native(layer: DecoderLayer) -> DecoderLayer:
    return NativeLayer(layer) if NativeLayer.serves(layer) else layer


def _linear(product: PanelLinear) -> LinearPointers:
    pointers = (_pointer(each) for each in (product.packed, product.scale_E, product.float_bias_E))
    return LinearPointers(*pointers, product.shape[1], product.shape[0])


def _weight(norm: RMSNorm | None) -> int | None:
    return _pointer(norm and norm.weight)


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
