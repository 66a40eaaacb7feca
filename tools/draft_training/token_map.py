"""FR-Spec's token map: the tokens that a draft may propose. Format of thunlp/FR-Spec (arXiv 2502.14856)."""

from pathlib import Path

import torch
from torch import Tensor

from draft_training.errors import TrainingError


def frequent_tokens(counts_V: Tensor, size: int, eos_token_ids: list[int]) -> list[int]:
    """The `size` most frequent ids, most frequent first; eos ids that are not among them replace the last ones."""
    if size > len(counts_V):
        raise TrainingError(f"draft_vocab_size: {size} is more than the target's vocabulary of {len(counts_V)}")
    ids = counts_V.argsort(descending=True, stable=True)[:size].tolist()
    missing = [token for token in eos_token_ids if token not in ids]
    return ids[: size - len(missing)] + missing


def write_token_map(ids: list[int], folder: Path) -> Path:
    """freq_<number of ids>.pt: a list of Python ints."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"freq_{len(ids)}.pt"
    torch.save(ids, path)
    return path
