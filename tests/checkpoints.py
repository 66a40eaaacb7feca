"""Tiny random checkpoints in the published formats, written where a test wants them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # large, so that different tokens have clearly different logits
    "eos_token_id": None,
    "bos_token_id": None,
}


def write_llama(folder: Path, seed: int = 0, max_shard_size: str = "1GB", **config) -> LlamaForCausalLM:
    """Write a float32 target as Hugging Face writes it; `config` overrides TINY. Returns the model itself."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **config})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)  # else all ones, which would hide a norm that is left out
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def write_eagle3_head(
    folder: Path, target_config, draft_vocab_size: int | None = None, seed: int = 0, **config
) -> dict:
    """Write an EAGLE-3 head for a target of this LlamaConfig; `config` overrides the head's own. Returns its tensors.

    The draft's vocabulary is the target's last draft_vocab_size ids in ascending order; None: all of it, without d2t.
    """
    V = target_config.vocab_size
    draft_V = draft_vocab_size or V
    raw = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "vocab_size": V,
        "draft_vocab_size": draft_V,
        "hidden_size": target_config.hidden_size,
        "intermediate_size": target_config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": target_config.num_attention_heads,
        "num_key_value_heads": target_config.num_key_value_heads,
        "head_dim": target_config.head_dim,
        "rms_norm_eps": target_config.rms_norm_eps,
        "max_position_embeddings": target_config.max_position_embeddings,
        **config,
    }
    tensors = _eagle3_tensors(raw, 3 * target_config.hidden_size, torch.Generator().manual_seed(seed))
    if draft_vocab_size:
        tensors["d2t"] = torch.full((draft_V,), V - draft_V)  # offsets: target id minus draft id
        tensors["t2d"] = torch.arange(V) >= V - draft_V
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def _eagle3_tensors(raw: dict, feature_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    D, inner = raw["hidden_size"], raw["intermediate_size"]
    q = raw["num_attention_heads"] * raw["head_dim"]
    kv = raw["num_key_value_heads"] * raw["head_dim"]
    shapes = {
        "fc": (D, feature_size),
        "midlayer.self_attn.q_proj": (q, 2 * D),
        "midlayer.self_attn.k_proj": (kv, 2 * D),
        "midlayer.self_attn.v_proj": (kv, 2 * D),
        "midlayer.self_attn.o_proj": (D, q),
        "midlayer.mlp.gate_proj": (inner, D),
        "midlayer.mlp.up_proj": (inner, D),
        "midlayer.mlp.down_proj": (D, inner),
        "lm_head": (raw["draft_vocab_size"], D),
        "midlayer.input_layernorm": (D,),
        "midlayer.hidden_norm": (D,),
        "midlayer.post_attention_layernorm": (D,),
        "norm": (D,),
    }
    return {f"{name}.weight": torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def edit_config(folder: Path, **changes) -> None:
    """Change fields of config.json; None removes one."""
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of model.safetensors, names with dots written as __; None removes one."""
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def convert_to_bin(folder: Path, num_files: int = 1) -> None:
    """Replace model.safetensors by what older versions of Hugging Face wrote."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if num_files == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for index in range(num_files):
        file_name = f"pytorch_model-{index + 1:05}-of-{num_files:05}.bin"
        part = dict(list(tensors.items())[index::num_files])
        torch.save(part, folder / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
