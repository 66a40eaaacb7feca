"""EAGLE-1 and EAGLE-2, whose heads are the same: the last hidden state in, the next one out; LM head of the target.

Source: arXiv 2401.15077, 2406.16858 and SafeAILab/EAGLE cnets1.py, train/main.py.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig

from draft_training.checkpoint import write_head
from draft_training.head import DraftHead, HeadOptions, llama_head_config
from draft_training.layers import MLP, Attend, Attention, RMSNorm
from draft_training.target import LLAMA_LIKE, Target, require_architecture

CLASSIFICATION_WEIGHT = 0.1


class EagleLayer(nn.Module):
    """Llama's decoder layer without its first norm."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config, config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        y_BTD = x_BTD + self.self_attn(x_BTD, positions_T, attend)
        return y_BTD + self.mlp(self.post_attention_layernorm(y_BTD))


class EagleHead(DraftHead):
    title = "EAGLE-2 head"
    objective = (
        f"SmoothL1 to the target's next feature + {CLASSIFICATION_WEIGHT} CE to its distribution, uniform noise on the "
        "features"
    )
    lr = 3e-5
    ttt_length = 1

    def __init__(self, config: LlamaConfig, feature_noise: float):
        super().__init__()
        self.config, self.feature_noise = config, feature_noise
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.bias)
        self.layers = nn.ModuleList([EagleLayer(config)])

    @classmethod
    def build(cls, target: Target, counts_V: Tensor, options: HeadOptions) -> "EagleHead":
        config = llama_head_config(target, "LlamaForCausalLMEagle", options.intermediate_size, bias=options.fc_bias)
        return cls(config, options.feature_noise)

    @staticmethod
    def check(config: dict) -> None:
        require_architecture(config, LLAMA_LIKE)

    def read(self, target: Target, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The last hidden state is what the head reads and what it is to foresee."""
        hidden_BTD = target.hidden_states(tokens_BT)[-1]
        return hidden_BTD, hidden_BTD

    def enter(self, feature_BTF: Tensor) -> Tensor:
        """Noise makes the head robust to its own errors. Its scale is the reference's: for texts of 512 tokens."""
        if not self.training:
            return feature_BTF
        noise = (torch.rand_like(feature_BTF) - 0.5) * self.feature_noise * 512 / feature_BTF.shape[1]
        return feature_BTF + noise

    def forward(self, embedding_BTD: Tensor, feature_BTD: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        x_BTD = self.fc(torch.cat([embedding_BTD, feature_BTD], dim=-1))
        return self.layers[0](x_BTD, positions_T, attend)

    def judge(self, z_RD: Tensor, label_RD: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        teacher_RV = target.lm_head(label_RD).float()
        logits_RV = target.lm_head(z_RD).float()
        regression_R = F.smooth_l1_loss(z_RD.float(), label_RD.float(), reduction="none").mean(-1)
        classification_R = F.cross_entropy(logits_RV, teacher_RV.softmax(-1), reduction="none")
        losses_R = regression_R + CLASSIFICATION_WEIGHT * classification_R
        return losses_R, logits_RV.argmax(-1) == teacher_RV.argmax(-1)

    def describe(self, counts_V: Tensor) -> str:
        return "It foresees the target's last hidden state and uses the target's embeddings and LM head."

    def save(self, folder: Path, target: Target) -> None:
        write_head(folder, self.config, self.state_dict())
