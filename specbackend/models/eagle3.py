"""The EAGLE-3 draft head: one decoder layer over (feature, next token), with its own reduced vocabulary.

Row t consumes target feature f_t and token x_{t+1}, sits at RoPE position t and predicts x_{t+2}.
Source: SafeAILab/EAGLE cnets.py; weight names as published by EAGLE, SpecForge and SGLang.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from specbackend.attention.base import AttentionPlan
from specbackend.batch import ForwardBatch
from specbackend.cache.kv_pool import KVPool
from specbackend.errors import ConfigError
from specbackend.models.layers import Attention, GatedMLP, RMSNorm, rope_table
from specbackend.models.llama import LlamaModel
from specbackend.models.loader import Weights
from specbackend.models.model_config import ModelConfig

# Fields of a draft's config.json that would change the forward below, with the value it implements.
IMPLEMENTED = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "norm_before_residual": False,
    "norm_output": False,
}


class Eagle3Model:
    """`forward` works on hidden states of the head's own width; `fuse` makes them from the target's features."""

    num_kv_layers = 1

    def __init__(self, folder: Path, target: LlamaModel, dtype, device, num_positions: int):
        config = ModelConfig.read(folder)
        _check_config(folder, config)
        _check_pairing(folder, config, target.config)
        weights = Weights(folder, dtype, device)
        self.captured_layers = captured_layers(folder, config, target.config.num_hidden_layers)
        hidden, features = config.hidden_size, len(self.captured_layers) * target.config.hidden_size
        self.config = config
        self.fc = weights.take("fc.weight", hidden, features)
        self.input_layernorm = RMSNorm(weights, "midlayer.input_layernorm", config)
        self.hidden_norm = RMSNorm(weights, "midlayer.hidden_norm", config)
        self.attention = Attention(weights, "midlayer.self_attn", config, input_size=2 * hidden)
        self.post_attention_layernorm = RMSNorm(weights, "midlayer.post_attention_layernorm", config)
        self.mlp = GatedMLP(weights, "midlayer.mlp", config)
        self.norm = RMSNorm(weights, "norm", config)
        self._load_vocabulary(folder, weights, target)
        weights.finish()
        self.rope = rope_table(config, num_positions, device)

    def _load_vocabulary(self, folder: Path, weights: Weights, target: LlamaModel) -> None:
        """Embedding, LM head and `target_id`, the map from draft to target ids. d2t in the file holds offsets."""
        config, V = self.config, target.config.vocab_size
        draft_V = config.raw.get("draft_vocab_size") or V
        weights.discard("t2d")  # the inverse of d2t, for training
        if "embed_tokens.weight" in weights:
            self.embed_tokens = weights.take("embed_tokens.weight", V, config.hidden_size)
        elif config.hidden_size == target.config.hidden_size:
            self.embed_tokens = target.embed_tokens
        else:
            raise ConfigError(
                f"{folder}: no embed_tokens, and the target's cannot serve: "
                f"width {target.config.hidden_size}, the draft has {config.hidden_size}"
            )
        self.lm_head = weights.take("lm_head.weight", draft_V, config.hidden_size)
        self.target_id = torch.arange(draft_V, device=self.lm_head.device)
        if "d2t" in weights:
            self.target_id = self.target_id + weights.take("d2t", draft_V)
        elif draft_V != V:
            raise ConfigError(f"{folder}: draft_vocab_size is {draft_V}, the target has {V}, and d2t is missing")
        if self.target_id.min() < 0 or self.target_id.max() >= V or self.target_id.unique().numel() != draft_V:
            raise ConfigError(f"{folder}: d2t does not map to distinct ids below the target's vocabulary of {V}")

    def fuse(self, feature_TF: torch.Tensor) -> torch.Tensor:
        """Target features [T, layers * target width] to draft hidden states [T, D]."""
        return F.linear(feature_TF, self.fc)

    def forward(self, batch: ForwardBatch, hidden_TD: torch.Tensor, plan: AttentionPlan, kv_pool: KVPool):
        """One pass over T = B * Q rows; returns hidden_TD as the next drafted row consumes it."""
        embedded = F.embedding(batch.token_BQ.flatten(), self.embed_tokens)
        x = torch.cat([self.input_layernorm(embedded), self.hidden_norm(hidden_TD)], dim=-1)
        rope = self.rope[batch.position_BQ.flatten()]
        y = self.attention(x, hidden_TD, rope, batch.slot_BQ.flatten(), plan, kv_pool.layer(0), batch.token_BQ.shape)
        return self.mlp(self.post_attention_layernorm(y), y)

    def top_tokens(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k likeliest tokens after hidden [..., D]: float32 log-probabilities and target ids, both [..., k]."""
        logprob = torch.log_softmax(F.linear(self.norm(hidden), self.lm_head).float(), dim=-1)
        top_logprob, draft_id = logprob.topk(k, dim=-1)
        return top_logprob, self.target_id[draft_id]


def captured_layers(folder: Path, draft: ModelConfig, num_layers: int) -> tuple[int, ...]:
    """The target layers whose inputs the head reads, in the order it wants them.

    Two conventions: a top-level list (speculators, vLLM) names these layers; one inside eagle_config (SGLang,
    SpecForge, ModelOpt) names the layers whose output it is, one less each.
    """
    name = "eagle_aux_hidden_state_layer_ids"
    nested = (draft.raw.get("eagle_config") or {}).get(name)
    layers = draft.raw.get(name) or (nested and [layer + 1 for layer in nested])
    layers = tuple(layers or (2, num_layers // 2, num_layers - 3))
    if sorted(set(layers)) != list(layers) or not 0 <= layers[0] <= layers[-1] < num_layers:
        raise ConfigError(f"{folder}: {name} {layers} are not rising layers of a target of {num_layers}")
    return layers


def _check_config(folder: Path, config: ModelConfig) -> None:
    for name, value in IMPLEMENTED.items():
        if config.raw.get(name, value) != value:
            raise ConfigError(f"{folder}: {name}={config.raw[name]!r} is not served, only {value!r} is")


def _check_pairing(folder: Path, draft: ModelConfig, target: ModelConfig) -> None:
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(f"{folder}: made for a vocabulary of {draft.vocab_size}, the target has {target.vocab_size}")
    if target.num_hidden_layers < 7:
        raise ConfigError(f"EAGLE3 needs a target of 7 layers or more, this one has {target.num_hidden_layers}")
