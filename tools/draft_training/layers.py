"""What the draft heads are made of: Llama's parts, with attention left to the caller.

Letters in shapes, here and in the heads: B sequences, T positions, R rows that count, H heads, N head size, D hidden
size, F size of what a head reads of the target, V target vocabulary, W draft vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def rotate(x_BHTN: Tensor, positions_T: Tensor, theta: float) -> Tensor:
    """Rotary position embedding in Llama's half-split layout."""
    half = x_BHTN.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x_BHTN.device) / half)
    angles = positions_T[:, None] * frequencies
    low, high = x_BHTN.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x_BHTN), angles.sin().to(x_BHTN)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


class RMSNorm(nn.RMSNorm):
    """In float32, whatever comes in."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class Attention(nn.Module):
    """Grouped-query attention; the caller decides who attends to whom."""

    def __init__(self, config: PreTrainedConfig, input_size: int, qkv_bias: bool = False):
        super().__init__()
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.theta = config.rope_parameters["rope_theta"]
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.groups = queries // keys
        self.q_proj = nn.Linear(input_size, queries, bias=qkv_bias)
        self.k_proj = nn.Linear(input_size, keys, bias=qkv_bias)
        self.v_proj = nn.Linear(input_size, keys, bias=qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x_BTE: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """[B, T, input_size] -> [B, T, D]"""
        q, k, v = (
            projection(x_BTE).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, positions_T, self.theta), rotate(k, positions_T, self.theta)
        k, v = (x.repeat_interleave(self.groups, dim=1) for x in (k, v))
        return self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Llama's gated MLP."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
