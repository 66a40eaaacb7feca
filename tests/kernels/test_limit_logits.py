import pytest
import torch

from specbackend.kernels.limit_logits import example_inputs, limit_logits_, limit_logits_ref_

INF, ALL = float("inf"), torch.iinfo(torch.int64).max


def assert_equals_reference(inputs: dict) -> None:
    expected = limit_logits_ref_(**inputs | {"scaled_RV": inputs["scaled_RV"].clone()})
    assert torch.equal(limit_logits_(**inputs), expected)


def kept(scaled_V: list[float], top_k: int, top_p: float, device) -> list[int]:
    scaled_1V = torch.tensor([scaled_V], device=device)
    limits = torch.tensor([top_k], device=device), torch.tensor([top_p], dtype=torch.float64, device=device)
    return limit_logits_(scaled_1V, *limits)[0].isfinite().nonzero()[:, 0].tolist()


@pytest.mark.parametrize("R, V, B", [(1, 1, 1), (24, 7, 24), (16, 256, 8), (16, 1000, 16), (2, 20000, 1)])
def test_equals_reference(R, V, B, device):
    assert_equals_reference(example_inputs(R, V, B, device=device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes the interpreter minutes")
def test_equals_reference_at_full_width(device):
    assert_equals_reference(example_inputs(R=64, V=128256, B=16, device=device))


@pytest.mark.parametrize("seed", range(4))
def test_distinct_logits(seed, device):
    """No two are equal, and the sum above no token comes within 1e-5 of top_p."""
    g = torch.Generator().manual_seed(seed)
    logits_RV = 3 * torch.randn(12, 300, generator=g)
    scaled_RV = logits_RV - logits_RV.amax(dim=1, keepdim=True)
    mass_RV = scaled_RV.double().softmax(1).sort(dim=1, descending=True).values.cumsum(1)
    middle_R = torch.randint(0, 40, (12,), generator=g)[:, None]
    top_p_R = (mass_RV.gather(1, middle_R) + mass_RV.gather(1, middle_R + 1))[:, 0] / 2  # halfway between two sums
    top_k_R = torch.randint(1, 60, (12,), generator=g)
    assert ((mass_RV - top_p_R[:, None]).abs() > 1e-5).all()
    inputs = {"scaled_RV": scaled_RV, "top_k_B": top_k_R, "top_p_B": top_p_R}
    assert_equals_reference({name: each.to(device) for name, each in inputs.items()})


def test_exact_cases(device):
    """Probabilities 1/2, 1/4, 1/8, 1/8: the sums are exact."""
    scaled_V = torch.tensor([1 / 4, 1, 1 / 2, 1 / 4]).log().tolist()
    assert kept(scaled_V, 1, INF, device) == [1]
    assert kept(scaled_V, 2, INF, device) == [1, 2]
    assert kept(scaled_V, 3, INF, device) == [0, 1, 2, 3], "ties stay together"
    assert kept(scaled_V, ALL, 0.4, device) == kept(scaled_V, ALL, 1e-30, device) == [1]
    assert kept(scaled_V, ALL, 0.51, device) == kept(scaled_V, ALL, 0.74, device) == [1, 2]
    assert kept(scaled_V, ALL, 0.76, device) == kept(scaled_V, ALL, INF, device) == [0, 1, 2, 3]
    assert kept(scaled_V, 1, 0.76, device) == [1], "the fewest of the two"
    assert kept(scaled_V, 3, 0.51, device) == [1, 2]


def test_the_best_is_not_alone(device):
    assert kept([0.0, -0.0, -1.0, 0.0], 1, 1e-30, device) == [0, 1, 3]
    assert kept([0.0] * 5, 2, 0.5, device) == [0, 1, 2, 3, 4]


def test_forbidden_tokens_stay_forbidden(device):
    assert kept([-INF, 0.0, -INF, -3.0], ALL, 0.9999, device) == [1, 3]
    assert kept([-INF, 0.0, -INF], 3, INF, device) == [1]
    assert kept([-INF, 0.0, -1e38, -3.0, -1e-40], 3, INF, device) == [1, 3, 4]


def test_rows_do_not_depend_on_company(device):
    inputs = example_inputs(R=8, V=500, device=device)
    alone = {name: each[5:6].clone() for name, each in inputs.items()}
    assert torch.equal(limit_logits_(**alone), limit_logits_(**inputs)[5:6])
