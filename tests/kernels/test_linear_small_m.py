"""linear_small_m against its definition, and row by row; no GPU: Triton's interpreter is used."""

import pytest
import torch

from specbackend.kernels.linear_small_m import LLAMA_WEIGHTS, NUM_SMS, choose_split, example_inputs, linear_small_m
from specbackend.kernels.linear_small_m import linear_small_m_ref as reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():  # the interpreter multiplies the bits of bfloat16 numbers
    DTYPES.append(torch.bfloat16)

SHAPES = {
    "whole tiles": dict(T=16, E=64, D=256),
    "one row, one output": dict(T=1, E=1, D=1),
    "nothing divides": dict(T=5, E=33, D=131),
    "split inputs": dict(T=3, E=40, D=1024 + 100),
    "bias": dict(T=17, E=70, D=64, bias=True),
    "residual": dict(T=33, E=70, D=64, residual=True),
    "both, split": dict(T=2, E=64, D=1024, bias=True, residual=True),
    "most rows of a tile": dict(T=64, E=32, D=100),
    "tiles of rows": dict(T=150, E=40, D=300, bias=True, residual=True),
    "int8": dict(T=5, E=33, D=131, weight_dtype=torch.int8),
    "int8, split, all else": dict(T=3, E=40, D=1124, bias=True, residual=True, weight_dtype=torch.int8),
    "fp8": dict(T=5, E=33, D=131, weight_dtype=torch.float8_e4m3fn),
    "fp8, tiles of rows": dict(T=70, E=40, D=300, bias=True, weight_dtype=torch.float8_e4m3fn),
}


def assert_close(y_TE: torch.Tensor, inputs: dict):
    assert y_TE.dtype == inputs["x_TD"].dtype
    tolerance = TOLERANCE[y_TE.dtype]
    torch.testing.assert_close(y_TE.double(), reference(**inputs), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype, device):
    inputs = example_inputs(**SHAPES[shape], dtype=dtype, device=device)
    assert_close(linear_small_m(**inputs), inputs)


@pytest.mark.parametrize("weight_dtype", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("D", [200, 2048], ids=["one part", "split inputs"])
def test_a_row_does_not_depend_on_the_others(D, weight_dtype, device):
    sizes = dict(T=13, E=50, D=D, bias=True, residual=True)
    inputs = example_inputs(**sizes, dtype=torch.float32, weight_dtype=weight_dtype, device=device)
    together = linear_small_m(**inputs)
    for t in (0, 7, 12):
        row = {"x_TD": inputs["x_TD"][t : t + 1], "residual_TE": inputs["residual_TE"][t : t + 1]}
        assert torch.equal(linear_small_m(**inputs | row), together[t : t + 1])
    assert torch.equal(linear_small_m(**inputs), together)


def test_big_weight_gets_tall_tiles(device):
    """More outputs than 64 times the SMs, which takes another tile than the shapes above."""
    inputs = example_inputs(T=2, E=64 * NUM_SMS + 1, D=16, dtype=torch.float32, device=device)
    assert choose_split(64 * NUM_SMS + 1, 16).block_e == 64
    assert_close(linear_small_m(**inputs), inputs)


def test_views(device):
    """Columns of wider tensors. What lies beside them is NaN."""
    inputs = example_inputs(T=4, E=40, D=48, residual=True, dtype=torch.float32, device=device)
    expected = linear_small_m(**inputs)
    views = {}
    for name in ("x_TD", "weight_ED", "residual_TE"):
        narrow = inputs[name]
        wide = torch.full((len(narrow), narrow.shape[1] + 16), torch.nan, device=device)
        views[name] = wide[:, : narrow.shape[1]]
        views[name].copy_(narrow)
    assert torch.equal(linear_small_m(**views), expected)


@pytest.mark.parametrize("weight", LLAMA_WEIGHTS)
def test_weights_fill_the_gpu(weight):
    E, D = LLAMA_WEIGHTS[weight]
    split = choose_split(E, D)
    assert -(-E // split.block_e) * split.num_splits >= 0.95 * NUM_SMS
    assert (split.num_splits - 1) * split.part < D <= split.num_splits * split.part


def test_split_of_narrow_weights():
    split = choose_split(1024, 4096)
    assert (split.block_e, split.num_splits, split.part) == (32, 4, 1024)
    assert choose_split(1024, 100).num_splits == 1  # too few inputs to share


def test_refuses_what_does_not_fit(device):
    inputs = example_inputs(T=2, E=4, D=16, dtype=torch.float32, device=device)
    with pytest.raises(AssertionError, match="takes 16 inputs, x has 8"):
        linear_small_m(inputs["x_TD"][:, :8], inputs["weight_ED"])
    with pytest.raises(AssertionError, match="float16"):
        linear_small_m(inputs["x_TD"].half(), inputs["weight_ED"])
    with pytest.raises(AssertionError, match="int8"):
        linear_small_m(inputs["x_TD"], inputs["weight_ED"].to(torch.int8))
