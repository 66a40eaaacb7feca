"""What the heads learn from: prompts, and the target's own responses to them."""

import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from draft_training import ranks
from draft_training.errors import TrainingError
from specbackend import Engine
from specbackend.tokenizer import Tokenizer

SUBMITTED_BATCHES = 4  # at once, so that the engine can fill the places of answers that end early


class Sample(NamedTuple):
    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_rows(self) -> int:
        """Rows that count: their token x_{t+1} and their prediction x_{t+2} are both response."""
        return len(self.response_ids) - 1


def read_prompts(path: Path, tokenizer_path: Path) -> list[list[int]]:
    """JSON lines with `prompt`, `question` or `turns`; a chat template is applied where the tokenizer has one."""
    tokenizer = Tokenizer(tokenizer_path)
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        entry = json.loads(line)
        text = entry.get("prompt") or entry.get("question") or next(iter(entry.get("turns", [])), None)
        if not text:
            raise TrainingError(f"data: line {number} of {path} has neither prompt, question nor turns")
        if tokenizer.has_chat_template:
            text = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        prompts.append(tokenizer.encode(text, add_special_tokens=not tokenizer.has_chat_template))
    return prompts


def read_responses(path: Path) -> list[Sample]:
    """What `regenerate` wrote; a line that was cut off is left out."""
    whole_lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [Sample(**json.loads(line)) for line in whole_lines]


def regenerate(
    engine: Engine, prompts: Sequence[list[int]], path: Path, max_new_tokens: int, temperature: float, seed: int
) -> None:
    """Answer all prompts in their order and add each answer to `path`. Goes on where it was interrupted.

    Prompts of like length should be neighbours, so that padding is rare.
    """
    done = read_responses(path)
    if [sample.prompt_ids for sample in done] != prompts[: len(done)]:
        raise TrainingError(f"{path} answers other prompts; remove it, or choose another --work")
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    size = SUBMITTED_BATCHES * engine.config.max_running_requests
    with (
        path.open("a") as file,
        tqdm(total=len(prompts), initial=len(done), desc="responses", mininterval=5, disable=ranks.rank() > 0) as bar,
    ):
        for start in range(len(done), len(prompts), size):
            batch = prompts[start : start + size]
            sampling = [
                {
                    "temperature": temperature,
                    "seed": seed + start + i,
                    "max_new_tokens": min(max_new_tokens, engine.context_length - len(prompt)),
                }
                for i, prompt in enumerate(batch)
            ]
            for prompt, answer in zip(batch, engine.generate(input_ids=batch, sampling_params=sampling), strict=True):
                file.write(json.dumps(Sample(prompt, answer["output_ids"])._asdict()) + "\n")
            file.flush()
            bar.update(len(batch))


def token_counts(samples: Sequence[Sample], vocab_size: int) -> Tensor:
    """How often the target says each token."""
    return torch.bincount(torch.tensor([t for s in samples for t in s.response_ids]), minlength=vocab_size)


def split(samples: Sequence[Sample], holdout: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Training samples and held-out ones."""
    shuffled = random.Random(seed).sample(samples, len(samples))
    held_out = round(holdout * len(samples))
    return shuffled[held_out:], shuffled[:held_out]


def collate(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Tokens [B, T], and the mask [B, T] of rows that count."""
    tokens_BT = pad_right([s.prompt_ids + s.response_ids for s in samples], 0)
    mask_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    for row_T, sample in zip(mask_BT, samples, strict=True):
        start = len(sample.prompt_ids) - 1
        row_T[start : start + sample.num_rows] = True
    return tokens_BT, mask_BT


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Stack rows of ids into [B, T]; causal attention never looks at padding on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=value)


def length_batches(
    lengths: Sequence[int], tokens_per_batch: int, rng: random.Random, prompts: Sequence[int] | None = None
) -> list[list[int]]:
    """Group indices of similar length (and prompt length, if given), so that padding is rare; shuffle the groups."""

    def key(i: int) -> tuple[int, float]:
        return (prompts[i] // 8 if prompts else 0), lengths[i] + rng.uniform(0, 16)

    order = sorted(range(len(lengths)), key=key)
    batches, batch, longest = [], [], 0
    for i in order:
        longest = max(longest, lengths[i])
        if batch and longest * (len(batch) + 1) > tokens_per_batch:
            batches.append(batch)
            batch, longest = [], lengths[i]
        batch.append(i)
    batches.append(batch)
    rng.shuffle(batches)
    return batches


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
