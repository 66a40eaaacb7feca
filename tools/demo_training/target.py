"""The target: a deep and narrow Llama trained from scratch on the chat documents."""

import math
import random
import time
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .text import VOCAB_SIZE, length_batches, pad_right

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


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine down to 2% of the peak."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def epochs(
    lengths: Sequence[int], tokens_per_batch: int, tokens: int, seed: int, prompts: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Batches of indices, epoch after epoch, until about `tokens` tokens have been handed out."""
    rng = random.Random(seed)
    while tokens > 0:
        for batch in length_batches(lengths, tokens_per_batch, rng, prompts):
            if tokens <= 0:
                return
            tokens -= sum(lengths[i] for i in batch)
            yield batch


def next_token_loss(model: LlamaForCausalLM, documents: Sequence[Sequence[int]]) -> torch.Tensor:
    """Mean cross entropy of a padded batch."""
    rows_BT = pad_right(documents, IGNORE)
    logits_BTV = model(rows_BT.clamp(min=0), use_cache=False).logits
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), rows_BT[:, 1:].flatten(), ignore_index=IGNORE)


@torch.inference_mode()
def mean_loss(model: LlamaForCausalLM, documents: Sequence[Sequence[int]]) -> float:
    """Mean cross entropy per token, one document at a time."""
    total = sum(next_token_loss(model, [d]).item() * (len(d) - 1) for d in documents)
    return total / sum(len(d) - 1 for d in documents)


def train_target(
    model: LlamaForCausalLM,
    documents: Sequence[Sequence[int]],
    tokens: int,
    lr: float = 2.5e-3,
    tokens_per_batch: int = 1024,
    seed: int = 0,
) -> dict:
    """Next-token cross entropy over whole documents; returns the history for the plot and the card."""
    batches = list(epochs([len(d) for d in documents], tokens_per_batch, tokens, seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = cosine_schedule(optimizer, len(batches), warmup=100)
    losses, start = [], time.perf_counter()
    model.train()
    for batch in (bar := tqdm(batches, desc="target", mininterval=5)):
        loss = next_token_loss(model, [documents[i] for i in batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.eval()
    return {
        "loss": losses,
        "seconds": time.perf_counter() - start,
        "tokens": tokens,
        "documents": len(documents),
        "lr": lr,
    }
