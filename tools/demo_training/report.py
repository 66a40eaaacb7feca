"""Loss curves and model cards."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from eagle3_training import Eagle3Head
from torch import nn

from .text import MAX_TOKENS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COMMAND = "tools/train_demo --data gsm8k_train.jsonl --eval-data gsm8k_test.jsonl"

TARGET_CARD = """---
license: apache-2.0
language: en
datasets: [openai/gsm8k]
pipeline_tag: text-generation
---
# llama-gsm8k: the demo target

A {parameters:,}-parameter Llama (16 layers of width 128, 4 query and 2 key/value heads of size 32, MLP width 320,
vocabulary 1,024) that writes text in the style of GSM8K solutions. It is deep and narrow on purpose: like a large
model on a GPU, it spends its time per layer rather than per token, so that speculative decoding pays off on a CPU.
**It is a fixture for tests and demos: fluent, but it does not solve the problems.**

| | |
|---|---|
| Data | GSM8K train split (MIT, Copyright 2021 OpenAI), {documents:,} documents of at most {max_tokens} tokens |
| Weights | Apache-2.0, float32 |
| Tokenizer | byte-level BPE of 1,024 tokens, trained on the same split; chat template with `user` and `assistant` |
| Training | {tokens:,} tokens, {steps:,} steps, AdamW, cosine from {lr}, one CPU thread, {minutes:.0f} minutes |
| Loss | {loss:.3f} nats per token (mean of the last 100 steps); {eval_loss:.3f} on the test split |

![Loss](losses.png)

Made by:

```
{command}
```
"""

DRAFT_CARD = """---
license: apache-2.0
language: en
datasets: [openai/gsm8k]
base_model: llama-gsm8k
---
# llama-gsm8k-eagle3: an EAGLE-3 head for llama-gsm8k

A {parameters:,}-parameter EAGLE-3 head in the published format (SpecForge and SGLang names). It reads the target's
`hidden_states` {aux_layers}, predicts over {draft_vocab} of the target's 1,024 tokens ({coverage:.2%} of the response
tokens) and uses the target's embeddings.

| | |
|---|---|
| Data | {documents:,} GSM8K train questions (MIT, Copyright 2021 OpenAI), answers regenerated greedily by the target |
| Weights | Apache-2.0, float32 |
| Objective | training-time test of length {ttt_length}: sum of 0.8^i CE_i, labelled by the target's distribution |
| Training | {tokens:,} tokens, {steps:,} steps, AdamW, cosine from {lr}, one CPU thread, {minutes:.0f} minutes |
| Loss | {loss:.3f} (mean of the last 100 steps) |
| Agreement per TTT step | {accuracy} (with the target's first choice, same 100 steps) |

Accept length (tokens emitted per verification, the bonus token included) on the first {prompts} GSM8K test questions,
greedy, at most {max_new_tokens} new tokens, through `specbackend.Engine`:

| num_steps, topk, num_draft_tokens | accept length |
|---|---|
{accept_lengths}

![Loss and accuracy](losses.png)

Made by:

```
{command}
```
"""


def smooth(values: Sequence, window: int = 50) -> np.ndarray:
    """Running mean over the first axis."""
    sums = np.cumsum(np.concatenate([np.zeros_like(values[:1]), values]), axis=0)
    window = min(window, len(values))
    return (sums[window:] - sums[:-window]) / window


def plot(history: dict, path: Path) -> None:
    """The loss, and beside it the agreement per TTT step where the history has one."""
    panels = ["loss", "accuracy"] if "accuracy" in history else ["loss"]
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.5), squeeze=False)
    for axis, name in zip(axes[0], panels, strict=True):
        curve = smooth(history[name])
        axis.plot(np.arange(len(curve)) + len(history[name]) - len(curve), curve, linewidth=1)
        axis.set(xlabel="training step", ylabel=name)
        axis.grid(alpha=0.3)
    if "accuracy" in history:
        axes[0][-1].legend([f"TTT step {i}" for i in range(len(history["accuracy"][0]))], fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def parameters(model: nn.Module) -> int:
    """Number of trained weights."""
    return sum(p.numel() for p in model.parameters())


def training_facts(history: dict) -> dict:
    """What both cards say about a training run."""
    return {
        "command": COMMAND,
        "documents": history["documents"],
        "tokens": history["tokens"],
        "steps": len(history["loss"]),
        "minutes": history["seconds"] / 60,
        "lr": history["lr"],
        "loss": np.mean(history["loss"][-100:]),
    }


def write_target_card(folder: Path, model: nn.Module, results: dict) -> None:
    """README.md and losses.png of the target."""
    history = results["target_history"]
    plot(history, folder / "losses.png")
    card = TARGET_CARD.format(
        parameters=parameters(model),
        max_tokens=MAX_TOKENS,
        eval_loss=results["evaluation"]["loss"],
        **training_facts(history),
    )
    (folder / "README.md").write_text(card)


def write_draft_card(folder: Path, head: Eagle3Head, results: dict, options: argparse.Namespace) -> None:
    """README.md and losses.png of the head."""
    history, evaluation = results["head_history"], results["evaluation"]
    plot(history, folder / "losses.png")
    card = DRAFT_CARD.format(
        parameters=parameters(head),
        aux_layers=history["aux_layers"],
        draft_vocab=head.config.draft_vocab_size,
        coverage=history["coverage"],
        ttt_length=options.ttt_length,
        accuracy=", ".join(f"{a:.3f}" for a in np.mean(history["accuracy"][-100:], axis=0)),
        prompts=options.eval_prompts,
        max_new_tokens=options.eval_tokens,
        accept_lengths="\n".join(f"| {shape} | {value:.2f} |" for shape, value in evaluation["accept"].items()),
        **training_facts(history),
    )
    (folder / "README.md").write_text(card)
