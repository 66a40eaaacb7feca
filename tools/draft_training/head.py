"""What the algorithms have in common: a head, and how it is unrolled on itself as it will be while drafting.

Row t of a head consumes the target's feature at t and the token x_{t+1}, and predicts x_{t+2}.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from draft_training.layers import Attend
from draft_training.target import Target


@dataclass(frozen=True)
class HeadOptions:
    """What may be chosen about a head; each algorithm looks at what concerns it."""

    draft_vocab_size: int
    intermediate_size: int | None  # None: the target's
    fc_bias: bool
    feature_noise: float


class DraftHead(nn.Module):
    """One algorithm: its network, what it learns from the target, and its published files.

    The target's embeddings and LM head stay the target's and are passed in.
    """

    title: str  # for the model card
    objective: str
    lr: float  # as published
    ttt_length: int

    @staticmethod
    def check(config: dict) -> None:
        """Refuse a target by its config.json. Raises TrainingError."""
        raise NotImplementedError

    @classmethod
    def build(cls, target: Target, counts_V: Tensor, options: HeadOptions) -> "DraftHead":
        """A fresh head for a target whose responses have these counts of tokens."""
        raise NotImplementedError

    def read(self, target: Target, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """What the rows see of the target [B, T, F], and what the target itself says at each position [B, T, ...]."""
        raise NotImplementedError

    def enter(self, feature_BTF: Tensor) -> Tensor:
        """The target's feature as the head's own [B, T, D]; later steps start from the head's output instead."""
        return feature_BTF

    def forward(self, embedding_BTD: Tensor, feature_BTD: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """One drafting step; what comes out is the feature of the next one."""
        raise NotImplementedError

    def judge(self, z_RD: Tensor, label_R: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Loss of each row's output, and whether it drafts what the target would take."""
        raise NotImplementedError

    def describe(self, counts_V: Tensor) -> str:
        """Two sentences for the model card, given the counts of the response tokens."""
        raise NotImplementedError

    def save(self, folder: Path, target: Target) -> None:
        """Write the published format."""
        raise NotImplementedError


def llama_head_config(target: Target, architecture: str, intermediate_size: int | None, **fields) -> LlamaConfig:
    """A one-layer Llama config of the target's shape."""
    config = target.model.config
    return LlamaConfig(
        architectures=[architecture],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=intermediate_size or config.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None),
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]},
        tie_word_embeddings=False,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        dtype=target.model.dtype,
        **fields,
    )


class Score(NamedTuple):
    """Sums over rows, so that scores of batches add up."""

    loss: Tensor
    correct_L: Tensor  # per step of the unroll
    rows_L: Tensor


class TestTimeAttention:
    """Step 0 is causal. At step i each row also sees its own keys of steps 1..i, as it would while drafting."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, q_BHRN: Tensor, k_BHRN: Tensor, v_BHRN: Tensor) -> Tensor:
        self.keys.append(k_BHRN)
        self.values.append(v_BHRN)
        (context_k, *own_k), (context_v, *own_v) = self.keys, self.values
        rows, context = q_BHRN.shape[2], context_k.shape[2]
        q_BHRN = q_BHRN * q_BHRN.shape[-1] ** -0.5
        future_RT = torch.ones(rows, context, dtype=torch.bool, device=q_BHRN.device).triu(context - rows + 1)
        scores = (q_BHRN @ context_k.transpose(-1, -2)).masked_fill(future_RT, float("-inf"))
        own_scores = [(q_BHRN * k).sum(-1, keepdim=True) for k in own_k]
        weights = torch.cat([scores, *own_scores], dim=-1).softmax(-1, dtype=torch.float32).to(q_BHRN)
        mixed = weights[..., :context] @ context_v
        for i, v in enumerate(own_v):
            mixed = mixed + weights[..., context + i, None] * v
        return mixed


def shift(x_BT: Tensor, by: int) -> Tensor:
    """Move positions left by `by` and fill with zeros."""
    return torch.cat([x_BT[:, by:], torch.zeros_like(x_BT[:, :by])], dim=1)


def training_time_test(
    head: DraftHead, target: Target, tokens_BT: Tensor, mask_BT: Tensor, length: int, decay: float
) -> Score:
    """Unroll the head `length` steps on its own features, as it will be used to draft. EAGLE-3's training-time test;
    of length 1 it is the plain objective of EAGLE and MTP.

    mask_BT marks the rows t whose prediction x_{t+2} counts. Tokens, labels and mask move left by one per step, so
    that row t predicts x_{t+2+i}. From step 1 on a row only sees itself and the context keys, so the rows that never
    count (most of the prompts) are dropped. The loss is the sum of decay^i times the loss of step i.
    """
    first = max(0, int(mask_BT.any(0).int().argmax()) - (length - 1))
    last = tokens_BT.shape[1] - 1  # of its row nothing is known: x_{last+2} lies beyond the text
    attend = TestTimeAttention()
    feature_BTF, label_BT = head.read(target, tokens_BT)
    feature = head.enter(feature_BTF)
    loss, correct, rows = torch.zeros((), device=tokens_BT.device), [], []
    for i in range(length):
        start = first if i else 0
        positions = torch.arange(start, last + 1, device=tokens_BT.device) + i
        embedded = target.embed_tokens(shift(tokens_BT, 1 + i)[:, start:])
        feature = head(embedded, feature, positions, attend)
        if i == 0:
            feature = feature[:, first:]
        counts = mask_BT[:, first + i : last]
        labels = label_BT[:, first + i + 1 :][counts]
        losses_R, correct_R = head.judge(feature[:, : counts.shape[1]][counts], labels, target)
        loss = loss + decay**i * losses_R.sum()
        correct.append(correct_R.sum())
        rows.append(counts.sum())
    return Score(loss, torch.stack(correct), torch.stack(rows))
