"""Steps compiled by Inductor decode what others do, with few compilations whatever the batch and the prefix."""

import pytest
import torch
from torch._dynamo.utils import counters

from specbackend.models import linear
from specbackend.models.compiled import FewRows
from tests.test_algorithms import GREEDY, PROMPTS, TREE, make_engine, outputs, write_checkpoints

KINDS_OF_ROWS = 2  # one, and any other number
PARTS = 2  # of a layer
DRAFT_LAYERS = {
    "EAGLE": lambda head: head.layer,
    "EAGLE3": lambda head: head.layer,
    "NEXTN": lambda head: head.layer,
    "STANDALONE": lambda draft: draft.model.layers[-1],
}


@pytest.fixture(autouse=True)
def no_compilations():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {family: write_checkpoints(tmp_path_factory.mktemp(family), family) for family in ("llama", "mimo")}


def num_compilations() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("algorithm", DRAFT_LAYERS)
def test_drafts_are_compiled_too(algorithm, checkpoints):
    folder, _ = checkpoints["mimo" if algorithm == "NEXTN" else "llama"]
    engine = make_engine(folder, algorithm, enable_torch_compile=True, max_total_tokens=2000, torch_compile_max_bs=5)
    layer = DRAFT_LAYERS[algorithm](engine.decoder.drafter.grower.model)
    assert {type(layer.mlp), type(layer.attention.project)} == {FewRows}
    assert layer.mlp.most == 5 * (TREE["speculative_num_steps"] + 1), "the rows of the widest feed"


@pytest.mark.parametrize("algorithm", ["plain", "EAGLE", "EAGLE3", "NEXTN", "STANDALONE"])
def test_compiled_steps_equal_hf_generate(algorithm, checkpoints):
    folder, expected = checkpoints["mimo" if algorithm == "NEXTN" else "llama"]
    params = {"max_total_tokens": 2000, "disable_radix_cache": True}
    engine = make_engine(folder, algorithm, enable_torch_compile=True, **params)
    assert outputs(engine, PROMPTS) == expected
    assert outputs(engine, PROMPTS[:1]) == expected[:1]
    compiled = num_compilations()
    assert PARTS <= compiled <= PARTS * KINDS_OF_ROWS * (1 if algorithm == "plain" else 2)
    for batch in (2, 3, 5):
        assert outputs(engine, PROMPTS[-batch:]) == expected[-batch:]
    assert num_compilations() == compiled
    assert not counters["graph_break"]
    eager = make_engine(folder, algorithm, **params)
    for batch in (8, 1):
        eager.generate(input_ids=PROMPTS[:batch], sampling_params=GREEDY)
    for batch in (2, 3, 5):
        eager.generate(input_ids=PROMPTS[-batch:], sampling_params=GREEDY)
    assert engine.stats().verify_steps == eager.stats().verify_steps


@pytest.mark.usefixtures("no_compiler")
def test_packed_weights_stay_packed(checkpoints, monkeypatch):
    monkeypatch.setattr(linear, "MIN_PACKED_SIZE", 0)
    folder, expected = checkpoints["llama"]
    engine = make_engine(folder, "plain", enable_torch_compile=True, max_total_tokens=2000)
    assert outputs(engine, PROMPTS) == expected
    assert num_compilations()


def test_compiled_and_quantized(checkpoints):
    folder, _ = checkpoints["llama"]
    params = {"quantization": "int8wo", "max_total_tokens": 2000}
    compiled, eager = (make_engine(folder, "EAGLE", **params, enable_torch_compile=each) for each in (True, False))
    assert outputs(compiled, PROMPTS) == outputs(eager, PROMPTS)
    assert num_compilations()


def test_larger_batches_are_not_compiled(checkpoints):
    folder, expected = checkpoints["llama"]
    params = {"enable_torch_compile": True, "torch_compile_max_bs": 2, "max_total_tokens": 2000}
    engine = make_engine(folder, "plain", **params)
    assert outputs(engine, PROMPTS[2:5]) == expected[2:5]
    assert num_compilations() == 0
    assert outputs(engine, PROMPTS[2:4]) == expected[2:4]
    assert num_compilations() == PARTS


@pytest.mark.parametrize("rows, called", [(1, "compiled"), (4, "compiled"), (5, "part")])
def test_few_rows(rows, called):
    run = FewRows(part=lambda *rows: ("part", *rows), compiled=lambda *rows: ("compiled", *rows), most=4)
    x_TD, residual_TD = torch.zeros(rows, 2), torch.ones(rows, 2)
    name, *given = run(x_TD, residual_TD)
    assert name == called and given[0] is x_TD and given[1] is residual_TD
