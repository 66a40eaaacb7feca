import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))  # where the trainer is run from

from draft_training.samples import Sample  # noqa: E402

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # large, so that different tokens have clearly different logits
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": None,
}


def write_target(folder: Path, model_type: str, **config) -> Path:
    """A tiny random target of a kind that Hugging Face knows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**TINY, **config}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)  # else all ones, which would hide a norm that is left out
            if name.endswith(".bias"):
                weight.uniform_(-0.5, 0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    return write_target(tmp_path_factory.mktemp("target") / "llama", "llama")


@pytest.fixture(scope="session")
def qwen2_folder(tmp_path_factory) -> Path:
    return write_target(tmp_path_factory.mktemp("target") / "qwen2", "qwen2")


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """Random texts of different lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = [(5, 12), (9, 7), (3, 15), (12, 9), (7, 10), (4, 6), (10, 14), (6, 8)]
    rows = [torch.randint(64, (sum(pair),), generator=generator).tolist() for pair in lengths]
    return [Sample(row[:prompt], row[prompt:]) for row, (prompt, _) in zip(rows, lengths, strict=True)]
