"""The target: a deep and narrow Llama trained from scratch on the chat documents."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from draft_training import loop
from draft_training.head import Score
from draft_training.samples import epochs, pad_right
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .text import VOCAB_SIZE

IGNORE = -100


def build_target(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A 3M-parameter Llama whose residual projections start small, as suits 16 layers."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        initializer_range=0.05,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids, pad_token_id=tokenizer.pad_token_id)
    with torch.no_grad():
        for layer in model.model.layers:
            for residual in (layer.self_attn.o_proj, layer.mlp.down_proj):
                residual.weight /= math.sqrt(2 * config.num_hidden_layers)
    return model


@dataclass(frozen=True)
class LanguageTask:
    """Next-token cross entropy over whole documents."""

    model: LlamaForCausalLM
    documents: Sequence[Sequence[int]]

    def num_rows(self, batch: loop.Batch) -> int:
        return sum(len(self.documents[i]) - 1 for i in batch)

    def score(self, batch: loop.Batch) -> Score:
        rows_BT = pad_right([self.documents[i] for i in batch], IGNORE)
        logits_BTV = self.model(rows_BT.clamp(min=0), use_cache=False).logits[:, :-1]
        next_BT = rows_BT[:, 1:]
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), next_BT.flatten(), ignore_index=IGNORE, reduction="sum")
        correct = (logits_BTV.argmax(-1) == next_BT).sum()
        return Score(loss, correct[None], (next_BT != IGNORE).sum()[None])


@torch.inference_mode()
def mean_loss(model: LlamaForCausalLM, documents: Sequence[Sequence[int]]) -> float:
    """Mean cross entropy per token, one document at a time."""
    task = LanguageTask(model, documents)
    total = sum(task.score([i]).loss.item() for i in range(len(documents)))
    return total / task.num_rows(range(len(documents)))


def train_target(
    model: LlamaForCausalLM,
    documents: Sequence[Sequence[int]],
    tokens: int,
    lr: float = 2.5e-3,
    tokens_per_batch: int = 1024,
    seed: int = 0,
) -> dict:
    """Train from scratch; returns the history for the plot and the card."""
    batches = list(epochs([len(d) for d in documents], tokens_per_batch, tokens, seed))
    options = loop.LoopOptions(lr=lr, warmup=100, clip=1.0, weight_decay=0.1)
    history = loop.train(LanguageTask(model, documents), batches, options)
    return history | {"tokens": tokens, "documents": len(documents), "lr": lr}
