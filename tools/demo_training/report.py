"""Model cards of the demo checkpoints."""

from pathlib import Path

from draft_training import report
from torch import nn

from .text import MAX_TOKENS

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

FRONT_MATTER = "\nlicense: apache-2.0\nlanguage: en\ndatasets: [openai/gsm8k]"
DATA = "the GSM8K train split (MIT, Copyright 2021 OpenAI)"
ACCEPT_LENGTHS = """
Accept length (tokens emitted per verification, the bonus token included) on the first {prompts} GSM8K test questions,
greedy, at most {max_new_tokens} new tokens, through `specbackend.Engine`:

| num_steps, topk, num_draft_tokens | accept length |
|---|---|
{rows}
"""


def write_target_card(folder: Path, model: nn.Module, history: dict, eval_loss: float) -> None:
    """README.md and losses.png of the target."""
    report.plot(history, folder / "losses.png")
    card = TARGET_CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        max_tokens=MAX_TOKENS,
        eval_loss=eval_loss,
        command=COMMAND,
        **report.training_facts(history),
    )
    (folder / "README.md").write_text(card)


def write_draft_card(folder: Path, history: dict, accept: dict[str, float], prompts: int, max_new_tokens: int) -> None:
    """The card of a head's training, with what the engine measured; `accept` goes from a tree's shape to a length."""
    rows = "\n".join(f"| {shape} | {value:.2f} |" for shape, value in accept.items())
    measured = ACCEPT_LENGTHS.format(rows=rows, prompts=prompts, max_new_tokens=max_new_tokens)
    told = history | {"target": "llama-gsm8k", "data": DATA, "command": COMMAND}
    report.write_draft_card(folder, told, front_matter=FRONT_MATTER, measured=measured)
