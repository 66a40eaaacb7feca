"""The CPU's fused operators against the same in torch."""

import pytest
import torch

from specbackend.kernels.cpu import operators
from specbackend.models.operators import CpuOperators, TorchOperators
from specbackend.models.operators import operators as operators_of

REFERENCE = TorchOperators()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Both round their steps to the dtype, but may fall on different sides."""
    torch.testing.assert_close(actual, expected, rtol=2**-7 if actual.dtype == torch.bfloat16 else 2e-6, atol=1e-6)


@pytest.mark.parametrize("size", [2, 16, 33, 192, 600])
def test_rms_norm(size, dtype):
    x_TD, weight_D = 3 * torch.randn(5, size).to(dtype), torch.randn(size).to(dtype)
    assert_equal(operators.rms_norm(x_TD, weight_D, 1e-5), REFERENCE.rms_norm(x_TD, weight_D, 1e-5))
    assert_equal(operators.rms_norm(x_TD[:0], weight_D, 1e-5), x_TD[:0])
    wide = torch.randn(5, 2 * size).to(dtype)
    assert_equal(operators.rms_norm(wide[:, :size], weight_D, 1e-5), REFERENCE.rms_norm(wide[:, :size], weight_D, 1e-5))


def test_rms_norm_of_heads_and_in_three_dimensions(dtype):
    x_THD, weight_HD = torch.randn(4, 6, 32).to(dtype), torch.randn(6, 32).to(dtype)
    assert_equal(operators.rms_norm(x_THD, weight_HD, 1e-5), REFERENCE.rms_norm(x_THD, weight_HD, 1e-5))
    assert_equal(operators.rms_norm(x_THD, weight_HD[0], 1e-5), REFERENCE.rms_norm(x_THD, weight_HD[0], 1e-5))


@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (5, 33), (70, 1000)], ids=str)
def test_silu_mul(shape, dtype):
    gate_up = 20 * torch.randn(shape[0], 2 * shape[1]).to(dtype)
    assert_equal(operators.silu_mul(gate_up), REFERENCE.silu_mul(gate_up))


def test_silu_of_extremes():
    gate = torch.tensor([-1e30, -100.0, -88.5, -87.0, -1e-30, 0.0, 1e-30, 87.0, 88.5, 100.0, 1e30])
    actual = operators.silu_mul(torch.stack([gate, torch.ones_like(gate)], dim=1))[:, 0]
    assert_equal(actual, torch.nn.functional.silu(gate))


@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 32), (5, 5, 6), (8, 1, 128)])
def test_rope_kv_write(heads, groups, size, dtype):
    qkv_TE = torch.randn(4, (heads + 2 * groups) * size).to(dtype)
    angle = torch.randn(4, 1, size // 2)
    rope, slot_T = torch.polar(torch.ones_like(angle), angle), torch.tensor([3, 9, 1, 0])
    actual_kv, expected_kv = (torch.full((12, 2, groups, size), 7.0, dtype=dtype) for _ in range(2))
    actual = operators.rope_kv_write(qkv_TE.clone(), rope, slot_T, actual_kv, heads)
    assert_equal(actual, REFERENCE.rope_kv_write(qkv_TE.clone(), rope, slot_T, expected_kv, heads))
    assert_equal(actual_kv, expected_kv)
    others = [slot for slot in range(12) if slot not in slot_T.tolist()]
    assert (actual_kv[others] == 7).all()


def test_what_the_engine_takes():
    assert type(operators_of(torch.device("cpu"))) is CpuOperators
    half = torch.randn(3, 8).half()
    assert torch.equal(CpuOperators().silu_mul(half), REFERENCE.silu_mul(half))
    assert torch.equal(CpuOperators().rms_norm(half, half[0], 1e-5), REFERENCE.rms_norm(half, half[0], 1e-5))
