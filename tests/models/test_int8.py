"""Rounded weights: how far off, exact for a row wherever it stands, and plain and speculative decoding still agree."""

import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from specbackend import Engine
from specbackend.errors import ConfigError
from specbackend.kernels import cpu
from specbackend.models import quantization
from specbackend.models.draft import DraftVocabulary
from specbackend.models.int8 import Int8Linear
from specbackend.models.linear import Linear, PackedLinear
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET
from tests.test_algorithms import PROMPTS, make_engine, write_checkpoints

E, D = 1100, 600
INT8 = {"quantization": "int8wo"}
INT8_DRAFT = {"speculative_draft_model_quantization": "int8wo"}


@pytest.fixture(params=[False, True], ids=["no bias", "bias"])
def weights(request):
    generator = torch.Generator().manual_seed(0)
    weight_ED = torch.randn(E, D, generator=generator) / D**0.5
    return weight_ED, torch.randn(E, generator=generator) if request.param else None


def output_ids(answers: list[dict]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


def products(module: object) -> list[Linear]:
    """All that a network multiplies by."""
    found = []
    for value in vars(module).values():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Linear):
                found.append(each)
            elif type(each).__module__.startswith("specbackend.models."):
                found += products(each)
    return found


def rounded(x: torch.Tensor) -> torch.Tensor:
    step = x.double().abs().amax(-1, keepdim=True) / 127
    return (x.double() / step).round() * step


def test_product_and_residual(weights):
    layer, x_TD, residual_TE = Int8Linear(*weights), torch.randn(5, D), torch.randn(5, E)
    weight_ED, bias_E = weights
    exact = F.linear(x_TD.double(), rounded(weight_ED), None if bias_E is None else bias_E.double())
    torch.testing.assert_close(layer(x_TD).double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        layer.plus_(residual_TE.clone(), x_TD).double(), residual_TE + exact, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(layer.rows(torch.tensor([77, 0])).double(), rounded(weight_ED[[77, 0]]))
    error = (layer(x_TD) - F.linear(x_TD, *weights)).std()
    assert error < 0.02, "of a result whose standard deviation is 1"


def test_scales_are_of_each_row_and_output():
    weight_ED = torch.randn(E, D) * 10 ** torch.linspace(-4, 4, E)[:, None]
    x_TD = torch.randn(9, D) * 10 ** torch.linspace(-4, 4, 9)[:, None]
    exact_TE = F.linear(x_TD.double(), weight_ED.double())
    error_TE = (Int8Linear(weight_ED)(x_TD) - exact_TE) / (x_TD.norm(dim=1)[:, None] * weight_ED.norm(dim=1))
    assert error_TE.abs().max() < 0.003
    assert torch.equal(Int8Linear(weight_ED)(torch.zeros(2, D)), torch.zeros(2, E))


def test_a_row_does_not_depend_on_its_company(weights):
    layer, x_TD, residual_TE = Int8Linear(*weights), torch.randn(64, D), torch.randn(64, E)
    product, sum_ = layer(x_TD), layer.plus_(residual_TE, x_TD)
    for some in (slice(first, first + rows) for first in (0, 7) for rows in (1, 2, 3, 5, 8, 13, 64)):
        assert torch.equal(layer(x_TD[some]), product[some])
        assert torch.equal(layer.plus_(residual_TE[some], x_TD[some]), sum_[some])


@pytest.mark.parametrize("kind", [Linear, PackedLinear])
def test_from_any_linear(kind, weights):
    x_BQD = torch.randn(2, 3, D)
    layer = Int8Linear.of(kind(*weights))
    assert torch.equal(layer(x_BQD), Int8Linear(*weights)(x_BQD))
    assert (layer.shape, layer.dtype) == ((E, D), torch.float32)


def test_bfloat16():
    weight_ED, x_TD = torch.randn(E, D).bfloat16(), torch.randn(4, D).bfloat16()
    y_TE = Int8Linear(weight_ED)(x_TD)
    assert y_TE.dtype == torch.bfloat16
    torch.testing.assert_close(y_TE.float(), F.linear(x_TD.float(), weight_ED.float()), rtol=2e-2, atol=1.5)


@pytest.mark.parametrize("algorithm", ["EAGLE", "EAGLE3", "STANDALONE"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without biases and with
def test_speculation_changes_nothing(algorithm, family, tmp_path):
    folder, _ = write_checkpoints(tmp_path, family)
    params = [{"temperature": t, "seed": 1, "max_new_tokens": 16} for t in (0, 0, 0, 0, 1.0, 1.0, 1.0, 1.0)]
    engines = [make_engine(folder, name, **INT8, max_total_tokens=2000) for name in ("plain", algorithm)]
    plain, drafted = (output_ids(engine.generate(input_ids=PROMPTS, sampling_params=params)) for engine in engines)
    assert plain == drafted
    for layer in engines[1].decoder.runner.model.layers:
        products = (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down)
        assert all(type(each) is Int8Linear for each in products)


@pytest.mark.parametrize(
    "algorithm, family", [("EAGLE", "llama"), ("EAGLE3", "qwen2"), ("STANDALONE", "llama"), ("NEXTN", "mimo")]
)
def test_a_rounded_draft(algorithm, family, tmp_path):
    """It may draft otherwise, and the answers stay those of the target, whose own weights are not rounded."""
    folder, _ = write_checkpoints(tmp_path, family)
    params = [{"temperature": t, "seed": 1, "max_new_tokens": 16} for t in (0, 0, 0, 0, 1.0, 1.0, 1.0, 1.0)]
    plain = make_engine(folder, "plain", max_total_tokens=2000)
    drafted = make_engine(folder, algorithm, **INT8_DRAFT, max_total_tokens=2000)
    texts = [output_ids(each.generate(input_ids=PROMPTS, sampling_params=params)) for each in (plain, drafted)]
    assert texts[0] == texts[1]
    draft, target = drafted.decoder.drafter.grower.model, drafted.decoder.runner.model
    assert {type(each) for each in products(draft)} == {Int8Linear}
    assert Int8Linear not in {type(each) for each in products(target)}


def test_what_was_rounded_is_gone_before_its_memory_is_given_back(monkeypatch):
    draft = SimpleNamespace(
        fc=Linear(torch.zeros(8, 4)), vocabulary=DraftVocabulary(Linear(torch.zeros(6, 8)), torch.arange(6))
    )
    exact = [weakref.ref(draft.fc), weakref.ref(draft.vocabulary.lm_head)]
    alive = []
    monkeypatch.setattr(quantization, "_rounding", lambda *_: lambda layer: Linear(torch.ones(layer.shape)))
    monkeypatch.setattr(quantization, "_give_back", lambda: alive.append([ref() for ref in exact]))
    quantization.quantize_draft(draft, "int8wo")
    assert alive == [[None, None]]


def test_a_rounded_head_matches_as_often(demo_prompts):
    params = {"temperature": 0, "max_new_tokens": 48, "ignore_eos": True}
    head = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(DEMO_EAGLE3)}
    counts = []
    for others in ({}, INT8_DRAFT):
        engine = Engine(
            model_path=str(DEMO_TARGET), **head, **others, max_total_tokens=1 << 13, speculative_adaptive=False
        )
        engine.generate(input_ids=demo_prompts[:20], sampling_params=params)
        counts.append(engine.stats().verify_steps)
    assert counts[1] < 1.05 * counts[0]


def test_the_demo_target_keeps_most_of_its_text(demo_prompts):
    params = {"temperature": 0, "max_new_tokens": 16}
    engines = [Engine(model_path=str(DEMO_TARGET), max_total_tokens=1 << 13, **others) for others in ({}, INT8)]
    exact, rounded_ = (
        output_ids(each.generate(input_ids=demo_prompts[:20], sampling_params=params)) for each in engines
    )
    assert sum(a == b for a, b in zip(exact, rounded_, strict=True)) >= 10


@pytest.mark.parametrize(
    "name, device, has_compiler, quantization",
    [
        ("quantization", "meta", True, "int8wo"),
        *(
            (name, "cpu", has_compiler, quantization)
            for name in ("quantization", *INT8_DRAFT)
            for has_compiler, quantization in ((False, "int8wo"), (True, "fp8wo"))
        ),
    ],
)
def test_where_it_is_not_served(name, device, has_compiler, quantization, monkeypatch):
    if not has_compiler:
        monkeypatch.setattr(cpu, "compiled", lambda: None)
    params = {"model_path": str(DEMO_TARGET), "device": device, "max_total_tokens": 2048, name: quantization}
    if name in INT8_DRAFT:
        params |= {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(DEMO_EAGLE3)}
    with pytest.raises(ConfigError, match=rf"^{name}: {quantization} "):
        Engine(**params)
