"""Which attention backend serves a device."""

import torch

from specbackend import kernels
from specbackend.attention.base import AttentionBackend
from specbackend.attention.flashinfer import flashinfer_attention
from specbackend.attention.torch_sdpa import TorchAttention
from specbackend.errors import ConfigError


def attention_backend(name: str, device: torch.device, dtype: torch.dtype, head_dims: set[int]) -> AttentionBackend:
    """`name` as in EngineConfig. Kernels are imported for the devices that run them only. Raises ConfigError."""
    if name == "auto":
        name = "triton" if kernels.run_on(device) else "torch"
    if name == "torch":
        return TorchAttention()
    if name == "flashinfer":
        return flashinfer_attention(device, dtype, head_dims)
    if not kernels.run_on(device):
        raise ConfigError(f"attention_backend: triton needs a CUDA device, not {device}")
    from specbackend.attention.triton_tree import TritonAttention

    return TritonAttention()
