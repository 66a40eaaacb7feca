"""The frozen target: what a head may read of it, and which checkpoints can be one."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from draft_training.errors import TrainingError

QWEN2 = ("Qwen2ForCausalLM", "MiMoForCausalLM")
LLAMA_LIKE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM", *QWEN2)
"""Decoders that embed tokens unscaled, and whose logits are a linear map of the normed last hidden state."""


def read_config(folder: Path) -> dict:
    """config.json as it is."""
    path = folder / "config.json"
    if not path.is_file():
        raise TrainingError(f"target: no checkpoint at {folder}, config.json is missing")
    return json.loads(path.read_text())


def require_architecture(config: dict, known: tuple[str, ...]) -> None:
    architecture = (config.get("architectures") or ["unknown"])[0]
    if architecture not in known:
        raise TrainingError(f"target: is a {architecture}; this algorithm trains on {', '.join(known)}")


@dataclass(frozen=True)
class Target:
    """A target in memory, and the checkpoint it came from."""

    folder: Path
    raw_config: dict
    model: PreTrainedModel

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, device: torch.device) -> "Target":
        raw = read_config(folder)
        model = _load_model(folder, raw, dtype).to(device).eval().requires_grad_(False)
        return cls(folder, raw, model)

    @property
    def embed_tokens(self) -> nn.Embedding:
        return self.model.model.embed_tokens

    @property
    def lm_head(self) -> nn.Linear:
        return self.model.lm_head

    @property
    def eos_token_ids(self) -> list[int]:
        eos = self.model.generation_config.eos_token_id
        return eos if isinstance(eos, list) else [eos] if eos is not None else []

    @torch.no_grad()
    def hidden_states(self, tokens_BT: Tensor) -> tuple[Tensor, ...]:
        """Hugging Face's: [k] is what layer k reads, the last one is the output of the final norm."""
        return self.model.model(tokens_BT, output_hidden_states=True, use_cache=False).hidden_states


def _load_model(folder: Path, raw: dict, dtype: torch.dtype) -> PreTrainedModel:
    if raw.get("model_type") == "mimo":  # a Qwen2 with an MTP layer, and unknown to AutoModel
        return Qwen2ForCausalLM.from_pretrained(folder, config=qwen2_config(raw), dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def qwen2_config(raw: dict) -> Qwen2Config:
    """A MiMo or Qwen2 config.json as Qwen2's."""
    return Qwen2Config(**{name: value for name, value in raw.items() if name not in ("model_type", "architectures")})
