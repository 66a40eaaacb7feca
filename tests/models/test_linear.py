"""Packed weights compute what plain ones do, to the last bit the same for a row wherever it stands."""

import weakref

import pytest
import torch
import torch.nn.functional as F

from specbackend.kernels import cpu
from specbackend.models.linear import MIN_PACKED_SIZE, Linear, PackedLinear, PanelLinear, linear

E, D = 1100, 600  # large enough to be packed, and no multiple of any block
ROWS = (1, 2, 3, 5, 8, 13, 64)
KINDS = [Linear, PackedLinear, PanelLinear]


@pytest.fixture(params=[False, True], ids=["no bias", "bias"])
def weights(request):
    generator = torch.Generator().manual_seed(0)
    weight_ED = torch.randn(E, D, generator=generator) / D**0.5
    return weight_ED, torch.randn(E, generator=generator) if request.param else None


@pytest.mark.parametrize("kind", KINDS)
def test_product_and_residual(kind, weights):
    layer, x_TD, residual_TE = kind(*weights), torch.randn(3, D), torch.randn(3, E)
    exact = F.linear(x_TD.double(), *(w if w is None else w.double() for w in weights))
    torch.testing.assert_close(layer(x_TD).double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        layer.plus_(residual_TE.clone(), x_TD).double(), residual_TE + exact, rtol=1e-5, atol=1e-5
    )
    assert (layer.shape, layer.dtype, layer.device.type) == ((E, D), torch.float32, "cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_any_leading_shape_and_stride(kind, weights):
    layer, x_BQD = kind(*weights), torch.randn(2, 3, 2 * D)[:, :, :D]
    flat = layer(x_BQD.reshape(-1, D))
    torch.testing.assert_close(layer(x_BQD), flat.view(2, 3, E), rtol=1e-5, atol=1e-5)
    assert layer(x_BQD[:0]).shape == (0, 3, E)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_the_weight(kind, weights):
    weight_ED, _ = weights
    layer, ids = kind(*weights), torch.tensor([E - 1, 0, 77])
    assert torch.equal(layer.rows(ids), weight_ED[ids])
    assert torch.equal(layer.rows(torch.arange(E)), weight_ED)


@pytest.mark.parametrize("kind", [PackedLinear, PanelLinear])
def test_a_packed_row_does_not_depend_on_its_company(kind, weights):
    layer, x_TD, residual_TE = kind(*weights), torch.randn(64, D), torch.randn(64, E)
    product, sum_ = layer(x_TD), layer.plus_(residual_TE.clone(), x_TD)
    for first in (0, 7):
        for rows in ROWS:
            some = slice(first, first + rows)
            assert torch.equal(layer(x_TD[some]), product[some])
            assert torch.equal(layer.plus_(residual_TE[some], x_TD[some]), sum_[some])


def test_the_projects_own_product_is_used_where_it_can_be():
    assert cpu.compiled() is not None, "a C++ compiler is part of the tests' environment"
    for dtype in (torch.float32, torch.bfloat16):
        assert type(linear(torch.zeros(3, 4, dtype=dtype))) is PanelLinear
    assert type(linear(torch.zeros(3, 5))) is Linear
    assert type(linear(torch.zeros(3, 4, dtype=torch.float16))) is Linear


def test_which_weights_are_packed_where_it_cannot(no_compiler):
    assert isinstance(linear(torch.zeros(MIN_PACKED_SIZE // 64, 64)), PackedLinear)
    assert type(linear(torch.zeros(MIN_PACKED_SIZE // 64 - 1, 64))) is Linear
    assert type(linear(torch.zeros(MIN_PACKED_SIZE // 64, 64, dtype=torch.float16))) is Linear


def test_bfloat16_is_packed_where_the_cpu_has_it(no_compiler):
    weight_ED, x_TD = torch.randn(E, D).bfloat16(), torch.randn(4, D).bfloat16()
    layer = linear(weight_ED)
    assert isinstance(layer, PackedLinear) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    torch.testing.assert_close(layer(x_TD), F.linear(x_TD, weight_ED), rtol=2e-2, atol=0.5)


def test_the_plain_weight_is_let_go():
    """Loading a large model needs its weights once, not twice."""
    weight_ED = torch.randn(E, D)
    layer, plain = linear(weight_ED), weakref.ref(weight_ED)
    del weight_ED
    assert plain() is None and layer.shape == (E, D)
