"""config.json of a checkpoint, read as the networks need it."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

from specbackend.errors import ConfigError


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling. Source: `rope_scaling` with rope_type "llama3"."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Family:
    """What an architecture implies without saying it in its config.json."""

    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each query and key head
    head_dim: int | None = None  # where the config is silent; None: hidden_size / num_attention_heads


FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(qkv_bias=True),
    "Qwen3ForCausalLM": Family(qk_norm=True, head_dim=128),
    "MiMoForCausalLM": Family(qkv_bias=True),
}

SPLIT = ("num_attention_heads", "num_key_value_heads", "intermediate_size")  # over ranks


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-like decoder."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    sliding_window: int | None  # a longer context would need a mask that is not here
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    torch_dtype: str
    raw: dict  # config.json itself, for the fields only one kind of checkpoint has

    @classmethod
    def read(cls, folder: Path) -> "ModelConfig":
        """Read `folder`/config.json (and generation_config.json for the eos ids). Raises ConfigError.

        A draft in vLLM's speculators format keeps the shape of its layer in a block of its own.
        """
        path, raw = folder / "config.json", _read_config(folder)
        raw = {**(raw.get("transformer_layer_config") or {}), **raw}
        architecture = (raw.get("architectures") or ["unknown"])[0]
        family = FAMILIES.get(architecture, Family())
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if missing := [name for name in required if name not in raw]:
            raise ConfigError(f"{path}: {', '.join(missing)} missing")
        rope = raw.get("rope_parameters") or {}
        return cls(
            architecture=architecture,
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=raw["num_attention_heads"],
            num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=raw.get("head_dim") or family.head_dim or raw["hidden_size"] // raw["num_attention_heads"],
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or raw.get("rope_theta") or 10000.0,
            rope_scaling=_rope_scaling(path, raw.get("rope_scaling") or rope),
            max_position_embeddings=_max_positions(raw),
            sliding_window=raw.get("sliding_window") if raw.get("use_sliding_window", True) else None,
            qkv_bias=family.qkv_bias or raw.get("attention_bias", False),
            output_bias=raw.get("attention_bias", False) and not family.qkv_bias,
            mlp_bias=raw.get("mlp_bias", False),
            qk_norm=family.qk_norm,
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            eos_token_ids=_eos_token_ids(folder, raw),
            torch_dtype=str(raw.get("torch_dtype") or raw.get("dtype") or "float32").removeprefix("torch."),
            raw=raw,
        )

    def check_implemented(self, folder: Path) -> None:
        """Refuse what would change the layers of `models.layers`."""
        activation = self.raw.get("hidden_act", "silu")
        if activation != "silu":
            raise ConfigError(f"{folder}: hidden_act={activation!r} is not served, only 'silu' is")

    def part(self, folder: Path, tp_size: int) -> "ModelConfig":
        """What one of tp_size ranks computes of each layer. Raises ConfigError where that is no whole number."""
        sizes = {name: getattr(self, name) for name in SPLIT}
        if broken := [f"{name} {size}" for name, size in sizes.items() if size % tp_size]:
            raise ConfigError(f"{folder}: tp_size {tp_size} does not divide {', '.join(broken)}")
        return replace(self, **{name: size // tp_size for name, size in sizes.items()})


def read_max_positions(folder: Path) -> int:
    """`max_position_embeddings` of any checkpoint, served or not."""
    return _max_positions(_read_config(folder))


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"no checkpoint at {folder}: config.json is missing")
    try:
        return json.loads(path.read_text(), object_pairs_hook=_without_nulls)
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error


def _without_nulls(pairs: list[tuple[str, object]]) -> dict:
    """A field that is null says as much as one that is absent."""
    return {name: value for name, value in pairs if value is not None}


def _max_positions(raw: dict) -> int:
    return raw.get("max_position_embeddings", 2048)


def _rope_scaling(path: Path, scaling: dict) -> RopeScaling | None:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConfigError(f"{path}: rope scaling {kind!r} is not served, only llama3 is")
    names = [field.name for field in fields(RopeScaling)]
    if missing := [name for name in names if name not in scaling]:
        raise ConfigError(f"{path}: rope scaling 'llama3' without {', '.join(missing)}")
    return RopeScaling(**{name: scaling[name] for name in names})


def _eos_token_ids(folder: Path, raw: dict) -> tuple[int, ...]:
    """The ids that end a generation, as HF generate reads them: generation_config.json first."""
    generation = folder / "generation_config.json"
    found = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
    found = raw.get("eos_token_id") if found is None else found
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (found,)
