import pytest
import torch

from specbackend.kernels.argmax_pick import argmax_pick, argmax_pick_ref, example_inputs
from tests.kernels.dtypes import DTYPES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R, V", [(1, 1), (300, 97), (150, 256), (60, 700)])
def test_equals_reference(R, V, dtype, device):
    inputs = example_inputs(R, V, dtype=dtype, device=device)
    assert torch.equal(argmax_pick(**inputs), argmax_pick_ref(**inputs))


@pytest.mark.parametrize("B", [1, 2, 4])
def test_rows_of_the_same_request(B, device):
    inputs = example_inputs(R=12, V=300, B=B, device=device, dtype=torch.float32)
    assert torch.equal(argmax_pick(**inputs), argmax_pick_ref(**inputs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes the interpreter minutes")
def test_equals_reference_at_full_width(device):
    inputs = example_inputs(R=64, V=128256, device=device)
    assert torch.equal(argmax_pick(**inputs), argmax_pick_ref(**inputs))


def test_greedy_ties_go_to_the_first(device):
    logits_RV = torch.full((2, 600), -1.0, device=device)
    logits_RV[0, [299, 300, 599]] = 3.0
    logits_RV[1, 7:9] = torch.tensor([-0.0, 0.0], device=device)
    zeros = torch.zeros(2, device=device)
    assert argmax_pick(logits_RV, zeros, zeros.long(), zeros.long()).tolist() == [299, 7]


def test_forbidden_tokens_are_not_picked(device):
    inputs = example_inputs(R=30, V=300, dtype=torch.float32, device=device)
    inputs["logits_RV"][:, 1:299] = -torch.inf
    assert set(argmax_pick(**inputs).tolist()) == {0, 299}


def test_a_row_of_forbidden_tokens_gives_some_token(device):
    inputs = example_inputs(R=3, V=300, dtype=torch.float32, device=device)
    inputs["logits_RV"].fill_(-torch.inf)
    assert argmax_pick(**inputs).tolist() == [0, 0, 0]


def test_tiny_temperatures_do_not_overflow(device):
    inputs = example_inputs(R=30, V=300, dtype=torch.float32, device=device)
    inputs["temperature_B"].fill_(1e-38)
    assert torch.equal(argmax_pick(**inputs), inputs["logits_RV"].argmax(dim=1))


def test_rows_may_be_strided_and_picks_do_not_depend_on_company(device):
    inputs = example_inputs(R=40, V=600, dtype=torch.float32, device=device)
    some = {name: each[::3] for name, each in inputs.items()}
    some = {name: each if name == "logits_RV" else each.contiguous() for name, each in some.items()}
    assert torch.equal(argmax_pick(**some), argmax_pick(**inputs)[::3])
