"""Networks in one call each on a CPU: to call their kernels from Python takes up to a sixth of a decode step.

They say the same as the networks they are made of, to the bit. Attention by another plan than NativePlan is called as
there. Weights and captured layers stay what they are.
"""

import torch

from specbackend.attention.base import AttentionPlan
from specbackend.attention.native import NativePlan
from specbackend.batch import ForwardBatch
from specbackend.cache.kv_pool import KVPool
from specbackend.kernels.cpu import pointer
from specbackend.kernels.cpu.network import Head, Layer, Network, head, network
from specbackend.kernels.cpu.network import Linear as LinearPointers
from specbackend.models.causal_draft import CausalDraftModel
from specbackend.models.draft import DraftModel
from specbackend.models.eagle import EagleModel
from specbackend.models.eagle3 import Eagle3Model
from specbackend.models.layers import DecoderLayer, RMSNorm
from specbackend.models.linear import Linear, PanelLinear
from specbackend.models.llama import LlamaModel, TargetOutput
from specbackend.models.mtp import MtpModel

AnyHead = EagleModel | Eagle3Model | MtpModel


class NativeLlama(LlamaModel):
    def __init__(self, model: LlamaModel):
        vars(self).update(vars(model))
        layers = [_layer(layer) for layer in self.layers]
        self.pointers = Network.of(layers, self.embed_tokens, self.norm.weight, self.rope, self.captured_layers)

    def forward(self, batch: ForwardBatch, plan: AttentionPlan, kv_pool: KVPool) -> TargetOutput:
        if not isinstance(plan, NativePlan):
            return super().forward(batch, plan, kv_pool)
        rows = (batch.token_BQ, batch.position_BQ, batch.slot_BQ)
        hidden_size = self.config.hidden_size
        hidden_TD, feature_TF = network(self.pointers, plan.columns, *rows, kv_pool.kv_LS2GD, hidden_size)
        return TargetOutput(hidden_TD, feature_TF if self.captured_layers else hidden_TD)


class NativeHead:
    """A HeadModel."""

    is_head = True
    num_kv_layers = 1

    def __init__(self, model: AnyHead):
        self._model, self.pointers, self.logits_norm = model, *_head(model)
        self.config, self.vocabulary, self.captured_layers = model.config, model.vocabulary, model.captured_layers

    @property
    def fusion(self) -> Linear | None:
        """What `fuse` multiplies by; None: features are fed as they are."""
        return self._model.fc if isinstance(self._model, Eagle3Model) else None

    @property
    def fuses_natively(self) -> bool:
        """Whether `fuse` is that product alone."""
        model = self._model
        has_norms = isinstance(model, Eagle3Model) and (model.feature_norms or model.fc_input_norm)
        return not has_norms and (self.fusion is None or isinstance(self.fusion, PanelLinear))

    def fuse(self, feature_TF: torch.Tensor) -> torch.Tensor:
        return self._model.fuse(feature_TF)

    def forward(self, batch: ForwardBatch, hidden_TD: torch.Tensor, plan: AttentionPlan, kv_pool: KVPool):
        if not isinstance(plan, NativePlan):
            return self._model.forward(batch, hidden_TD, plan, kv_pool)
        rows = (batch.token_BQ, batch.position_BQ, batch.slot_BQ)
        return head(self.pointers, plan.columns, *rows, kv_pool.layer(0), hidden_TD)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.logits(hidden)


def native_target(model: LlamaModel) -> LlamaModel:
    """For when nothing replaces its weights any more."""
    return NativeLlama(model) if all(_is_packed(layer) for layer in model.layers) else model


def native_draft(draft: DraftModel) -> DraftModel:
    """As above."""
    if isinstance(draft, CausalDraftModel):
        draft.model = native_target(draft.model)
        return draft
    projection = _projection(draft)
    is_packed = _is_packed(draft.layer) and (projection is None or isinstance(projection, PanelLinear))
    return NativeHead(draft) if is_packed else draft


def linear_pointers(product: PanelLinear) -> LinearPointers:
    return LinearPointers.of(product.packed, product.scale_E, product.float_bias_E, product.shape)


def _is_packed(layer: DecoderLayer) -> bool:
    attention, mlp = layer.attention, layer.mlp
    return all(isinstance(each, PanelLinear) for each in (attention.qkv, attention.out, mlp.gate_up, mlp.down))


def _layer(layer: DecoderLayer) -> Layer:
    attention, mlp = layer.attention, layer.mlp
    return Layer(
        *map(linear_pointers, (attention.qkv, attention.out, mlp.gate_up, mlp.down)),
        *map(_weight, (layer.input_layernorm, attention.norm, layer.post_attention_layernorm)),
        layer.post_attention_layernorm.eps,
        *(attention.H, attention.G, attention.D),
    )


def _head(model: AnyHead) -> tuple[Head, RMSNorm | None]:
    """And the norm before its LM head, if there is one. All of a head's norms have the same eps."""
    parts = {"layer": _layer(model.layer), "embedding": pointer(model.embed_tokens), "rope": pointer(model.rope)}
    if (projection := _projection(model)) is not None:
        parts["projection"] = linear_pointers(projection)
    match model:
        case EagleModel():
            return Head(**parts), None
        case MtpModel():
            norms = {"token_norm": model.token_layernorm, "hidden_norm": model.hidden_layernorm}
            options = {"hidden_first": True, "first_is_blank": True}
            output_norm, logits_norm = model.final_layernorm, None
        case Eagle3Model():
            norms = {"token_norm": model.input_layernorm, "hidden_norm": model.hidden_norm}
            options = {"normed_residual": model.norm_before_residual}
            output_norm, logits_norm = (model.norm, None) if model.norm_output else (None, model.norm)
    norms = {name: _weight(norm) for name, norm in {**norms, "output_norm": output_norm}.items()}
    return Head(**parts, **norms, **options), logits_norm


def _projection(model: AnyHead) -> Linear | None:
    """Of embedding and hidden state."""
    match model:
        case EagleModel():
            return model.fc
        case MtpModel():
            return model.input_proj
    return None


def _weight(norm: RMSNorm | None) -> int | None:
    return pointer(norm and norm.weight)
