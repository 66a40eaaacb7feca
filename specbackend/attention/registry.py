"""Which attention backend serves a device."""

import torch

from specbackend import kernels
from specbackend.attention.base import AttentionBackend
from specbackend.attention.flashinfer import flashinfer_attention
from specbackend.attention.native import NativeAttention
from specbackend.attention.torch_sdpa import TorchAttention
from specbackend.errors import ConfigError
from specbackend.kernels import cpu
from specbackend.kernels.cpu.attention import WIDTH


def attention_backend(name: str, device: torch.device, dtype: torch.dtype, head_dims: set[int]) -> AttentionBackend:
    """`name` as in EngineConfig. Kernels are imported for the devices that run them only. Raises ConfigError."""
    has_native = cpu.serves(dtype, device) and all(head_dim % WIDTH == 0 for head_dim in head_dims)
    if name == "auto":
        name = "triton" if kernels.run_on(device) else "native" if has_native else "torch"
    if name == "torch":
        return TorchAttention()
    if name == "native":
        if not has_native:
            raise ConfigError(
                f"attention_backend: native needs a CPU, a C++ compiler, float32 or bfloat16, and heads of a multiple "
                f"of {WIDTH} dimensions; here are {device}, {dtype} and {sorted(head_dims)}"
            )
        return NativeAttention()
    if name == "flashinfer":
        return flashinfer_attention(device, dtype, head_dims)
    if not kernels.run_on(device):
        raise ConfigError(f"attention_backend: triton needs a CUDA device, not {device}")
    from specbackend.attention.triton_tree import TritonAttention

    return TritonAttention()
