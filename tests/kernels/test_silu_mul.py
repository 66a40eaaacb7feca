import pytest
import torch

from specbackend.kernels.silu_mul import example_inputs, silu_mul, silu_mul_ref
from tests.kernels.dtypes import DTYPES, assert_close_to


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, inner", [(1, 1), (3, 100), (2, 1024), (2, 1500)])
def test_equals_reference(T, inner, dtype, device):
    inputs = example_inputs(T, inner, dtype=dtype, device=device)
    assert_close_to(silu_mul(**inputs), silu_mul_ref(**inputs), ulps=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter's exponential is numpy's, not torch's")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_equals_torch_to_the_bit(dtype, device):
    inputs = example_inputs(T=64, inner=14336, dtype=dtype, device=device)
    assert torch.equal(silu_mul(**inputs), silu_mul_ref(**inputs))


def test_rows_may_be_strided(device):
    gate_up_TE = example_inputs(T=4, inner=40, dtype=torch.float32, device=device)["gate_up_TE"][::2, 10:70]
    assert_close_to(silu_mul(gate_up_TE), silu_mul_ref(gate_up_TE), ulps=2)


def test_extreme_gates(device):
    """exp overflows on the left: the result is 0, not NaN."""
    gate_up_TE = torch.tensor([[-1000.0, -90.0, 0.0, 1000.0, 2.0, 2.0, 2.0, 2.0]], device=device)
    assert silu_mul(gate_up_TE)[0].tolist() == pytest.approx([0.0, 0.0, 0.0, 2000.0], abs=1e-30)
