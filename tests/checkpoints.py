"""Tiny random checkpoints in the published formats, written where a test wants them."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # large, so that different tokens have clearly different logits
    "eos_token_id": None,
    "bos_token_id": None,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mimo": (Qwen2Config, Qwen2ForCausalLM),  # Qwen2 and an MTP layer; transformers has no class for it
}


def write_target(
    folder: Path, family: str = "llama", seed: int = 0, max_shard_size: str = "1GB", **config
) -> PreTrainedModel:
    """Write a float32 target as Hugging Face writes it; `config` overrides TINY. Returns the model itself."""
    torch.manual_seed(seed)
    make_config, make_model = FAMILIES[family]
    model = make_model(make_config(**{**TINY, **config})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)  # else all ones, which would hide a norm that is left out
            elif name.endswith("bias"):
                weight.uniform_(-0.5, 0.5)  # else all zeros
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if family == "mimo":
        edit_config(folder, architectures=["MiMoForCausalLM"], model_type="mimo", num_nextn_predict_layers=1)
        tensors = random_tensors(mtp_shapes(model.config), seed)
        edit_tensors(folder, **{name.replace(".", "__"): tensor for name, tensor in tensors.items()})
    return model


def write_tokenizer(folder: Path, vocab_size: int = TINY["vocab_size"]) -> None:
    """One word per id."""
    words = {f"w{token_id}": token_id for token_id in range(vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))


def mtp_shapes(config) -> dict[str, tuple[int, ...]]:
    """Of MiMo's one MTP layer; `config` is the target's Qwen2Config."""
    D, prefix = config.hidden_size, "model.mtp_layers.0."
    norms = ("token_layernorm", "hidden_layernorm", "final_layernorm", "input_layernorm", "post_attention_layernorm")
    shapes = layer_shapes(vars(config), prefix, input_size=D, qkv_bias=True)
    return {f"{prefix}input_proj.weight": (D, 2 * D), **shapes, **{f"{prefix}{n}.weight": (D,) for n in norms}}


def write_head(folder: Path, kind: str, target_config, seed: int = 0, options: dict | None = None, **config) -> dict:
    """Write an EAGLE or EAGLE3 head for a target, as its authors publish it. Returns its tensors.

    `config` overrides fields of config.json; `options` are those of `eagle_shapes` or `eagle3_shapes`.
    """
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": target_config.vocab_size,
        "hidden_size": target_config.hidden_size,
        "intermediate_size": target_config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": target_config.num_attention_heads,
        "num_key_value_heads": target_config.num_key_value_heads,
        "head_dim": target_config.head_dim,
        "rms_norm_eps": target_config.rms_norm_eps,
        "max_position_embeddings": 2048,
        **config,
    }
    shapes_of = {"EAGLE": eagle_shapes, "EAGLE3": eagle3_shapes}[kind]
    tensors = random_tensors(shapes_of(raw, target_config.hidden_size, **(options or {})), seed)
    V, W = raw["vocab_size"], raw.get("draft_vocab_size") or raw["vocab_size"]
    if kind == "EAGLE3" and W != V:
        ids = torch.randperm(V, generator=torch.Generator().manual_seed(seed))[:W].sort().values
        tensors["d2t"] = ids - torch.arange(W)
        tensors["t2d"] = torch.zeros(V, dtype=torch.bool).index_fill_(0, ids, True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def eagle_shapes(
    raw: dict, target_width: int, fc_bias: bool = True, own_embedding: bool = False, **biases: bool
) -> dict:
    """Table 1.1 of the published format: no norm before the attention, none at the end, no LM head."""
    D, prefix = raw["hidden_size"], "layers.0."
    shapes = {"fc.weight": (D, 2 * D), f"{prefix}post_attention_layernorm.weight": (D,)}
    if fc_bias:
        shapes["fc.bias"] = (D,)
    if own_embedding:
        shapes["embed_tokens.weight"] = (raw["vocab_size"], D)
    return shapes | layer_shapes(raw, prefix, input_size=D, **biases)


def eagle3_shapes(
    raw: dict,
    target_width: int,
    num_features: int = 3,
    fc_norm: bool = False,
    norm_before_fc: bool = False,
    own_embedding: bool = False,
    **biases: bool,
) -> dict:
    D, F, prefix = raw["hidden_size"], num_features * target_width, "midlayer."
    shapes = {f"{prefix}{norm}.weight": (D,) for norm in ("input_layernorm", "hidden_norm", "post_attention_layernorm")}
    shapes |= layer_shapes(raw, prefix, input_size=2 * D, **biases)
    shapes |= {"norm.weight": (D,), "lm_head.weight": (raw.get("draft_vocab_size") or raw["vocab_size"], D)}
    if num_features:
        shapes["fc.weight"] = (D, F)
    if fc_norm:
        shapes |= {f"fc_norm.{i}.weight": (target_width,) for i in range(num_features)}
    if norm_before_fc:
        shapes["input_norm.weight"] = (F,)
    if own_embedding:
        shapes["embed_tokens.weight"] = (raw["vocab_size"], D)
    return shapes


def layer_shapes(
    raw: dict, prefix: str, input_size: int, qkv_bias: bool = False, output_bias: bool = False, mlp_bias: bool = False
) -> dict[str, tuple[int, ...]]:
    """Attention and MLP of one decoder layer."""
    D, inner = raw["hidden_size"], raw["intermediate_size"]
    q, kv = (raw[f"num_{heads}_heads"] * raw["head_dim"] for heads in ("attention", "key_value"))
    weights = {
        "self_attn.q_proj": (q, input_size),
        "self_attn.k_proj": (kv, input_size),
        "self_attn.v_proj": (kv, input_size),
        "self_attn.o_proj": (D, q),
        "mlp.gate_proj": (inner, D),
        "mlp.up_proj": (inner, D),
        "mlp.down_proj": (D, inner),
    }
    with_bias = {"q_proj": qkv_bias, "k_proj": qkv_bias, "v_proj": qkv_bias, "o_proj": output_bias}
    shapes = {f"{prefix}{name}.weight": shape for name, shape in weights.items()}
    for name, shape in weights.items():
        if with_bias.get(name.split(".")[1], mlp_bias):
            shapes[f"{prefix}{name}.bias"] = shape[:1]
    return shapes


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


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


def write_useless_head(folder: Path, head: Path) -> None:
    """A copy of an EAGLE-3 head that drafts what it finds least likely, so that nothing is ever accepted."""
    shutil.copytree(head, folder)
    edit_tensors(folder, lm_head__weight=-load_file(folder / "model.safetensors")["lm_head.weight"])


def rename_tensors(folder: Path, rename) -> None:
    """Write model.safetensors again with every name mapped."""
    path = folder / "model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)


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


class Payload:
    """What a malicious pickle does when it is loaded carelessly."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)
