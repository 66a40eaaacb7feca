"""The blocks Llama-like networks are made of.

Not nn.Modules: there is nothing to train here, and a call that is a plain function costs a decode step less.
T = rows of the forward, B * Q of them; G = key-value heads.
A config here is that of one rank's part of the layers (ModelConfig.part): heads and inner width are the rank's own.
"""

import math
from functools import partial

import torch

from specbackend.attention.base import AttentionPlan
from specbackend.models.linear import linear
from specbackend.models.loader import Weights
from specbackend.models.model_config import ModelConfig, RopeScaling
from specbackend.models.operators import operators
from specbackend.models.parallel_linear import row_parallel


def rope_table(config: ModelConfig, num_positions: int, device: torch.device) -> torch.Tensor:
    """Return e^(i * position * frequency) as complex64 [num_positions, 1, head_dim / 2]."""
    pair = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequency = 1.0 / config.rope_theta ** (pair / config.head_dim)
    if config.rope_scaling:
        frequency = _scale_llama3(frequency, config.rope_scaling)
    angle = torch.arange(num_positions, dtype=torch.float32, device=device)[:, None] * frequency
    return torch.polar(torch.ones_like(angle), angle)[:, None, :]


def _scale_llama3(frequency: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Divide low frequencies by `factor`, keep high ones, blend between. Source: transformers' llama3 rope."""
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return frequency * (blend + (1 - blend) / scaling.factor)


def adjacent_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder a q or k projection from HF's rotate-half layout, pairs (i, i + D/2), to adjacent pairs (2i, 2i + 1).

    Scores do not change, as q and k are reordered alike, and RoPE becomes one complex product.
    """
    halves = weight.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).reshape(weight.shape)


class Attention:
    """Grouped-query attention with RoPE; one fused projection for q, k and v."""

    def __init__(self, weights: Weights, prefix: str, config: ModelConfig, input_size: int):
        H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.H, self.G, self.D = H, G, D
        take = partial(weights.take, split=0)
        q = take(f"{prefix}.q_proj.weight", H * D, input_size)
        k = take(f"{prefix}.k_proj.weight", G * D, input_size)
        v = take(f"{prefix}.v_proj.weight", G * D, input_size)
        qkv = torch.cat([adjacent_pairs(q, D), adjacent_pairs(k, D), v])
        qkv_bias = out_bias = self.norm = None
        if config.qkv_bias:
            q, k, v = (take(f"{prefix}.{x}_proj.bias", heads * D) for x, heads in (("q", H), ("k", G), ("v", G)))
            qkv_bias = torch.cat([adjacent_pairs(q, D), adjacent_pairs(k, D), v])
        if config.qk_norm:
            q, k = (adjacent_pairs(weights.take(f"{prefix}.{x}_norm.weight", D), D) for x in ("q", "k"))
            self.norm = RMSNorm(torch.cat([q.expand(H, D), k.expand(G, D)]), config.rms_norm_eps)
        if config.output_bias:
            out_bias = weights.take(f"{prefix}.o_proj.bias", config.hidden_size)
        self._operators = operators(qkv.device)
        self.qkv = linear(qkv, qkv_bias)
        out = weights.take(f"{prefix}.o_proj.weight", config.hidden_size, H * D, split=1)
        self.out = row_parallel(out, out_bias, weights.ranks)

    def __call__(self, x_TD, residual_TD, rope, slot_T, plan: AttentionPlan, kv_S2GD, shape_BQ) -> torch.Tensor:
        """Write the rows' K and V to their slots, attend; return residual + output, maybe in the residual's place."""
        q = self.project(x_TD, rope, slot_T, kv_S2GD)
        attended = plan.run(q.view(*shape_BQ, self.H, self.D), kv_S2GD)
        return self.out.plus_(residual_TD, attended.view(-1, self.H * self.D))

    def project(self, x_TD, rope, slot_T, kv_S2GD) -> torch.Tensor:
        """Write the rows' K and V to their slots; return q [T, H, D]."""
        qkv = self.qkv(x_TD)
        if self.norm:
            heads = qkv.view(-1, self.H + 2 * self.G, self.D)
            q_and_k, v = heads.split_with_sizes((self.H + self.G, self.G), dim=1)
            qkv = torch.cat([self.norm(q_and_k), v], dim=1).flatten(1)
        return self._operators.rope_kv_write(qkv, rope, slot_T, kv_S2GD, self.H)


class GatedMLP:
    """down(silu(gate(x)) * up(x)); gate and up in one projection."""

    def __init__(self, weights: Weights, prefix: str, config: ModelConfig):
        hidden, inner = config.hidden_size, config.intermediate_size
        take = partial(weights.take, split=0)
        gate = take(f"{prefix}.gate_proj.weight", inner, hidden)
        up = take(f"{prefix}.up_proj.weight", inner, hidden)
        gate_up_bias = down_bias = None
        if config.mlp_bias:
            gate_up_bias = torch.cat([take(f"{prefix}.{x}_proj.bias", inner) for x in ("gate", "up")])
            down_bias = weights.take(f"{prefix}.down_proj.bias", hidden)
        self._operators = operators(gate.device)
        self.gate_up = linear(torch.cat([gate, up]), gate_up_bias)
        down = weights.take(f"{prefix}.down_proj.weight", hidden, inner, split=1)
        self.down = row_parallel(down, down_bias, weights.ranks)

    def __call__(self, x_TD: torch.Tensor, residual_TD: torch.Tensor) -> torch.Tensor:
        """Return residual + MLP(x), maybe in the residual's place."""
        return self.down.plus_(residual_TD, self._operators.silu_mul(self.gate_up(x_TD)))


class RMSNorm:
    def __init__(self, weight: torch.Tensor, eps: float):
        self.weight, self.eps = weight, eps
        self._operators = operators(weight.device)

    @classmethod
    def take(cls, weights: Weights, name: str, config: ModelConfig, size: int | None = None) -> "RMSNorm":
        return cls(weights.take(f"{name}.weight", size or config.hidden_size), config.rms_norm_eps)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._operators.rms_norm(x, self.weight, self.eps)


class DecoderLayer:
    """y = residual + attention(norm(x)), then y + mlp(norm(y)). In a target x is the residual."""

    def __init__(self, weights: Weights, prefix: str, config: ModelConfig, head_input_size: int | None = None):
        """head_input_size: of x in a draft head, which norms it before, if at all."""
        self.input_layernorm = None
        if head_input_size is None:
            self.input_layernorm = RMSNorm.take(weights, f"{prefix}.input_layernorm", config)
        self.attention = Attention(weights, f"{prefix}.self_attn", config, head_input_size or config.hidden_size)
        self.post_attention_layernorm = RMSNorm.take(weights, f"{prefix}.post_attention_layernorm", config)
        self.mlp = GatedMLP(weights, f"{prefix}.mlp", config)

    def __call__(self, x_TD, residual_TD, rope, slot_T, plan: AttentionPlan, kv_S2GD, shape_BQ) -> torch.Tensor:
        """The residual may be overwritten."""
        if self.input_layernorm:
            x_TD = self.input_layernorm(x_TD)
        y_TD = self.attention(x_TD, residual_TD, rope, slot_T, plan, kv_S2GD, shape_BQ)
        return self.mlp(self.post_attention_layernorm(y_TD), y_TD)
