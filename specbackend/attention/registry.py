"""Which attention backend serves a device."""

import torch

from specbackend.attention.base import AttentionBackend
from specbackend.attention.torch_sdpa import TorchAttention
from specbackend.errors import ConfigError


def attention_backend(name: str, device: torch.device) -> AttentionBackend:
    """`name` as in EngineConfig. Kernels are imported for the devices that run them only. Raises ConfigError."""
    if name == "auto":
        name = "triton" if device.type == "cuda" else "torch"
    if name == "torch":
        return TorchAttention()
    if device.type != "cuda":
        raise ConfigError(f"attention_backend: {name} needs a GPU, this is {device.type}")
    if name == "triton":
        from specbackend.attention.triton_tree import TritonAttention

        return TritonAttention()
    from specbackend.attention.flashinfer import FlashInferAttention

    return FlashInferAttention(device)
