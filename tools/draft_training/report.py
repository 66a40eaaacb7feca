"""Loss curves and model cards."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]

DRAFT_CARD = """---
base_model: {target}{front_matter}
---
# {name}: {title} for {target}

{parameters:,} parameters in the published format. {description}

| | |
|---|---|
| Data | {documents:,} prompts of {data}, answered by the target {sampling}; {held_out} held out |
| Objective | {objective} |
| Training | {tokens:,} tokens, {steps:,} steps, AdamW, cosine from {lr}, {dtype}, {minutes:.0f} minutes |
| Loss | {loss:.3f} (mean of the last 100 steps) |
| Accuracy per step | {accuracy} |
| Estimated accept length | {estimate} |

Accuracy is the share of the held-out rows whose draft is the target's own next token, when the head drafts from its
own features for as many steps; the estimate 1 + a0 + a0 a1 + ... is that of a chain of {eval_steps} drafts.
{measured}
![Loss and accuracy](losses.png)

Made by:

```
{command}
```
"""


def shown(path: Path) -> str:
    """A path as others can read it: relative to the project, or its name alone."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def smooth(values: Sequence, window: int = 50) -> np.ndarray:
    """Running mean over the first axis."""
    sums = np.cumsum(np.concatenate([np.zeros_like(values[:1]), values]), axis=0)
    window = min(window, len(values))
    return (sums[window:] - sums[:-window]) / window


def plot(history: dict, path: Path) -> None:
    """The loss, and beside it the accuracy per step of the unroll."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5))
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        curve = smooth(history[name])
        axis.plot(np.arange(len(curve)) + len(history[name]) - len(curve), curve, linewidth=1)
        axis.set(xlabel="training step", ylabel=name)
        axis.grid(alpha=0.3)
    axes[1].legend([f"draft step {i}" for i in range(len(history["accuracy"][0]))], fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def training_facts(history: dict) -> dict:
    """What every card says about a training run."""
    return {
        "documents": history["documents"],
        "tokens": history["tokens"],
        "steps": len(history["loss"]),
        "minutes": history["seconds"] / 60,
        "lr": history["lr"],
        "loss": np.mean(history["loss"][-100:]),
    }


def write_draft_card(folder: Path, history: dict, front_matter: str = "", measured: str = "") -> None:
    """README.md and losses.png of a head, from the history that its training left.

    `front_matter` holds more lines for the card's head, `measured` a section on how the checkpoint serves.
    """
    plot(history, folder / "losses.png")
    held_out = history["held_out_accuracy"]
    told = {name: history[name] for name in ("target", "title", "parameters", "dtype", "description", "data")}
    told |= {name: history[name] for name in ("sampling", "held_out", "objective", "command")}
    card = DRAFT_CARD.format(
        name=folder.name,
        front_matter=front_matter,
        accuracy=", ".join(f"{a:.3f}" for a in held_out) or "not measured",
        estimate=f"{1 + np.cumprod(held_out).sum():.2f}" if held_out else "not measured",
        eval_steps=len(held_out),
        measured=measured,
        **told,
        **training_facts(history),
    )
    (folder / "README.md").write_text(card)
