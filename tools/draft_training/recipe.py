"""From prompts to a checkpoint: regenerate, train, estimate, save. `tools/train_draft` is this on the command line."""

import hashlib
import json
from dataclasses import dataclass, fields, replace
from itertools import chain, zip_longest
from pathlib import Path

import torch

from draft_training import loop, ranks, report
from draft_training.eagle import EagleHead
from draft_training.eagle3 import Eagle3Head
from draft_training.errors import TrainingError
from draft_training.head import DraftHead, HeadOptions, Score, training_time_test
from draft_training.mtp import MtpHead
from draft_training.samples import (
    Sample,
    collate,
    epochs,
    read_prompts,
    read_responses,
    regenerate,
    split,
    token_counts,
)
from draft_training.target import Target, read_config
from draft_training.token_map import frequent_tokens, write_token_map
from specbackend import Engine
from specbackend.models.model_config import ModelConfig

HEADS: dict[str, type[DraftHead]] = {"eagle3": Eagle3Head, "eagle": EagleHead, "mtp": MtpHead}
TOKEN_MAP = "token-map"
ALGORITHMS = (*HEADS, TOKEN_MAP)
HELD_OUT_STEPS = 5  # drafts of SGLang's default tree
"""How deep the offline estimate drafts, however long the training's unroll is."""


@dataclass(frozen=True)
class Recipe:
    """All that decides what comes out; the flags of `tools/train_draft`."""

    algorithm: str
    target: Path
    data: Path
    out: Path
    work: Path
    responses: Path | None = None  # None: regenerated into `work`
    num_prompts: int | None = None  # the first ones of `data`; None: all
    max_new_tokens: int = 512
    max_length: int = 2048  # prompt and response
    temperature: float = 0.0
    batch_size: int = 64  # of the regeneration
    holdout: float = 0.05
    epochs: int = 10
    tokens: int | None = None  # instead of epochs
    tokens_per_batch: int = 4096
    accumulate: int = 1
    lr: float | None = None  # None: as published
    warmup: int = 100
    clip: float = 0.5
    ttt_length: int | None = None  # None: as published
    decay: float = 0.8
    draft_vocab_size: int = 32000
    intermediate_size: int | None = None  # None: the target's
    fc_bias: bool = False
    feature_noise: float = 0.2
    dtype: str = "float32"
    device: str = "auto"
    seed: int = 0
    save_every: int = 200

    def command(self) -> str:
        """The command line that says the same."""
        words = ["tools/train_draft"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default and field.name != "work":
                flag = "--" + field.name.replace("_", "-")
                words += (
                    [flag] if value is True else [flag, report.shown(value) if isinstance(value, Path) else str(value)]
                )
        return " ".join(words)


@dataclass(frozen=True)
class HeadTask:
    """A head that is unrolled on the target's responses."""

    model: DraftHead
    target: Target
    samples: list[Sample]
    length: int
    decay: float

    def num_rows(self, batch: loop.Batch) -> int:
        return sum(self.samples[i].num_rows for i in batch)

    def score(self, batch: loop.Batch) -> Score:
        model, dtype = self.target.model, self.target.model.dtype
        tokens_BT, mask_BT = (x.to(model.device) for x in collate([self.samples[i] for i in batch]))
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            return training_time_test(self.model, self.target, tokens_BT, mask_BT, self.length, self.decay)


def run(recipe: Recipe) -> None:
    """Make what the recipe says. Several ranks share the prompts and the training; the first one writes the results."""
    device = ranks.local_device(recipe.device)
    recipe.work.mkdir(parents=True, exist_ok=True)
    if recipe.algorithm in HEADS:
        HEADS[recipe.algorithm].check(read_config(recipe.target))
    with ranks.group(device):
        if recipe.responses is None:
            answer_prompts(recipe, device)
        ranks.wait()
        samples = load_samples(recipe)
        if recipe.algorithm == TOKEN_MAP:
            save_token_map(recipe, samples)
        else:
            train_head(recipe, samples, device)


def answer_prompts(recipe: Recipe, device: torch.device) -> None:
    """Let the target answer this rank's share of the prompts, shortest first."""
    prompts = read_prompts(recipe.data, recipe.target)[: recipe.num_prompts]
    engine = Engine(
        model_path=str(recipe.target),
        dtype=recipe.dtype,
        device=str(device),
        context_length=min(recipe.max_length, ModelConfig.read(recipe.target).max_position_embeddings),
        max_running_requests=recipe.batch_size,
        disable_radix_cache=True,
        num_threads=torch.get_num_threads(),
    )
    prompts = sorted((prompt for prompt in prompts if len(prompt) < engine.context_length), key=len)
    mine, path = prompts[ranks.rank() :: ranks.count()], responses_path(recipe, ranks.rank())
    regenerate(engine, mine, path, recipe.max_new_tokens, recipe.temperature, recipe.seed)


def responses_path(recipe: Recipe, rank: int) -> Path:
    return recipe.work / ("responses.jsonl" if ranks.count() == 1 else f"responses-{rank}-of-{ranks.count()}.jsonl")


def load_samples(recipe: Recipe) -> list[Sample]:
    """The responses that have something to learn from."""
    paths = [recipe.responses] if recipe.responses else [responses_path(recipe, r) for r in range(ranks.count())]
    in_turns = chain.from_iterable(zip_longest(*map(read_responses, paths)))  # the order that one rank would have made
    samples = [s for s in in_turns if s and s.num_rows > 0 and s.length <= recipe.max_length]
    if not samples:
        raise TrainingError(f"responses: {', '.join(map(str, paths))}: none of two tokens or more")
    return samples


def save_token_map(recipe: Recipe, samples: list[Sample]) -> None:
    config = ModelConfig.read(recipe.target)
    counts_V = token_counts(samples, config.vocab_size)
    ids = frequent_tokens(counts_V, recipe.draft_vocab_size, list(config.eos_token_ids))
    path = write_token_map(ids, recipe.out)
    print(f"{path}: {counts_V[ids].sum() / counts_V.sum():.2%} of the response tokens")


def train_head(recipe: Recipe, samples: list[Sample], device: torch.device) -> None:
    target = Target.load(recipe.target, getattr(torch, recipe.dtype), device)
    training, held_out = split(samples, recipe.holdout, recipe.seed)
    counts_V = token_counts(training, target.model.config.vocab_size)
    torch.manual_seed(recipe.seed)
    head = HEADS[recipe.algorithm].build(target, counts_V, HeadOptions(**chosen(recipe, HeadOptions))).to(device)
    task = HeadTask(head, target, training, recipe.ttt_length or head.ttt_length, recipe.decay)
    options = loop.LoopOptions(**chosen(recipe, loop.LoopOptions) | {"lr": recipe.lr or head.lr})
    batches = plan(recipe, training)
    settings = lasting_settings(recipe, training)
    history = loop.train(task, batches, options, recipe.work / "state.pt", settings)
    if ranks.rank() == 0:
        head.save(recipe.out, target)
        history |= facts(recipe, task, counts_V, batches, options, held_out)
        (recipe.work / "history.json").write_text(json.dumps(history) + "\n")
        report.write_draft_card(recipe.out, history)


def plan(recipe: Recipe, samples: list[Sample]) -> list[loop.Batch]:
    """All batches of the training."""
    lengths, prompts = [s.length for s in samples], [len(s.prompt_ids) for s in samples]
    tokens = recipe.tokens or recipe.epochs * sum(lengths)
    return list(epochs(lengths, recipe.tokens_per_batch, tokens, recipe.seed, prompts))


def lasting_settings(recipe: Recipe, samples: list[Sample]) -> dict:
    """What a training that was interrupted has to go on with."""
    free = ("target", "data", "out", "work", "responses", "batch_size", "device", "save_every")
    settings = {field.name: getattr(recipe, field.name) for field in fields(recipe) if field.name not in free}
    digest = hashlib.sha256(json.dumps(samples).encode()).hexdigest()
    return settings | {"accumulate": recipe.accumulate * ranks.count(), "responses": digest}


def facts(
    recipe: Recipe,
    task: HeadTask,
    counts_V: torch.Tensor,
    batches: list[loop.Batch],
    options: loop.LoopOptions,
    held_out: list[Sample],
) -> dict:
    """What the card tells beside the curves."""
    head = task.model
    unrolled = f"; training-time test of {task.length} steps, step i weighted {task.decay}^i" if task.length > 1 else ""
    return {
        "title": head.title,
        "target": recipe.target.name,
        "data": report.shown(recipe.data),
        "sampling": f"at temperature {recipe.temperature}" if recipe.temperature else "greedily",
        "documents": len(task.samples) + len(held_out),
        "held_out": len(held_out),
        "held_out_accuracy": held_out_accuracy(recipe, task, held_out),
        "tokens": sum(task.samples[i].length for batch in batches for i in batch),
        "lr": options.lr,
        "parameters": sum(p.numel() for p in head.parameters()),
        "dtype": recipe.dtype,
        "description": head.describe(counts_V),
        "objective": head.objective + unrolled,
        "command": recipe.command(),
    }


def held_out_accuracy(recipe: Recipe, task: HeadTask, held_out: list[Sample]) -> list[float]:
    """Share of right drafts at each depth; empty when nothing is held out."""
    if not held_out:
        return []
    held_out_task = replace(task, samples=held_out, length=HELD_OUT_STEPS)
    batches = plan(replace(recipe, epochs=1, tokens=None), held_out)
    return loop.accuracy(held_out_task, batches)


def chosen(recipe: Recipe, options: type) -> dict:
    """The recipe's values of another dataclass's fields."""
    return {f.name: getattr(recipe, f.name) for f in fields(options) if hasattr(recipe, f.name)}
