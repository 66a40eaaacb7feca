"""Published file formats."""

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from draft_training.target import Target

NOT_COPIED = (".safetensors", ".bin", ".index.json", ".png", ".md")
"""Of a target's folder: its weights are written anew, its card and plots tell of another training."""


def write_head(folder: Path, config: LlamaConfig, state: dict[str, Tensor]) -> None:
    """config.json and model.safetensors of a head, in the config's dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_stored(state, config.dtype), folder / "model.safetensors", metadata={"format": "pt"})
    raw = config.to_diff_dict()
    raw["rope_theta"] = raw["rope_parameters"]["rope_theta"]  # older readers know only this one
    _write_config(folder, raw)


def write_mimo(folder: Path, target: Target, mtp_layer: dict[str, Tensor]) -> None:
    """The target's checkpoint with the layer in it, all in the dtype that the target has on disk."""
    raw = target.raw_config
    dtype = getattr(torch, raw.get("torch_dtype") or raw.get("dtype") or "float32")
    state = target.model.state_dict()
    if raw.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    state |= {f"model.mtp_layers.0.{name}": tensor for name, tensor in mtp_layer.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for path in target.folder.iterdir():
        if path.is_file() and not path.name.endswith(NOT_COPIED) and path.name != "config.json":
            shutil.copy(path, folder)
    save_torch_state_dict(_stored(state, dtype), folder)
    mimo = {"architectures": ["MiMoForCausalLM"], "model_type": "mimo", "num_nextn_predict_layers": 1}
    _write_config(folder, raw | mimo)


def _stored(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """As they lie in the file: floating ones in `dtype`, ids and masks as they are."""
    return {
        name: tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in state.items()
    }


def _write_config(folder: Path, raw: dict) -> None:
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
