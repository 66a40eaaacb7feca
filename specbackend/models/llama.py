"""The target: a Llama decoder from a Hugging Face checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from specbackend.attention.base import AttentionPlan
from specbackend.batch import ForwardBatch
from specbackend.cache.kv_pool import KVPool
from specbackend.errors import ConfigError
from specbackend.models.layers import Attention, GatedMLP, RMSNorm, rope_table
from specbackend.models.loader import Weights
from specbackend.models.model_config import ModelConfig

# Fields of a llama config.json that would change the forward below, with the value it implements.
IMPLEMENTED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}


@dataclass(frozen=True)
class TargetOutput:
    """hidden_TD: after the final norm. feature_TF: inputs of the captured layers side by side, None if none are."""

    hidden_TD: torch.Tensor
    feature_TF: torch.Tensor | None


class DecoderLayer:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, weights: Weights, prefix: str, config: ModelConfig):
        self.input_layernorm = RMSNorm(weights, f"{prefix}.input_layernorm", config)
        self.attention = Attention(weights, f"{prefix}.self_attn", config, input_size=config.hidden_size)
        self.post_attention_layernorm = RMSNorm(weights, f"{prefix}.post_attention_layernorm", config)
        self.mlp = GatedMLP(weights, f"{prefix}.mlp", config)

    def __call__(self, x_TD, rope, slot_T, plan: AttentionPlan, kv_S2GD, shape_BQ) -> torch.Tensor:
        x_TD = self.attention(self.input_layernorm(x_TD), x_TD, rope, slot_T, plan, kv_S2GD, shape_BQ)
        return self.mlp(self.post_attention_layernorm(x_TD), x_TD)


class LlamaModel:
    """A target network. `captured_layers` lists the layers whose inputs the draft wants as features."""

    def __init__(self, folder: Path, config: ModelConfig, dtype, device, num_positions: int):
        _check_config(folder, config)
        weights = Weights(folder, dtype, device)
        self.config = config
        self.num_kv_layers = config.num_hidden_layers
        self.captured_layers: tuple[int, ...] = ()
        self.embed_tokens = weights.take("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(weights, f"model.layers.{i}", config) for i in range(config.num_hidden_layers)]
        self.norm = RMSNorm(weights, "model.norm", config)
        if config.tie_word_embeddings:
            weights.discard("lm_head.weight")
            self.lm_head = self.embed_tokens
        else:
            self.lm_head = weights.take("lm_head.weight", config.vocab_size, config.hidden_size)
        weights.finish()
        self.rope = rope_table(config, num_positions, device)

    def forward(self, batch: ForwardBatch, plan: AttentionPlan, kv_pool: KVPool) -> TargetOutput:
        """Run all layers over the batch's T = B * Q rows, writing their K and V to the pool."""
        x_TD = F.embedding(batch.token_BQ.flatten(), self.embed_tokens)
        rope = self.rope[batch.position_BQ.flatten()]
        slot_T = batch.slot_BQ.flatten()
        captured = []
        for index, layer in enumerate(self.layers):
            if index in self.captured_layers:
                captured.append(x_TD)
            x_TD = layer(x_TD, rope, slot_T, plan, kv_pool.layer(index), batch.token_BQ.shape)
        return TargetOutput(self.norm(x_TD), torch.cat(captured, dim=-1) if captured else None)

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """[T, V] in the engine's dtype."""
        return F.linear(hidden_TD, self.lm_head)


def _check_config(folder: Path, config: ModelConfig) -> None:
    if config.architecture != "LlamaForCausalLM":
        raise ConfigError(f"{folder}: architecture {config.architecture} is not served, only LlamaForCausalLM is")
    for name, value in IMPLEMENTED.items():
        if config.raw.get(name, value) != value:
            raise ConfigError(f"{folder}: {name}={config.raw[name]!r} is not served, only {value!r} is")
