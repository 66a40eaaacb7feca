"""The CPU's product against one in float64, over shapes that fit no panel and no block of rows."""

import pytest
import torch
from torch import library

from specbackend.kernels.cpu.linear import linear, linear_in_graph, pack, unpack

SHAPES = [(1, 2), (7, 2), (16, 32), (33, 130), (48, 96), (100, 64), (64, 2304), (1100, 600)]
ROWS = (0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 24, 33, 48, 130)
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-3},  # atol: of sums of 2304 numbers of size 1
    torch.bfloat16: {"rtol": 2**-8, "atol": 2e-3},  # rounded once
}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(params=[1, 2, 3], ids=lambda threads: f"{threads} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(shape, dtype):
    E, D = shape
    weight_ED, bias_E = random(E, D, dtype=dtype), torch.randn(E)
    packed = pack(weight_ED)
    for T in ROWS:
        x_TD, residual_TE = random(T, D, dtype=dtype), random(T, E, dtype=dtype)
        exact = x_TD.double() @ weight_ED.double().t()
        for bias, residual in ((None, None), (bias_E, None), (None, residual_TE), (bias_E, residual_TE)):
            expected = exact + (0 if bias is None else bias) + (0 if residual is None else residual)
            actual = linear(x_TD, packed, E, bias, residual)
            assert actual.dtype == dtype
            torch.testing.assert_close(actual.double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_does_not_depend_on_its_company(shape, dtype):
    E, D = shape
    packed, x_TD = pack(random(E, D, dtype=dtype)), random(40, D, dtype=dtype)
    whole = linear(x_TD, packed, E)
    for first in (0, 5):
        for rows in (1, 2, 3, 5, 7, 8, 11, 14, 15, 17, 24, 35):
            assert torch.equal(linear(x_TD[first : first + rows], packed, E), whole[first : first + rows])


def test_nor_does_its_rounding(dtype):
    """Of sums that are 0, all that is left is what was rounded: that shows in which order a product is summed."""
    half_ED, half_TD = random(100, 384, dtype=dtype), random(40, 384, dtype=dtype)
    packed, x_TD = pack(torch.cat([half_ED, -half_ED], dim=1)), half_TD.repeat(1, 2)
    whole = linear(x_TD, packed, 100)
    assert (whole != 0).any()
    for rows in (1, 2, 5, 8, 14, 15, 24, 35):
        assert torch.equal(linear(x_TD[:rows], packed, 100), whole[:rows])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_weight(shape, dtype):
    E, D = shape
    weight_ED, scale_E = torch.randint(-127, 128, shape, dtype=torch.int8), 0.01 + torch.rand(E)
    packed, bias_E = pack(weight_ED), torch.randn(E)
    assert torch.equal(unpack(packed, E), weight_ED)
    for T in ROWS:
        x_TD, residual_TE = random(T, D, dtype=dtype), random(T, E, dtype=dtype)
        scaled = x_TD.double() @ weight_ED.double().t() * scale_E
        tolerance = TOLERANCE[dtype] | {"atol": 0.1}  # of sums of 2304 numbers up to 400
        actual = linear(x_TD, packed, E, None, None, scale_E)
        torch.testing.assert_close(actual.double(), scaled, **tolerance)
        actual = linear(x_TD, packed, E, bias_E, residual_TE, scale_E)
        torch.testing.assert_close(actual.double(), scaled + bias_E + residual_TE, **tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_weight_comes_back(shape, dtype):
    weight_ED = random(*shape, dtype=dtype)
    assert torch.equal(unpack(pack(weight_ED), shape[0]), weight_ED)
    assert torch.equal(unpack(pack(weight_ED.t().contiguous().t()), shape[0]), weight_ED)


def test_rows_that_are_not_side_by_side(dtype):
    weight_ED, wide = random(20, 32, dtype=dtype), random(5, 64, dtype=dtype)
    x_TD, residual_TE = wide[:, 32:], wide[:, :20]
    actual = linear(x_TD, pack(weight_ED), 20, None, residual_TE)
    assert torch.equal(actual, linear(x_TD.contiguous(), pack(weight_ED), 20, None, residual_TE.contiguous()))


def test_nothing_else_is_written(dtype):
    """The last panel is padded; its padding has no place in the output."""
    packed, x_TD = pack(random(17, 32, dtype=dtype)), random(3, 32, dtype=dtype)
    out = x_TD.new_full((5, 17), 7.0)

    class Poisoned(torch.Tensor):
        def new_empty(self, *shape):
            assert shape == (3, 17)
            return out[1:4]

    linear(x_TD.as_subclass(Poisoned), packed, 17)
    assert (out[[0, 4]] == 7).all() and (out[1:4] != 7).any()


def test_operator_for_torch_compile(dtype):
    arguments = (random(3, 32, dtype=dtype), pack(random(20, 32, dtype=dtype)), 20, torch.randn(20))
    library.opcheck(linear_in_graph, (*arguments, random(3, 20, dtype=dtype)))
    assert torch.equal(linear_in_graph(*arguments), linear(*arguments))
