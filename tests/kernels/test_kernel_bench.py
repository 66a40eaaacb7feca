"""tools/kernel_bench on tiny shapes: what it compares, what it counts, what it makes of a wrong kernel."""

import json
import math
from functools import partial

import kernel_bench
import pytest
import torch

from kernels import linear_small_m, tree_attention

# float32, because the interpreter multiplies the bits of bfloat16 numbers
TINY_LINEAR = partial(linear_small_m.example_inputs, T=2, E=8, D=16, dtype=torch.float32)
TINY_ATTENTION = partial(tree_attention.example_inputs, B=2, Q=3, L=5, W=3, H=4, G=2, D=16, dtype=torch.float32)


def test_figures():
    figures = kernel_bench.bench(
        [(linear_small_m.linear_small_m, TINY_LINEAR), (tree_attention.tree_attention, TINY_ATTENTION)]
    )
    linear, attention = figures["rows"]
    assert linear["flop"] == 2 * 2 * 8 * 16
    assert linear["bytes"] == 4 * (2 * 16 + 8 * 16 + 2 * 8)
    assert attention["flop"] == 2 * 2 * (2 * 3 * 4 * 16) * (5 + 3)  # two products for each row, head and column
    for row in figures["rows"]:
        assert row["agrees"] and row["us"] > 0 and row["achieved"] == pytest.approx(row["floor_us"] / row["us"])
    assert linear["torch_us"] > 0 and attention["torch_us"] is None
    assert "linear_small_m" in kernel_bench.table(figures)
    assert json.loads(json.dumps(figures)) == figures


@pytest.mark.parametrize("wrong", [1.0, math.nan])
def test_a_wrong_kernel_is_not_timed(wrong, monkeypatch):
    reference = linear_small_m.linear_small_m_ref
    monkeypatch.setattr(linear_small_m, "linear_small_m_ref", lambda **inputs: reference(**inputs) + wrong)
    figures = kernel_bench.bench([(linear_small_m.linear_small_m, TINY_LINEAR)])
    assert not figures["rows"][0]["agrees"] and figures["rows"][0]["us"] is None
    assert "WRONG" in kernel_bench.table(figures)


def test_error():
    assert kernel_bench.error(torch.tensor([3.0, -math.inf]), torch.tensor([4.0, -math.inf])) == 0.25
    assert kernel_bench.error(torch.tensor([3.0, 1.0]), torch.tensor([3.0, -math.inf])) == math.inf
    assert kernel_bench.error(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25


def test_tensors_of_arguments_and_results():
    one, two = torch.ones(1), torch.ones(2)
    assert kernel_bench.tensors({"eps": 1e-5, "mode": "tree", "bias": None, "x": one, "more": (two,)}) == [one, two]


def test_every_kernel_has_a_reference():
    variants = kernel_bench.all_variants([])
    assert {launcher.__name__ for launcher, _ in variants} >= {"linear_small_m", "tree_attention"}
    assert all(callable(kernel_bench.reference_of(launcher)) for launcher, _ in variants)
