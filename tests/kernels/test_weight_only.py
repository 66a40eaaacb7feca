"""Layers with weights of 8 bits on the kernel, in the interpreter where there is no GPU."""

import pytest
import torch
import torch.nn.functional as F

from specbackend import Engine
from specbackend.kernels.linear_small_m import make_split
from specbackend.models import quantization, tuned_linear, weight_only
from specbackend.models.linear import Linear
from specbackend.models.weight_only import MOST_ROWS, WeightOnlyLinear
from tests.checkpoints import write_target, write_tokenizer

E, D = 80, 640
DTYPES = {"int8wo": torch.int8, "fp8wo": torch.float8_e4m3fn}
ERROR = {"int8wo": 0.012, "fp8wo": 0.04}  # of the norm of an output's weights


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    """Nothing is timed, only the kernel is used."""
    for module in (tuned_linear, weight_only):
        monkeypatch.setattr(module, "fastest_split", lambda E, D, *_: make_split(D, 32, 3))


@pytest.fixture(params=[False, True], ids=["no bias", "bias"])
def layer(request, device) -> Linear:
    g = torch.Generator().manual_seed(0)
    weight_ED = torch.randn(E, D, generator=g) / D**0.5 * 10 ** torch.linspace(-2, 0, E)[:, None]
    bias_E = torch.randn(E, generator=g).to(device) if request.param else None
    return Linear(weight_ED.to(device), bias_E)


def rows_of(device, count: int, width: int = D) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count)).to(device)


@pytest.mark.parametrize("name", DTYPES)
def test_weights_are_rounded_output_by_output(name, layer):
    rounded = WeightOnlyLinear.of(layer, DTYPES[name])
    exact_ED, rounded_ED = layer.rows(slice(None)), rounded.rows(slice(None))
    error_E = (exact_ED - rounded_ED).norm(dim=1) / exact_ED.norm(dim=1)
    assert error_E.min() > 0 and error_E.max() < ERROR[name]
    assert torch.equal(rounded.rows(torch.tensor([7, 0])), rounded_ED[[7, 0]])
    assert rounded._weight_ED.dtype == DTYPES[name] and rounded.shape == layer.shape


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("rows", [1, 17, MOST_ROWS + 1])
def test_products_are_those_of_the_rounded_weight(name, rows, layer, device):
    rounded = WeightOnlyLinear.of(layer, DTYPES[name])
    x_TD, residual_TE = rows_of(device, rows), rows_of(device, rows, E)
    expected_TE = F.linear(x_TD, rounded.rows(slice(None)), layer.bias_E)
    torch.testing.assert_close(rounded(x_TD), expected_TE, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rounded(x_TD[None]), expected_TE[None], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        rounded.plus_(residual_TE.clone(), x_TD), expected_TE + residual_TE, atol=1e-4, rtol=1e-4
    )


def test_an_output_of_zeros(device):
    assert not WeightOnlyLinear(torch.zeros(4, 16, device=device), None, torch.int8)(rows_of(device, 2, 16)).any()


@pytest.mark.parametrize("name", DTYPES)
def test_engine_speculates_for_the_rounded_target(name, tmp_path, on_kernels, monkeypatch):
    """Plain and drafted, greedy and sampled, say the same; and all products of the layers are rounded ones."""
    monkeypatch.setattr(quantization, "_has_fp8", lambda device: True)
    write_target(tmp_path, "mimo", head_dim=16)
    write_tokenizer(tmp_path)
    engine = Engine(model_path=str(tmp_path), quantization=name, speculative_algorithm="NEXTN", dtype="float32")
    params = [{"temperature": 0, "max_new_tokens": 6}, {"temperature": 1.0, "seed": 3, "max_new_tokens": 5}]
    answers = [
        engine.generate(
            input_ids=[[5, 9, 2, 33], [8, 1, 12]], sampling_params=[each | {"speculative": drafted} for each in params]
        )
        for drafted in (False, True)
    ]
    plain, drafted = ([answer["output_ids"] for answer in each] for each in answers)
    assert plain == drafted
    for block in engine.plain.runner.model.layers:
        products = (block.attention.qkv, block.attention.out, block.mlp.gate_up, block.mlp.down)
        assert {type(each) for each in products} == {WeightOnlyLinear}
        assert {each._weight_ED.dtype for each in products} == {DTYPES[name]}
