"""What stands between the matrix products of a layer: fused kernels, or plain torch where these do not run."""

import functools
from typing import Protocol

import torch
import torch.nn.functional as F

from specbackend import kernels
from specbackend.kernels import cpu
from specbackend.kernels.cpu import operators as cpu_operators


class Operators(Protocol):
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / rms(x) * weight over the last dimension, in x's dtype."""

    def rope_kv_write(
        self, qkv_TE: torch.Tensor, rope: torch.Tensor, slot_T: torch.Tensor, kv_S2GD: torch.Tensor, num_heads: int
    ) -> torch.Tensor:
        """Rotate queries and keys by the rows of a `rope_table`, write K and V to their slots, return q [T, H, D].

        qkv_TE: [T, (H + 2G) * D]; pairs are adjacent (see layers.adjacent_pairs). It may be overwritten.
        """

    def silu_mul(self, gate_up_TE: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up; gate is the first half of each row."""


class TorchOperators:
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        # In float32 and back before the weight, as Hugging Face does; a third fewer operators than F.rms_norm on a CPU.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse_rms = torch.addcmul(_scalar(eps, x.device), norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return cast(x * inverse_rms, x.dtype).mul_(weight)

    def rope_kv_write(self, qkv_TE, rope, slot_T, kv_S2GD, num_heads: int) -> torch.Tensor:
        G, D = kv_S2GD.shape[2:]
        qkv = cast(qkv_TE.view(-1, num_heads + 2 * G, D), torch.float32)
        rotate_(qkv[:, : num_heads + G], rope)
        q, kv = cast(qkv, qkv_TE.dtype).split_with_sizes((num_heads, 2 * G), dim=1)
        kv_S2GD.index_copy_(0, slot_T, kv.view(-1, 2, G, D))
        return q

    def silu_mul(self, gate_up_TE: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up_TE.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


class CpuOperators(TorchOperators):
    """By the project's kernels in C++, but for what torch.compile sees."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if torch.compiler.is_compiling() or x.dtype not in cpu.NAMES:
            return super().rms_norm(x, weight, eps)
        return cpu_operators.rms_norm(x, weight, eps)

    def rope_kv_write(self, qkv_TE, rope, slot_T, kv_S2GD, num_heads: int) -> torch.Tensor:
        if torch.compiler.is_compiling() or qkv_TE.dtype not in cpu.NAMES:
            return super().rope_kv_write(qkv_TE, rope, slot_T, kv_S2GD, num_heads)
        return cpu_operators.rope_kv_write(qkv_TE, rope, slot_T, kv_S2GD, num_heads)

    def silu_mul(self, gate_up_TE: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or gate_up_TE.dtype not in cpu.NAMES:
            return super().silu_mul(gate_up_TE)
        return cpu_operators.silu_mul(gate_up_TE)


class TritonOperators:
    def __init__(self):
        from specbackend.kernels.rms_norm import rms_norm
        from specbackend.kernels.rope_kv_write import rope_kv_write
        from specbackend.kernels.silu_mul import silu_mul

        self.silu_mul, self._rms_norm, self._rope_kv_write = silu_mul, rms_norm, rope_kv_write

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if weight.dim() > 1:  # of each head its own
            return self._rms_norm(x, weight, eps)
        return self._rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)

    def rope_kv_write(self, qkv_TE, rope, slot_T, kv_S2GD, num_heads: int) -> torch.Tensor:
        return self._rope_kv_write(qkv_TE, torch.view_as_real(rope)[:, 0], slot_T, kv_S2GD, num_heads)


@functools.cache
def operators(device: torch.device) -> Operators:
    if kernels.run_on(device):
        return TritonOperators()
    return CpuOperators() if cpu.serves(torch.float32, device) else TorchOperators()


@functools.cache
def _scalar(value: float, device: torch.device) -> torch.Tensor:
    """A tensor, which is what addcmul takes."""
    return torch.tensor(value, device=device)


def rotate_(heads_THD: torch.Tensor, rope: torch.Tensor) -> None:
    """Rotate float32 heads in place; rope is that of the rows."""
    T, H, D = heads_THD.shape
    torch.view_as_complex(heads_THD.view(T, H, D // 2, 2)).mul_(rope)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`to`, which takes microseconds to find that there is nothing to do, and a float32 step asks it 65 times."""
    return x if x.dtype == dtype else x.to(dtype)
