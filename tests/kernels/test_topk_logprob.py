import pytest
import torch

from specbackend.kernels.topk_logprob import (
    TopK,
    example_inputs,
    example_noisy_inputs,
    topk_logprob,
    topk_logprob_ref,
    topk_noisy_logprob,
    topk_noisy_logprob_ref,
)
from specbackend.sampling.pick import gumbel_noise
from tests.kernels.dtypes import DTYPES

INF = float("inf")


def assert_close(top: TopK, expected: TopK) -> None:
    assert torch.equal(top.index_RK, expected.index_RK)
    assert top.logprob_RK.dtype == torch.float32
    torch.testing.assert_close(top.logprob_RK, expected.logprob_RK, rtol=1e-6, atol=2e-6)


def assert_equals_reference(inputs: dict) -> None:
    assert_close(topk_logprob(**inputs), topk_logprob_ref(**inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R, W, k", [(1, 1, 1), (3, 7, 7), (2, 256, 1), (1, 257, 4), (2, 700, 10), (1, 600, 16)])
def test_equals_reference(R, W, k, dtype, device):
    assert_equals_reference(example_inputs(R, W, k, dtype=dtype, device=device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes the interpreter minutes")
@pytest.mark.parametrize("W", [32000, 128256, 160000])
def test_equals_reference_at_full_width(W, device):
    assert_equals_reference(example_inputs(R=16, W=W, k=8, device=device))


def test_ties_go_to_the_lower_index(device):
    """Within a tile of 256 and across tiles; 0.0 and -0.0 are equal."""
    logits_RW = torch.zeros(1, 600, device=device)
    logits_RW[:, [3, 300, 301, 599]] = 1.0
    logits_RW[:, :2] = -0.0
    top = topk_logprob(logits_RW, torch.ones(1, device=device), k=7)
    assert top.index_RK.tolist() == [[3, 300, 301, 599, 0, 1, 2]]


def test_minus_inf_comes_last(device):
    """Beside others, in a tile of its own, and in the whole row."""
    logits_RW = torch.full((2, 600), -INF, device=device)
    logits_RW[0, [290, 7]] = torch.tensor([2.0, 1.0], device=device)
    top = topk_logprob(logits_RW, torch.ones(2, device=device), k=3)
    assert top.index_RK.tolist() == [[290, 7, 0], [0, 1, 2]]
    expected = [*torch.tensor([2.0, 1.0]).log_softmax(0).tolist(), -INF]
    assert top.logprob_RK.tolist() == [pytest.approx(expected), [-INF] * 3]


def test_large_and_negative_logits(device):
    """The sum of exponentials does not overflow, and the keys of negative numbers are in order."""
    logits_RW = torch.tensor([[1000.0, 999.0, -1000.0], [-1.0, -0.5, -3.0]], device=device)
    assert_equals_reference({"logits_RW": logits_RW, "scale_B": torch.ones(2, device=device), "k": 3})


def test_rows_may_be_strided(device):
    inputs = example_inputs(R=4, W=300, k=3, dtype=torch.float32, device=device)
    assert_equals_reference(inputs | {"logits_RW": inputs["logits_RW"][::2, :280], "scale_B": inputs["scale_B"][:2]})


def test_a_row_is_the_same_in_any_company(device):
    inputs = example_inputs(R=3, W=600, k=4, dtype=torch.float32, device=device)
    together = topk_logprob(**inputs)
    alone = topk_logprob(inputs["logits_RW"][1:2], inputs["scale_B"][1:2], k=4)
    assert torch.equal(alone.logprob_RK, together.logprob_RK[1:2])
    assert torch.equal(alone.index_RK, together.index_RK[1:2])


@pytest.mark.parametrize("k", [0, 6, 17])
def test_rejects_k_out_of_range(k, device):
    with pytest.raises(AssertionError):
        topk_logprob(torch.zeros(1, 5 if k < 17 else 50, device=device), torch.ones(1, device=device), k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R, W, k", [(3, 7, 7), (1, 257, 4), (4, 700, 10)])
def test_with_noise_equals_reference(R, W, k, dtype, device):
    inputs = example_noisy_inputs(R, W, k, dtype=dtype, device=device)
    assert_close(topk_noisy_logprob(**inputs), topk_noisy_logprob_ref(**inputs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes the interpreter minutes")
@pytest.mark.parametrize("W", [32000, 128256])
def test_with_noise_equals_reference_at_full_width(W, device):
    inputs = example_noisy_inputs(R=16, W=W, k=8, device=device)
    assert_close(topk_noisy_logprob(**inputs), topk_noisy_logprob_ref(**inputs))


@pytest.mark.parametrize("B", [1, 2, 6])
def test_rows_of_the_same_request(B, device):
    inputs = example_noisy_inputs(R=6, W=300, k=4, B=B, dtype=torch.float32, device=device)
    assert_close(topk_noisy_logprob(**inputs), topk_noisy_logprob_ref(**inputs))
    plain = {name: inputs[name] for name in ("logits_RW", "scale_B", "k")}
    assert_equals_reference(plain)


def test_noise_alone_is_that_of_the_tokens(device):
    """Equal logits are ranked by the sampler's noise, whose tokens are the target's, not the draft's."""
    inputs = example_noisy_inputs(R=2, W=600, k=5, dtype=torch.float32, device=device)
    inputs["logits_RW"].zero_()
    noise_RW = gumbel_noise(inputs["seed_B"], inputs["position_R"][:, None], inputs["token_W"])[:, 0]
    assert torch.equal(topk_noisy_logprob(**inputs).index_RK, noise_RW.topk(5).indices)


def test_a_noise_scale_of_zero_is_no_noise(device):
    inputs = example_noisy_inputs(R=3, W=300, k=5, dtype=torch.float32, device=device)
    plain = topk_logprob(inputs["logits_RW"], inputs["scale_B"], k=5)
    noisy = topk_noisy_logprob(**inputs)
    assert torch.equal(noisy.logprob_RK[2], plain.logprob_RK[2])
    assert not torch.equal(noisy.logprob_RK[:2], plain.logprob_RK[:2])


def test_noise_leaves_minus_inf(device):
    inputs = example_noisy_inputs(R=2, W=600, k=3, dtype=torch.float32, device=device)
    inputs["logits_RW"].fill_(-INF)
    inputs["logits_RW"][0, 290] = -1e4
    top = topk_noisy_logprob(**inputs)
    assert top.index_RK.tolist() == [[290, 0, 1], [0, 1, 2]]
    assert top.logprob_RK.tolist() == [[0.0, -INF, -INF], [-INF] * 3]


def test_rejects_tokens_of_another_vocabulary(device):
    inputs = example_noisy_inputs(R=2, W=60, k=3, device=device)
    with pytest.raises(AssertionError):
        topk_noisy_logprob(**inputs | {"token_W": inputs["token_W"][:50]})
