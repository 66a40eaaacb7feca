"""The training loop: whatever is trained here, heads and the demo's target, is trained by it."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from tqdm import tqdm

from draft_training import ranks
from draft_training.errors import TrainingError
from draft_training.head import Score

Batch = list[int]
"""Indices of the samples that are computed at once."""


class Task(Protocol):
    """A model and what is asked of it."""

    model: nn.Module

    def num_rows(self, batch: Batch) -> int:
        """How many rows the batch's loss is summed over, known before it is computed."""

    def score(self, batch: Batch) -> Score:
        """Loss and correct rows of the batch, summed."""


@dataclass(frozen=True)
class LoopOptions:
    lr: float
    warmup: int  # steps
    clip: float = 0.5
    weight_decay: float = 0.01
    accumulate: int = 1  # batches per step and rank
    seed: int = 0
    save_every: int = 200  # steps


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine down to 2% of the peak."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Training:
    """Model, optimizer, schedule and history: all that an interrupted run needs to go on.

    There is no state of random generators among them. Each batch seeds them by its place in the whole training, so
    that neither an interruption nor the number of ranks changes what is drawn.
    """

    def __init__(self, model: nn.Module, steps: int, options: LoopOptions):
        self.model, self.options = model, options
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=options.weight_decay, fused=True
        )
        self.schedule = cosine_schedule(self.optimizer, steps, options.warmup)
        self.history: dict = {"loss": [], "accuracy": [], "seconds": 0.0}

    @property
    def steps_done(self) -> int:
        return len(self.history["loss"])

    def step(self, task: Task, batches: Sequence[Batch]) -> None:
        """Descend the mean loss over the rows of all batches. The ranks share the batches, and all end up the same."""
        start = time.perf_counter()
        num_rows = sum(task.num_rows(batch) for batch in batches)
        scores = []
        for i in range(ranks.rank(), len(batches), ranks.count()):
            torch.manual_seed((self.options.seed << 40) + self.steps_done * len(batches) + i)
            score = task.score(batches[i])
            (score.loss / num_rows).backward()
            scores.append([part.detach() for part in score])
        loss, correct_L, rows_L = (torch.stack(parts).sum(0) for parts in zip(*scores, strict=True))
        ranks.add_up([*(p.grad for p in self.model.parameters()), loss, correct_L, rows_L])
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.history["loss"].append(loss.item() / num_rows)
        self.history["accuracy"].append((correct_L / rows_L).tolist())
        self.history["seconds"] += time.perf_counter() - start

    def save(self, path: Path, settings: dict) -> None:
        """Whole or not at all: the old state stays until the new one is written."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        torch.save({"settings": settings, "history": self.history, **parts}, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def load(self, path: Path, settings: dict) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if changed := [name for name, value in settings.items() if state["settings"].get(name) != value]:
            raise TrainingError(
                f"{path} is of a training with another {', '.join(changed)}; remove it, or choose another --work"
            )
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.history = state["history"]


def train(
    task: Task, batches: Sequence[Batch], options: LoopOptions, state: Path | None = None, settings: dict | None = None
) -> dict:
    """Train on all batches, in their order; returns the history.

    With `state`, a file, an interrupted training goes on from there; `settings` are what must not have changed since.
    """
    per_step = options.accumulate * ranks.count()
    num_steps = len(batches) // per_step
    if num_steps == 0:
        raise TrainingError(f"data: {len(batches)} batches are too few for one step of {per_step}")
    training = Training(task.model, num_steps, options)
    if state and state.exists():
        training.load(state, settings)
    task.model.train()
    steps = range(training.steps_done, num_steps)
    bar = tqdm(
        steps, desc="training", initial=training.steps_done, total=num_steps, mininterval=5, disable=ranks.rank() > 0
    )
    for step in bar:
        training.step(task, batches[step * per_step : (step + 1) * per_step])
        history = training.history
        bar.set_postfix(loss=f"{history['loss'][-1]:.3f}", first=f"{history['accuracy'][-1][0]:.3f}", refresh=False)
        saves = (step + 1) % options.save_every == 0 or step + 1 == num_steps
        if state and saves and ranks.rank() == 0:
            training.save(state, settings)
    task.model.eval()
    return training.history


@torch.no_grad()
def accuracy(task: Task, batches: Sequence[Batch]) -> list[float]:
    """Share of the rows that are right, per step of the unroll."""
    _, correct_L, rows_L = (torch.stack(parts).sum(0) for parts in zip(*map(task.score, batches), strict=True))
    return (correct_L / rows_L).tolist()
