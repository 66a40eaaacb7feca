import pytest
import torch

from specbackend.kernels.rms_norm import example_inputs, rms_norm, rms_norm_ref
from specbackend.models.layers import RMSNorm
from tests.kernels.dtypes import DTYPES, assert_close_to


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, D, H", [(1, 1, None), (3, 100, None), (2, 4096, None), (3, 16, 5), (2, 24, 1)])
def test_rms_norm_equals_reference_and_the_layer(T, D, H, dtype, device):
    inputs = example_inputs(T, D, H, dtype=dtype, device=device)
    y = rms_norm(**inputs)
    assert y.is_contiguous()
    assert_close_to(y, rms_norm_ref(**inputs), ulps=4)
    assert_close_to(y, RMSNorm(inputs["weight"], inputs["eps"])(inputs["x_TD"]), ulps=4)


def test_rows_may_be_strided(device):
    inputs = example_inputs(T=4, D=40, dtype=torch.float32, device=device)
    x_TD, weight, eps = inputs["x_TD"][::2, :20], inputs["weight"][:20], inputs["eps"]
    assert_close_to(rms_norm(x_TD, weight, eps), rms_norm_ref(x_TD, weight, eps), ulps=4)
    x_THD = inputs["x_TD"].view(4, 2, 20).transpose(0, 1)
    weight_HD = inputs["weight"].repeat(2).view(4, 20)
    assert_close_to(rms_norm(x_THD, weight_HD, eps), rms_norm_ref(x_THD, weight_HD, eps), ulps=4)


def test_eps_keeps_rows_of_zeros_finite(device):
    assert not rms_norm(torch.zeros(2, 8, device=device), torch.ones(8, device=device), eps=1e-6).any()


def test_the_norm_is_rounded_before_the_weight(device):
    """3 / sqrt(5) * 1.25 becomes another float16 if only the product is rounded."""
    x_TD = torch.tensor([[1.0, 3.0]], dtype=torch.float16, device=device)
    weight = torch.full((2,), 1.25, dtype=torch.float16, device=device)
    norm = (x_TD.double() / x_TD.double().square().mean().sqrt()).half()
    assert rms_norm(x_TD, weight, eps=0.0).tolist() == (norm * weight).tolist()


def test_rejects_a_weight_of_another_shape(device):
    inputs = example_inputs(T=2, D=8, H=4, device=device)
    with pytest.raises(AssertionError, match="one weight per head"):
        rms_norm(inputs["x_TD"], inputs["weight"][0], inputs["eps"])
