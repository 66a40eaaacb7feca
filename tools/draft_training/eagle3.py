"""EAGLE-3: three hidden states in, an own LM head over part of the vocabulary out.

Source: arXiv 2503.01840 and SafeAILab/EAGLE traineagle3; names of the weights as SpecForge and SGLang publish them.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig

from draft_training.checkpoint import write_head
from draft_training.errors import TrainingError
from draft_training.head import DraftHead, HeadOptions, llama_head_config
from draft_training.layers import MLP, Attend, Attention, RMSNorm
from draft_training.target import LLAMA_LIKE, Target, require_architecture


def aux_layers(num_layers: int) -> list[int]:
    """The k for which HF's hidden_states[k] (the input of layer k) feed the draft head."""
    return [2, num_layers // 2, num_layers - 3]


def draft_vocabulary(counts_V: Tensor, size: int, required: list[int]) -> Tensor:
    """The `size` most frequent target ids, `required` ones always among them, in ascending order."""
    counts_V = counts_V.clone()
    counts_V[required] = counts_V.max() + 1
    return counts_V.argsort(descending=True, stable=True)[:size].sort().values


class Midlayer(nn.Module):
    """The single decoder layer: its attention reads embedding and feature, its residual is the feature."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = (RMSNorm(config) for _ in range(3))
        self.self_attn = Attention(config, 2 * config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, embedding_BTD: Tensor, feature_BTD: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        inputs_BTE = torch.cat([self.input_layernorm(embedding_BTD), self.hidden_norm(feature_BTD)], dim=-1)
        y_BTD = feature_BTD + self.self_attn(inputs_BTE, positions_T, attend)
        return y_BTD + self.mlp(self.post_attention_layernorm(y_BTD))


class Eagle3Head(DraftHead):
    title = "EAGLE-3 head"
    objective = "CE to the target's distribution over the draft vocabulary"
    lr = 5e-5
    ttt_length = 7

    def __init__(self, config: LlamaConfig, draft_ids_W: Tensor):
        super().__init__()
        self.config = config
        self.fc = nn.Linear(3 * config.target_hidden_size, config.hidden_size, bias=False)
        self.midlayer = Midlayer(config)
        self.norm = RMSNorm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        in_draft_V = torch.zeros(config.vocab_size, dtype=torch.bool)
        in_draft_V[draft_ids_W] = True
        self.register_buffer("d2t", draft_ids_W - torch.arange(len(draft_ids_W)))
        self.register_buffer("t2d", in_draft_V)

    @classmethod
    def build(cls, target: Target, counts_V: Tensor, options: HeadOptions) -> "Eagle3Head":
        """Its vocabulary is the most frequent response tokens, and its output starts as the target's."""
        ids_W = draft_vocabulary(counts_V, options.draft_vocab_size, target.eos_token_ids)
        fields = {"draft_vocab_size": len(ids_W), "target_hidden_size": target.model.config.hidden_size}
        config = llama_head_config(target, "LlamaForCausalLMEagle3", options.intermediate_size, **fields)
        head = cls(config, ids_W)
        with torch.no_grad():
            head.lm_head.weight.copy_(target.lm_head.weight[ids_W])
            head.norm.weight.copy_(target.model.model.norm.weight)
        return head

    @staticmethod
    def check(config: dict) -> None:
        require_architecture(config, LLAMA_LIKE)
        layers = config["num_hidden_layers"]
        if len(set(aux_layers(layers))) < 3 or layers < 7:
            raise TrainingError(
                f"target: EAGLE-3 reads the hidden states 2, n/2 and n-3 of n layers; {layers} are too few, it takes 7"
            )

    @property
    def draft_ids_W(self) -> Tensor:
        """Target id of each draft id; the checkpoint stores the difference of the two."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def read(self, target: Target, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The three hidden states side by side, and the target's logits."""
        states = target.hidden_states(tokens_BT)
        aux_BTF = torch.cat([states[k] for k in aux_layers(target.model.config.num_hidden_layers)], dim=-1)
        with torch.no_grad():
            return aux_BTF, target.lm_head(states[-1])

    def enter(self, feature_BTF: Tensor) -> Tensor:
        return self.fc(feature_BTF)

    def forward(self, embedding_BTD: Tensor, feature_BTD: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        return self.midlayer(embedding_BTD, feature_BTD, positions_T, attend)

    def judge(self, z_RD: Tensor, label_RV: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Cross entropy over the draft vocabulary. Where the target's choice lies outside of it, nothing can be learnt
        and the draft is wrong."""
        choice_R = label_RV.argmax(-1)
        teacher_RW = label_RV[:, self.draft_ids_W].float().softmax(-1)
        logits_RW = self.lm_head(self.norm(z_RD)).float()
        losses_R = F.cross_entropy(logits_RW, teacher_RW, reduction="none") * self.t2d[choice_R]
        return losses_R, self.draft_ids_W[logits_RW.argmax(-1)] == choice_R

    def describe(self, counts_V: Tensor) -> str:
        coverage = counts_V[self.draft_ids_W.cpu()].sum() / counts_V.sum()
        return (
            f"It predicts over {len(self.d2t):,} of the target's {len(self.t2d):,} tokens ({coverage:.2%} of the "
            "response tokens) and uses the target's embeddings."
        )

    def save(self, folder: Path, target: Target) -> None:
        write_head(folder, self.config, self.state_dict())
