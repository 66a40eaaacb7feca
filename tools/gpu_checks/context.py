"""What the stages share."""

import gc
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from draft_training.samples import read_prompts

from specbackend.config import TREE

ROOT = Path(__file__).resolve().parents[2]
DEMOS = ROOT / "tools" / "demo_checkpoints"


@dataclass
class Context:
    """Where to run, what to run on, and until when. A rehearsal takes the small checkpoints as they are."""

    device: torch.device
    work: Path  # scratch, on a file system in memory if there is one
    out: Path  # for results that are files of their own
    deadline: float  # of time.monotonic
    rehearsal: bool = False
    prompts: list[list[int]] = field(default_factory=list)
    results: dict[str, dict] = field(default_factory=dict)  # by stage, of those before

    @property
    def dtype(self) -> str:
        return "float32" if self.rehearsal else "bfloat16"

    def empty_cache(self) -> None:
        """Give back the memory of what has been deleted."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def checkpoint(self, name: str) -> Path:
        """A demo checkpoint, as large as the stage `widen` has made it."""
        wide = self.work / name
        return wide if wide.exists() else DEMOS / name


def tree_params(shape: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(TREE, shape, strict=True))


def read_demo_prompts(count: int) -> list[list[int]]:
    """GSM8K questions as the demo model's chat template presents them."""
    return read_prompts(ROOT / "tests" / "data" / "gsm8k_test.jsonl", DEMOS / "llama-gsm8k")[:count]
