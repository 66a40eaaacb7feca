"""Layers whose weights are rounded to 8 bits at load, under the names that SGLang and torchao have for it."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch

from specbackend import kernels
from specbackend.errors import ConfigError
from specbackend.kernels import cpu
from specbackend.models.draft import DraftModel
from specbackend.models.int8 import Int8Linear
from specbackend.models.layers import Attention, DecoderLayer, GatedMLP
from specbackend.models.linear import Linear
from specbackend.models.llama import LlamaModel

FP8_CAPABILITY = (8, 9)  # of the first GPUs that convert it


def quantize(model: LlamaModel, quantization: str) -> None:
    """Round the weights of the target's layers; embedding and LM head stay as they are. Raises ConfigError."""
    rounded = _rounding("quantization", quantization, model.lm_head.device)
    for layer in model.layers:
        _round(layer, rounded)
    _give_back()


def quantize_draft(draft: DraftModel, quantization: str) -> None:
    """Round all of a draft's products, its LM head too. A target's own that it shares stays as it is for the target.

    Raises ConfigError.
    """
    rounded = cache(_rounding("speculative_draft_model_quantization", quantization, draft.vocabulary.lm_head.device))
    _round(draft, rounded)
    draft.vocabulary = replace(draft.vocabulary, lm_head=rounded(draft.vocabulary.lm_head))
    rounded.cache_clear()  # it holds the layers as they were
    _give_back()


def _round(module: object, rounded: Callable[[Linear], Linear]) -> None:
    for name, value in list(vars(module).items()):
        if isinstance(value, Linear):
            setattr(module, name, rounded(value))
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, (LlamaModel, DecoderLayer, Attention, GatedMLP)):
                _round(part, rounded)


def _give_back() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the KV pool is sized by what is free


def _rounding(parameter: str, quantization: str, device: torch.device) -> Callable[[Linear], Linear]:
    if kernels.run_on(device) and (quantization == "int8wo" or _has_fp8(device)):
        from specbackend.models.weight_only import WeightOnlyLinear

        return partial(
            WeightOnlyLinear.of, weight_dtype={"int8wo": torch.int8, "fp8wo": torch.float8_e4m3fn}[quantization]
        )
    if quantization == "int8wo" and cpu.serves(torch.float32, device):
        return Int8Linear.of
    where = {"int8wo": "CUDA devices and CPUs with a C++ compiler", "fp8wo": "CUDA devices of sm_89 and later"}[
        quantization
    ]
    raise ConfigError(f"{parameter}: {quantization} is served on {where} only")


def _has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
