"""The EAGLE-3 draft head: one decoder layer over (feature, next token), with its own reduced vocabulary.

The feature is the inputs of three of the target's layers, fused by `fc`. Official heads, SGLang's and SpecForge's
exports, NVIDIA ModelOpt's and vLLM's speculators name and configure the same network in different ways.
Source: SafeAILab/EAGLE cnets.py; EAGLE-3.1's extra norms: SGLang and vLLM `llama_eagle3.py`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from specbackend.attention.base import AttentionPlan
from specbackend.batch import ForwardBatch
from specbackend.cache.kv_pool import KVPool
from specbackend.errors import ConfigError
from specbackend.models.draft import (
    DraftVocabulary,
    check_one_layer,
    check_pairing,
    finish_draft,
    shaped_by_file,
    take_embedding,
)
from specbackend.models.layers import DecoderLayer, RMSNorm, rope_table
from specbackend.models.linear import linear
from specbackend.models.llama import LlamaModel
from specbackend.models.loader import Weights
from specbackend.models.model_config import ModelConfig
from specbackend.models.parallel_linear import vocabulary_parallel

# Entries of ModelOpt's `eagle_config` that would change the network, with the value that is implemented.
MODELOPT = {
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "parallel_draft_step": 1,
}
SGLANG_FC_NORMS = {"aux_norm_low": "fc_norm.0", "aux_norm_mid": "fc_norm.1", "aux_norm_high": "fc_norm.2"}


@dataclass(frozen=True)
class Eagle3Config:
    """A head's options beyond the shape of its layer."""

    layer: ModelConfig
    captured_layers: tuple[int, ...]  # of the target, in the order `fc` wants them; none: its final hidden state
    draft_vocab_size: int
    norm_before_residual: bool  # the residual is the normed feature instead of the feature itself
    norm_output: bool  # a drafted row's feature is taken after the final norm instead of before

    @classmethod
    def read(cls, folder: Path, target: ModelConfig) -> "Eagle3Config":
        layer = ModelConfig.read(folder)
        raw, modelopt = layer.raw, layer.raw.get("eagle_config") or {}
        layer.check_implemented(folder)
        for name, value in MODELOPT.items():
            if modelopt.get(name, value) != value:
                raise ConfigError(f"{folder}: eagle_config.{name}={modelopt[name]!r} is not served, only {value!r} is")
        is_speculators = "speculators_model_type" in raw
        if is_speculators and raw["speculators_model_type"] != "eagle3":
            raise ConfigError(f"{folder}: speculators_model_type {raw['speculators_model_type']!r} is not eagle3")
        return cls(
            layer=layer,
            captured_layers=captured_layers(folder, raw, target.num_hidden_layers),
            draft_vocab_size=raw.get("draft_vocab_size") or target.vocab_size,
            norm_before_residual=raw.get("norm_before_residual", is_speculators),
            norm_output=raw.get("norm_output", False),
        )


class Eagle3Model:
    """`forward` works on hidden states of the head's own width; `fuse` makes them from the target's features."""

    num_kv_layers = 1
    is_head = True

    def __init__(self, folder: Path, target: LlamaModel, dtype, device, num_positions: int):
        options = Eagle3Config.read(folder, target.config)
        check_pairing(folder, options.layer, target.config)
        weights = Weights(folder, dtype, device, rename=canonical_name, ranks=target.ranks)
        check_one_layer(weights)
        config = shaped_by_file(options.layer.part(folder, target.ranks.size), weights, "midlayer")
        hidden = config.hidden_size
        self.config, self.captured_layers = config, options.captured_layers
        self.norm_before_residual, self.norm_output = options.norm_before_residual, options.norm_output
        self._load_fusion(weights, target.config.hidden_size)
        self.input_layernorm = RMSNorm.take(weights, "midlayer.input_layernorm", config)
        self.hidden_norm = RMSNorm.take(weights, "midlayer.hidden_norm", config)
        self.layer = DecoderLayer(weights, "midlayer", config, head_input_size=2 * hidden)
        self.norm = RMSNorm.take(weights, "norm", config)
        self.embed_tokens = take_embedding(weights, config, target)
        self.vocabulary = _load_vocabulary(weights, options, target)
        finish_draft(weights)
        self.rope = rope_table(config, num_positions, device)

    def _load_fusion(self, weights: Weights, target_width: int) -> None:
        """`fc` and the norms before it: one per feature (3.1) or one over all, if the file or the config has them.

        A head that is fed the final hidden state has no `fc`.
        """
        config, hidden, count = self.config, self.config.hidden_size, len(self.captured_layers)
        if count == 0 and hidden != target_width:
            raise ConfigError(f"{weights.folder}: without fc its width of {hidden} must be the target's {target_width}")
        self.feature_norms, self.fc_input_norm = [], None
        names = [f"fc_norm.{i}" for i in range(count)]
        if config.raw.get("fc_norm") or config.raw.get("use_aux_norm") or any(f"{n}.weight" in weights for n in names):
            self.feature_norms = [RMSNorm.take(weights, name, config, target_width) for name in names]
        if config.raw.get("norm_before_fc") or "input_norm.weight" in weights:
            self.fc_input_norm = RMSNorm.take(weights, "input_norm", config, count * target_width)
        fc_bias = weights.take_if_there("fc.bias", hidden)
        self.fc = linear(weights.take("fc.weight", hidden, count * target_width), fc_bias) if count else None

    def fuse(self, feature_TF: torch.Tensor) -> torch.Tensor:
        """Target features [T, layers * target width] to draft hidden states [T, D]."""
        if self.fc is None:
            return feature_TF
        if self.feature_norms:
            chunks = feature_TF.chunk(len(self.feature_norms), dim=-1)
            feature_TF = torch.cat([norm(x) for norm, x in zip(self.feature_norms, chunks, strict=True)], dim=-1)
        if self.fc_input_norm:
            feature_TF = self.fc_input_norm(feature_TF)
        return self.fc(feature_TF)

    def forward(self, batch: ForwardBatch, hidden_TD: torch.Tensor, plan: AttentionPlan, kv_pool: KVPool):
        embedded = F.embedding(batch.token_BQ.flatten(), self.embed_tokens)
        normed_TD = self.hidden_norm(hidden_TD)
        x = torch.cat([self.input_layernorm(embedded), normed_TD], dim=-1)
        residual_TD = normed_TD if self.norm_before_residual else hidden_TD.clone()  # it may be overwritten
        rope, slot_T = self.rope[batch.position_BQ.flatten()], batch.slot_BQ.flatten()
        y = self.layer(x, residual_TD, rope, slot_T, plan, kv_pool.layer(0), batch.token_BQ.shape)
        return self.norm(y) if self.norm_output else y

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.vocabulary.logits(hidden if self.norm_output else self.norm(hidden))


def canonical_name(name: str) -> str:
    """The official name of a tensor that others call `model.x`, `layers.0.x`, `midlayer.0.x` or `aux_norm_low.x`."""
    name = name.removeprefix("model.")
    for prefix in ("layers.0.", "midlayer.0."):
        if name.startswith(prefix):
            return "midlayer." + name.removeprefix(prefix)
    module, _, rest = name.partition(".")
    return f"{SGLANG_FC_NORMS.get(module, module)}.{rest}" if rest else name


def _load_vocabulary(weights: Weights, options: Eagle3Config, target: LlamaModel) -> DraftVocabulary:
    """d2t in the file holds offsets: target id = draft id + d2t[draft id]. t2d is its inverse, for training."""
    W, V, D, folder = options.draft_vocab_size, target.config.vocab_size, options.layer.hidden_size, weights.folder
    weights.discard("t2d")
    whole = DraftVocabulary.of_target(target)
    target_id_W = whole.target_id_W[:W]
    if "d2t" in weights:
        target_id_W = target_id_W + weights.take("d2t", W)
    elif W != V:
        raise ConfigError(f"{folder}: draft_vocab_size is {W}, the target has {V}, and d2t is missing")
    low, high, is_float = int(target_id_W.min()), int(target_id_W.max()), target_id_W.is_floating_point()
    if is_float or not 0 <= low <= high < V or target_id_W.unique().numel() != W:
        raise ConfigError(
            f"{folder}: d2t maps to ids from {low} to {high}, which are not {W} distinct ids of the target's "
            f"vocabulary of {V}"
        )
    is_whole = whole.lm_head.shape == (W, D) and target_id_W.equal(whole.target_id_W)
    if is_whole and "lm_head.weight" not in weights:
        return whole
    return DraftVocabulary(vocabulary_parallel(weights.take("lm_head.weight", W, D), target.ranks), target_id_W)


def captured_layers(folder: Path, raw: dict, num_layers: int) -> tuple[int, ...]:
    """The target layers whose inputs the head reads, in the order it wants them.

    Two conventions: a top-level list (speculators, vLLM) names these layers; one inside eagle_config (SGLang,
    SpecForge, ModelOpt) names the layers whose output it is, one less each.
    """
    name, nested = "eagle_aux_hidden_state_layer_ids", raw.get("eagle_config") or {}
    if not nested.get("use_aux_hidden_state", raw.get("use_aux_hidden_state", True)):
        return ()
    layers = raw.get(name) or [layer + 1 for layer in nested.get(name) or ()]
    if not layers and num_layers < 7:
        raise ConfigError(
            f"{folder}: EAGLE3 reads three inner layers of a target of 7 layers or more, this one has {num_layers}"
        )
    layers = tuple(layers or (2, num_layers // 2, num_layers - 3))
    if sorted(set(layers)) != list(layers) or not 0 <= layers[0] <= layers[-1] < num_layers:
        raise ConfigError(f"{folder}: {name} {layers} are not rising layers of a target of {num_layers}")
    return layers
