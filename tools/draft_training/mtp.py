"""MiMo's multi-token prediction: one more layer inside the target's own checkpoint.

Source: XiaomiMiMo/MiMo modeling_mimo.py. The target is a Qwen2 and stays frozen.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from draft_training.checkpoint import write_mimo
from draft_training.errors import TrainingError
from draft_training.head import DraftHead, HeadOptions
from draft_training.layers import MLP, Attend, Attention, RMSNorm
from draft_training.target import QWEN2, Target, qwen2_config, require_architecture


class MtpHead(DraftHead):
    title = "MTP layer"
    objective = "CE to the token after next"
    lr = 1e-4
    ttt_length = 1

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.token_layernorm, self.hidden_layernorm, self.input_layernorm = (RMSNorm(config) for _ in range(3))
        self.post_attention_layernorm, self.final_layernorm = (RMSNorm(config) for _ in range(2))
        self.input_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.self_attn = Attention(config, config.hidden_size, qkv_bias=True)
        self.mlp = MLP(config)

    @classmethod
    def build(cls, target: Target, counts_V: Tensor, options: HeadOptions) -> "MtpHead":
        """Of the target's shape; its output starts on the scale that the target's LM head reads."""
        head = cls(target.model.config)
        with torch.no_grad():
            head.final_layernorm.weight.copy_(target.model.model.norm.weight)
        return head

    @staticmethod
    def check(config: dict) -> None:
        require_architecture(config, QWEN2)
        if (kind := qwen2_config(config).rope_parameters["rope_type"]) != "default":
            raise TrainingError(f"target: RoPE scaling {kind!r} is not trained, only plain RoPE is")

    def read(self, target: Target, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The last hidden state, and at each position the token that follows there."""
        next_BT = torch.cat([tokens_BT[:, 1:], tokens_BT[:, :1]], dim=1)  # nobody is asked about the last column
        return target.hidden_states(tokens_BT)[-1], next_BT

    def forward(self, embedding_BTD: Tensor, feature_BTD: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        embedding_BTD = embedding_BTD * (positions_T != 0)[:, None]  # as MiMo does, at position 0 only
        x_BTE = torch.cat([self.hidden_layernorm(feature_BTD), self.token_layernorm(embedding_BTD)], dim=-1)
        x_BTD = self.input_proj(x_BTE)
        y_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), positions_T, attend)
        return self.final_layernorm(y_BTD + self.mlp(self.post_attention_layernorm(y_BTD)))

    def judge(self, z_RD: Tensor, label_R: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        logits_RV = target.lm_head(z_RD).float()
        return F.cross_entropy(logits_RV, label_R, reduction="none"), logits_RV.argmax(-1) == label_R

    def describe(self, counts_V: Tensor) -> str:
        return "It lies in the target's own checkpoint, whose other weights are unchanged, and shares its vocabulary."

    def save(self, folder: Path, target: Target) -> None:
        write_mimo(folder, target, self.state_dict())
