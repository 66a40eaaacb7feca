"""Picked tokens follow softmax(logits / temperature), independently at each position, reproducibly by seed."""

import pytest
import torch

from specbackend.request import Request
from specbackend.sampling import Nodes, SamplingBatch, pick
from specbackend.sampling.pick import gumbel_noise
from specbackend.sampling_params import SamplingParams
from tests.chi_square import SIGNIFICANT, chi_square_p

DRAWS = 200_000
LOGITS_V = torch.tensor([1.0, -0.5, 0.3, 2.2, 0.0, -1.5, 1.7, 0.9])
V = len(LOGITS_V)


def sampling_batch(temperature: float | list[float], seeds: list[int] | torch.Tensor) -> SamplingBatch:
    seed_B = torch.as_tensor(seeds)
    temperature_B = torch.tensor(temperature).expand(len(seed_B))
    return SamplingBatch(temperature_B, seed_B, any_sampled=bool(temperature_B.any()))


def pick_tokens(logits_BNV: torch.Tensor, position_BN: torch.Tensor, sampling: SamplingBatch) -> torch.Tensor:
    """Where nothing depends on the text."""
    B, N = position_BN.shape
    no_text = Nodes(torch.zeros_like(position_BN), position_BN, torch.ones(1, 1, 1, dtype=torch.bool).expand(B, N, N))
    return pick.pick_tokens(logits_BNV, no_text, sampling)


def draws(temperature: float, first_seed: int, positions: list[int]) -> torch.Tensor:
    """[D, N]: what DRAWS requests of consecutive seeds pick at each of the positions."""
    seed_D = first_seed + torch.arange(DRAWS)
    logits_DNV = LOGITS_V.expand(DRAWS, len(positions), V)
    position_DN = torch.tensor(positions).expand(DRAWS, -1)
    return pick_tokens(logits_DNV, position_DN, sampling_batch(temperature, seed_D))


def marginal_p(picked_D: torch.Tensor, temperature: float) -> float:
    return chi_square_p(picked_D, (LOGITS_V / temperature).softmax(0))


def joint_p(picked_D2: torch.Tensor, temperature: float) -> float:
    probability_V = (LOGITS_V / temperature).softmax(0)
    return chi_square_p(picked_D2[:, 0] * V + picked_D2[:, 1], torch.outer(probability_V, probability_V).flatten())


@pytest.mark.parametrize("first_seed", [0, 12345, -(1 << 63), (1 << 63) - DRAWS], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_softmax(temperature, first_seed):
    assert marginal_p(draws(temperature, first_seed, [17])[:, 0], temperature) > SIGNIFICANT


def test_draws_of_one_seed_over_positions_follow_softmax():
    position_1D = torch.arange(DRAWS)[None]
    picked_D = pick_tokens(LOGITS_V.expand(1, DRAWS, V), position_1D, sampling_batch(1.0, [7]))[0]
    assert marginal_p(picked_D, 1.0) > SIGNIFICANT
    assert joint_p(picked_D.view(-1, 2), 1.0) > SIGNIFICANT


def test_positions_are_independent():
    assert joint_p(draws(1.0, first_seed=5, positions=[9, 10]), 1.0) > SIGNIFICANT


def test_neighbouring_seeds_are_independent():
    assert joint_p(draws(1.0, first_seed=0, positions=[3])[:, 0].view(-1, 2), 1.0) > SIGNIFICANT


def test_the_test_sees_a_temperature_off_by_two_percent():
    assert marginal_p(draws(1.02, first_seed=0, positions=[17])[:, 0], 1.0) < SIGNIFICANT


def test_the_test_sees_a_token_favoured_by_one_percent():
    picked_D = draws(1.0, first_seed=0, positions=[17])[:, 0]
    picked_D[: DRAWS // 100] = 0
    assert marginal_p(picked_D, 1.0) < SIGNIFICANT


def test_the_test_sees_noise_shared_by_one_percent_of_the_positions():
    picked_D2 = draws(1.0, first_seed=5, positions=[9, 10])
    picked_D2[: DRAWS // 100, 1] = picked_D2[: DRAWS // 100, 0]
    assert joint_p(picked_D2, 1.0) < SIGNIFICANT


def splitmix64(x: int) -> int:
    """As published, on Python's integers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


@pytest.mark.parametrize("seed", [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1], ids=hex)
def test_noise_equals_its_definition(seed):
    sampling = SamplingBatch.of([Request("a", [1], seed=seed)], "cpu")
    noise_NV = gumbel_noise(sampling.seed_B, torch.tensor([[0, 1, 100_000]]), torch.arange(4))[0]
    for row_V, position in zip(noise_NV, [0, 1, 100_000], strict=True):
        stream = splitmix64((splitmix64(seed) + position) % 2**64)
        bits = torch.tensor([splitmix64((stream + token) % 2**64) >> 41 for token in range(4)])
        uniform = (bits.double() + 0.5) / 2**23
        torch.testing.assert_close(row_V, -torch.log(-torch.log(uniform)).float(), rtol=1e-4, atol=1e-6)


def test_noise_depends_on_seed_position_and_token_alone():
    seed_B, position_BN = torch.tensor([3, 4, 3]), torch.tensor([[5, 6], [5, 6], [6, 9]])
    noise_BNV = gumbel_noise(seed_B, position_BN, torch.arange(50))
    assert torch.equal(noise_BNV[0, 1], noise_BNV[2, 0]), "seed 3, position 6, in two places"
    assert torch.equal(gumbel_noise(seed_B[1:2], position_BN[1:2, 1:], torch.arange(20))[0, 0], noise_BNV[1, 1, :20])
    distinct_RV = torch.cat([noise_BNV[0], noise_BNV[1], noise_BNV[2, 1:]])
    assert distinct_RV.unique().numel() == distinct_RV.numel()


@pytest.mark.parametrize("bits, extreme", [(0, -2.8), (-1, 16.6)], ids=["all-zero", "all-one"])
def test_extreme_bits_stay_finite(bits, extreme, monkeypatch):
    monkeypatch.setattr(pick, "_mix", lambda x: torch.full_like(x, bits))
    noise = gumbel_noise(torch.tensor([1]), torch.tensor([[1]]), torch.tensor([0]))
    assert noise.item() == pytest.approx(extreme, abs=0.1)


def test_greedy_rows_of_a_mixed_batch_stay_greedy():
    torch.manual_seed(0)
    logits_BNV = torch.randn(64, 3, 20)
    position_BN = torch.arange(3).expand(64, 3)
    mixed = sampling_batch([0.0, 1.0] * 32, torch.arange(64))
    picked_BN = pick_tokens(logits_BNV, position_BN, mixed)
    assert torch.equal(picked_BN[::2], logits_BNV[::2].argmax(-1))
    assert not torch.equal(picked_BN[1::2], logits_BNV[1::2].argmax(-1))
    alone = sampling_batch(1.0, torch.arange(1, 64, 2))
    assert torch.equal(picked_BN[1::2], pick_tokens(logits_BNV[1::2], position_BN[1::2], alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_greedy_takes_the_first_of_equal_tokens_whatever_the_batch(dtype):
    logits_BNV = torch.tensor([[[1.0, 3.0, 3.0]], [[2.0, 2.0, 0.0]]], dtype=dtype)
    position_BN = torch.tensor([[4], [4]])
    for temperature in ([0.0, 0.0], [0.0, 1.0]):
        picked_BN = pick_tokens(logits_BNV, position_BN, sampling_batch(temperature, [1, 2]))
        assert picked_BN[0, 0] == 1


def test_low_temperature_is_nearly_greedy():
    assert (draws(1e-6, first_seed=0, positions=[1]) == LOGITS_V.argmax()).all()


def test_tiny_temperature_is_greedy_and_does_not_overflow():
    logits = torch.tensor([[[1.0, 5.0, 9.0, 2.0]]])
    picked = pick_tokens(logits, torch.tensor([[5]]), sampling_batch(1e-38, [3]))
    assert picked.tolist() == [[2]]


def test_sampling_batch_of_requests():
    requests = [
        Request("a", [1], SamplingParams(temperature=0), seed=(1 << 64) - 1),
        Request("b", [1], SamplingParams(temperature=0.5), seed=5),
    ]
    sampling = SamplingBatch.of(requests, "cpu")
    assert (sampling.temperature_B.tolist(), sampling.seed_B.tolist()) == ([0.0, 0.5], [-1, 5])
    assert sampling.any_sampled and not SamplingBatch.of(requests[:1], "cpu").any_sampled
