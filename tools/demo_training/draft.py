"""The draft head: an EAGLE-3 head trained on the target's own responses."""

import time
from collections.abc import Sequence

import torch
from eagle3_training import Eagle3Head, aux_layers, draft_vocabulary, target_features, training_time_test
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from .target import cosine_schedule, epochs
from .text import pad_right

Sample = tuple[list[int], list[int]]
"""Prompt ids and response ids."""


def build_head(target: LlamaForCausalLM, samples: Sequence[Sample], draft_vocab_size: int) -> Eagle3Head:
    """A fresh head whose vocabulary is the most frequent response tokens and whose output starts as the target's."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLMEagle3"],
        vocab_size=target.config.vocab_size,
        draft_vocab_size=draft_vocab_size,
        hidden_size=target.config.hidden_size,
        target_hidden_size=target.config.hidden_size,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=target.config.max_position_embeddings,
        rms_norm_eps=target.config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=target.config.bos_token_id,
        eos_token_id=target.config.eos_token_id,
        dtype="float32",
    )
    counts_V = torch.bincount(torch.tensor([t for _, r in samples for t in r]), minlength=config.vocab_size)
    ids_W = draft_vocabulary(counts_V, draft_vocab_size, [config.eos_token_id])
    head = Eagle3Head(config, ids_W)
    head.lm_head.weight.data = target.lm_head.weight.data[ids_W].clone()
    head.norm.weight.data = target.model.norm.weight.data.clone()
    return head


def coverage(head: Eagle3Head, samples: Sequence[Sample]) -> float:
    """Share of the response tokens that the draft vocabulary can express."""
    tokens = torch.tensor([t for _, response in samples for t in response])
    return head.t2d[tokens].float().mean().item()


def collate(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] and the mask [B, T] of rows whose token x_{t+1} and prediction x_{t+2} are both response."""
    tokens_BT = pad_right([prompt + response for prompt, response in samples], 0)
    mask_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    for row_T, (prompt, response) in zip(mask_BT, samples, strict=True):
        row_T[len(prompt) - 1 : len(prompt) + len(response) - 2] = True
    return tokens_BT, mask_BT


def train_head(
    head: Eagle3Head,
    target: LlamaForCausalLM,
    samples: Sequence[Sample],
    tokens: int,
    ttt_length: int = 7,
    lr: float = 2e-3,
    tokens_per_batch: int = 1024,
    seed: int = 0,
) -> dict:
    """Training-time test on regenerated responses; returns the history for the plot and the card."""
    lengths, prompts = [len(p) + len(r) for p, r in samples], [len(p) for p, _ in samples]
    batches = list(epochs(lengths, tokens_per_batch, tokens, seed, prompts))
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = cosine_schedule(optimizer, len(batches), warmup=50)
    losses, accuracies, start = [], [], time.perf_counter()
    for batch in (bar := tqdm(batches, desc="draft head", mininterval=5)):
        tokens_BT, mask_BT = collate([samples[i] for i in batch])
        aux_BTF, teacher_BTV = target_features(target, tokens_BT)
        loss, accuracy = training_time_test(
            head, target.model.embed_tokens, tokens_BT, aux_BTF, teacher_BTV, mask_BT, ttt_length
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        accuracies.append(accuracy.tolist())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", first=f"{accuracies[-1][0]:.3f}", refresh=False)
    return {
        "loss": losses,
        "accuracy": accuracies,
        "seconds": time.perf_counter() - start,
        "tokens": tokens,
        "documents": len(samples),
        "lr": lr,
        "coverage": coverage(head, samples),
        "aux_layers": aux_layers(target.config.num_hidden_layers),
    }
