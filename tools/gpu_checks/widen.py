"""The demo checkpoints at the shape of Llama 3.1 8B, so that real accept lengths meet real costs."""

import time
from pathlib import Path

from widening.checkpoint import Original, widen_checkpoints
from widening.shape import PRESETS
from widening.token_map import widen_token_map

from gpu_checks.context import DEMOS, Context

TOKEN_MAP_SIZE = 32768  # FR-Spec's


def check_widen(context: Context, out: dict) -> None:
    if context.rehearsal:
        return
    shape = PRESETS["8b"]
    heads = [DEMOS / "llama-gsm8k-eagle3", DEMOS / "llama-gsm8k-eagle"]
    for target, drafts in ((DEMOS / "llama-gsm8k", heads), (DEMOS / "mimo-gsm8k", [])):
        start = time.monotonic()
        out |= widen_checkpoints(target, drafts, context.work, shape, "bfloat16", str(context.device))
        out[f"{target.name} seconds"] = time.monotonic() - start
    _write_token_map(context.work / "llama-gsm8k-eagle", shape.vocab_size)


def _write_token_map(folder: Path, vocab_size: int) -> None:
    from draft_training.token_map import write_token_map

    old = Original.read(DEMOS / "llama-gsm8k-eagle").shape.vocab_size
    ids = widen_token_map(DEMOS / "llama-gsm8k-eagle" / "freq_256.pt", TOKEN_MAP_SIZE, old, vocab_size)
    write_token_map(ids, folder)
