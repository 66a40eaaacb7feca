"""Layers whose weights are rounded to 8 bits at load, under the names that SGLang and torchao have for it."""

from collections.abc import Callable
from functools import partial

import torch

from specbackend import kernels
from specbackend.errors import ConfigError
from specbackend.kernels import cpu
from specbackend.models.int8 import Int8Linear
from specbackend.models.linear import Linear
from specbackend.models.llama import LlamaModel

FP8_CAPABILITY = (8, 9)  # of the first GPUs that convert it


def quantize(model: LlamaModel, quantization: str) -> None:
    """Round the weights of the target's layers; embedding and LM head stay as they are. Raises ConfigError."""
    rounded = _rounding(quantization, model.lm_head.device)
    for layer in model.layers:
        for block in (layer.attention, layer.mlp):
            for name, value in list(vars(block).items()):
                if isinstance(value, Linear):
                    setattr(block, name, rounded(value))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the KV pool is sized by what is free


def _rounding(quantization: str, device: torch.device) -> Callable[[Linear], Linear]:
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
    raise ConfigError(f"quantization: {quantization} is served on {where} only")


def _has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
