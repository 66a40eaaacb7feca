import pytest
import torch
import triton
import triton.language as tl

from specbackend.kernels import argmax_pick as module
from specbackend.kernels.argmax_pick import argmax_pick, argmax_pick_ref, example_inputs, gumbel_noise_ref
from specbackend.sampling.pick import gumbel_noise
from tests.kernels.dtypes import DTYPES

EDGES = [0, 1, -1, 2**63 - 1, -(2**63), 0x1234567890ABCDEF]


@triton.jit
def _noise_kernel(seed_ptr, position_ptr, noise_ptr, V: tl.constexpr):
    r, v = tl.program_id(0), tl.arange(0, V)
    noise = module._gumbel_noise(tl.load(seed_ptr + r), tl.load(position_ptr + r), v)
    tl.store(noise_ptr + r * V + v, noise)


def test_noise_is_that_of_the_sampler(device):
    seed_R = torch.tensor(EDGES, device=device)
    position_R = torch.arange(len(EDGES), device=device) * 1000
    noise_RV = torch.empty(len(EDGES), 4096, device=device)
    _noise_kernel[(len(EDGES),)](seed_R, position_R, noise_RV, V=4096)
    expected_RV = gumbel_noise(seed_R, position_R[:, None], torch.arange(4096, device=device))[:, 0]
    assert torch.equal(gumbel_noise_ref(seed_R, position_R, 4096), expected_RV)
    if device == "cuda":
        assert torch.equal(noise_RV, expected_RV)  # both are libdevice's logarithm
    torch.testing.assert_close(noise_RV, expected_RV, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R, V", [(1, 1), (300, 97), (150, 256), (60, 700)])
def test_equals_reference(R, V, dtype, device):
    inputs = example_inputs(R, V, dtype=dtype, device=device)
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
    inputs["temperature_R"].fill_(1e-38)
    assert torch.equal(argmax_pick(**inputs), inputs["logits_RV"].argmax(dim=1))


def test_rows_may_be_strided_and_picks_do_not_depend_on_company(device):
    inputs = example_inputs(R=40, V=600, dtype=torch.float32, device=device)
    some = {name: each[::3] for name, each in inputs.items()}
    some = {name: each if name == "logits_RV" else each.contiguous() for name, each in some.items()}
    assert torch.equal(argmax_pick(**some), argmax_pick(**inputs)[::3])
