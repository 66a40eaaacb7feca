"""What the CPU's kernels say of draft trees against the references of the kernels for GPUs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specbackend.kernels.accept_path import accept_path_ref
from specbackend.kernels.build_tree import build_tree_ref
from specbackend.kernels.cpu import trees
from specbackend.kernels.limit_threshold import limit_threshold_ref
from specbackend.kernels.topk_logprob import topk_logprob_ref
from specbackend.sampling import Nodes, SamplingBatch, forecast
from specbackend.sampling.limits import UNLIMITED, scaled
from specbackend.sampling.pick import LOWEST_FORECAST_TEMPERATURE, gumbel_noise
from tests.speculative.random_trees import full_tree, random_candidates

SHAPES = [(1, 1, 2), (1, 5, 6), (4, 1, 2), (4, 3, 8), (4, 5, 8), (4, 3, 25), (3, 8, 32), (8, 4, 64), (10, 12, 128)]


def assert_best_of(logits_RW: torch.Tensor, scale: float, k: int) -> None:
    token_W = 7 + torch.randperm(logits_RW.shape[1], generator=torch.Generator().manual_seed(k))
    places = (torch.zeros(1, dtype=torch.int64), None, torch.zeros(1, len(logits_RW), dtype=torch.int64))
    logprob_1RK, token_1RK = trees.topk_logprob(k, logits_RW[None], token_W, 1 / scale, *places)
    logprob_RK, token_RK = logprob_1RK[0], token_1RK[0]
    expected = topk_logprob_ref(logits_RW, torch.full((len(logits_RW),), scale), k)
    assert torch.equal(token_RK, token_W[expected.index_RK])
    torch.testing.assert_close(logprob_RK, expected.logprob_RK, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "R, W, k", [(1, 1, 1), (3, 7, 7), (4, 16, 4), (2, 33, 10), (5, 512, 4), (9, 32003, 16)], ids=str
)
def test_topk_logprob(R, W, k, dtype):
    generator = torch.Generator().manual_seed(W)
    logits_RW = (5 * torch.randn(R, W, generator=generator)).to(dtype)
    assert_best_of(logits_RW, 2.0, k)
    assert_best_of(logits_RW[:, : W // 2 + 1].repeat(1, 2)[:, :W], 0.7, k)  # every value twice: the first counts
    wide = torch.cat([logits_RW, 100 + logits_RW], dim=1)
    assert_best_of(wide[:, :W], 1.0, k)  # rows that lie apart


@given(st.integers(1, 60), st.integers(0, 2**30))
@settings(max_examples=60, deadline=None)
def test_topk_logprob_of_few_values(W, seed):
    generator = torch.Generator().manual_seed(seed)
    logits_RW = torch.randint(-2, 3, (3, W), generator=generator).float()
    logits_RW[torch.rand(3, W, generator=generator) < 0.3] = -torch.inf
    logits_RW[2] = -torch.inf
    assert_best_of(logits_RW, 2.0, 1 + seed % W)


LIMITS = [
    *[(40, 0.95, 0.0), (1, math.inf, 0.0), (UNLIMITED, 0.9, 0.0), (UNLIMITED, 0.999, 0.0), (UNLIMITED, 1e-9, 0.0)],
    *[(5, math.inf, 0.2), (UNLIMITED, math.inf, 0.01), (UNLIMITED, math.inf, 0.0), (1000, 0.5, 0.001), (3, 0.99, 1.0)],
]


ROUNDING = 1e-6  # of top_p, within which it says whether a token stays


def assert_limited(logits_BNV: torch.Tensor, temperature_B: torch.Tensor, first: int = 0) -> None:
    """Of requests with LIMITS in turn, from `first` on."""
    B, N, _ = logits_BNV.shape
    limits = [LIMITS[(first + b) % len(LIMITS)] for b in range(B)]
    top_k_B, top_p_B = torch.tensor([k for k, _, _ in limits]), torch.tensor([p for _, p, _ in limits]).double()
    log_min_p_B = torch.tensor([p for _, _, p in limits]).log()
    before_BNV = logits_BNV.clone()
    actual_BNV = trees.limit(logits_BNV, temperature_B, top_k_B, top_p_B, log_min_p_B)
    assert torch.equal(logits_BNV, before_BNV)
    scaled_BNV = scaled(logits_BNV, temperature_B)

    def left_out(top_p_B: torch.Tensor) -> torch.Tensor:
        threshold_BN = limit_threshold_ref(scaled_BNV.flatten(0, 1), top_k_B, top_p_B).view(B, N)
        lowest_BN1 = threshold_BN.maximum(log_min_p_B[:, None])[:, :, None]
        return (scaled_BNV < lowest_BN1) & (temperature_B[:, None, None] > 0)

    goes_BNV = (actual_BNV == -torch.inf) & (logits_BNV > -torch.inf)
    assert torch.equal(actual_BNV, logits_BNV.masked_fill(goes_BNV, -torch.inf))
    must_go_BNV, may_go_BNV = left_out(top_p_B * (1 + ROUNDING)), left_out(top_p_B * (1 - ROUNDING))
    assert (must_go_BNV <= goes_BNV | (logits_BNV == -torch.inf)).all() and (goes_BNV <= may_go_BNV).all()


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N, V", [(1, 1), (3, 15), (2, 16), (3, 333), (1, 32003)])
def test_limits(N, V, dtype, scale):
    """In bfloat16 many tie. All may be likely, or one."""
    generator, B = torch.Generator().manual_seed(V), len(LIMITS)
    logits_BNV = (scale * torch.randn(B, N, V, generator=generator)).to(dtype)
    logits_BNV[torch.rand(B, N, V, generator=generator) < 0.1] = -torch.inf
    logits_BNV[:, :, 0] = 1.0
    for first in range(len(LIMITS)):
        assert_limited(logits_BNV, torch.tensor([0.7, 1.0, 0.0, 1e-3, 3.0])[torch.arange(B) % 5], first)


@given(st.integers(1, 60), st.integers(0, 2**30))
@settings(max_examples=100, deadline=None)
def test_limits_of_few_values(V, seed):
    generator = torch.Generator().manual_seed(seed)
    logits_BNV = torch.randint(-9, 3, (len(LIMITS), 1, V), generator=generator).float()
    assert_limited(logits_BNV, torch.ones(len(LIMITS)), seed)


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
def test_rows_without_a_best_have_no_limits(value):
    logits_BNV = torch.full((1, 1, 40), value)
    limits = torch.tensor([3]), torch.tensor([0.5]).double(), torch.tensor([-1.0])
    actual_BNV = trees.limit(logits_BNV, torch.ones(1), *limits)
    torch.testing.assert_close(actual_BNV, logits_BNV, equal_nan=True)


def test_a_rows_limits_are_its_own():
    logits_BNV = torch.randn(3, 4, 700, generator=torch.Generator().manual_seed(0))
    top_k_B, top_p_B = torch.tensor([9, 5, 70]), torch.tensor([0.9, 0.5, 0.1]).double()
    limits = torch.tensor([0.5, 0.9, 1.5]), top_k_B, top_p_B, torch.full((3,), -3.0)
    together = trees.limit(logits_BNV, *limits)
    alone = [trees.limit(logits_BNV[b : b + 1], *(each[b : b + 1] for each in limits)) for b in range(3)]
    assert torch.equal(together, torch.cat(alone))


def pick(logits_BNV: torch.Tensor, temperature_B: torch.Tensor | None = None) -> torch.Tensor:
    """With seeds and positions that are large, negative, and again and again the same."""
    B, N, _ = logits_BNV.shape
    seed_B = torch.tensor([0, 1, -5, 2**62, -(2**63)])[torch.arange(B) % 5]
    position_BN = (torch.arange(B)[:, None] * 1000 + torch.arange(N) // 2).expand(B, N)
    return trees.pick(logits_BNV, seed_B, temperature_B, position_BN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, N, V", [(1, 1, 1), (2, 3, 127), (3, 1, 128), (2, 2, 257), (4, 8, 8192), (1, 3, 32003)])
def test_greedy_picks(B, N, V, dtype):
    generator = torch.Generator().manual_seed(V)
    logits_BNV = torch.randn(B, N, V, generator=generator).to(dtype)  # in bfloat16 many are equal: the first counts
    expected_BN = logits_BNV.float().sort(dim=2, descending=True, stable=True).indices[:, :, 0]
    assert torch.equal(pick(logits_BNV), expected_BN)
    assert torch.equal(pick(logits_BNV, torch.zeros(B)), expected_BN)
    wide = torch.cat([logits_BNV, 9 + logits_BNV], dim=2)
    assert torch.equal(pick(wide[:, :, :V]), expected_BN)
    assert torch.equal(pick(wide), expected_BN + V)


@given(st.integers(1, 300), st.integers(0, 2**30))
@settings(max_examples=60, deadline=None)
def test_greedy_picks_of_few_values(V, seed):
    generator = torch.Generator().manual_seed(seed)
    logits_RV = torch.randint(-2, 1 + seed % 3, (3, V), generator=generator).float()
    logits_RV[torch.rand(3, V, generator=generator) < 0.3] = -torch.inf
    logits_RV[2] = -torch.inf
    expected_R = logits_RV.sort(dim=1, descending=True, stable=True).indices[:, 0]
    assert torch.equal(pick(logits_RV[None])[0], expected_R)


@pytest.mark.parametrize("temperature", [None, 0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("V", [5, 128, 300])
def test_rows_that_have_no_best_give_some_token(V, value, temperature):
    temperature_B = None if temperature is None else torch.tensor([temperature])
    assert 0 <= pick(torch.full((1, 1, V), value), temperature_B).item() < V


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, N, V", [(1, 1, 1), (5, 3, 127), (3, 1, 128), (6, 8, 1000), (2, 3, 32003)])
def test_sampled_picks(B, N, V, dtype, monkeypatch):
    """Beside greedy ones, by the noise that torch makes."""
    generator = torch.Generator().manual_seed(V)
    logits_BNV = (3 * torch.randn(B, N, V, generator=generator)).to(dtype)
    logits_BNV[torch.rand(B, N, V, generator=generator) < 0.1] = -torch.inf
    logits_BNV[:, :, 0] = 1.0
    temperature_B = torch.tensor([0.7, 1e-4, 0.0, 1.0, 100.0])[torch.arange(B) % 5]
    actual_BN = pick(logits_BNV, temperature_B)
    monkeypatch.setattr(trees, "pick", picks_of_torch)
    assert torch.equal(actual_BN, pick(logits_BNV, temperature_B))


def picks_of_torch(logits_BNV, seed_B, temperature_B, position_BN) -> torch.Tensor:
    noise_BNV = gumbel_noise(seed_B, position_BN, torch.arange(logits_BNV.shape[2]))
    noisy_BNV = scaled(logits_BNV, temperature_B) + noise_BNV
    return logits_BNV.float().where(temperature_B[:, None, None] == 0, noisy_BNV).argmax(dim=2)


def test_noise_is_that_of_torch():
    """To the last bits, at both ends too: the log-probability of the only token but a fixed one tells it."""
    N, token_W = 100_000, torch.tensor([7, 2**40])
    seed_B, position_BN = torch.tensor([3]), torch.arange(N)[None]
    logits_BNW = torch.zeros(1, N, 2)
    logprob_BNK, token_BNK = trees.topk_logprob(2, logits_BNW, token_W, 0.5, seed_B, torch.ones(1), position_BN)
    noise_BNW = gumbel_noise(seed_B, position_BN, token_W)
    expected = noise_BNW.log_softmax(dim=2).sort(dim=2, descending=True, stable=True)
    assert noise_BNW.min() < -2.4 and noise_BNW.max() > 11
    torch.testing.assert_close(logprob_BNK, expected.values, rtol=2e-6, atol=3e-6)
    assert torch.equal(token_BNK, token_W[expected.indices])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, N, W, k", [(1, 1, 1, 1), (5, 4, 130, 4), (6, 1, 8192, 10)], ids=str)
def test_forecasts_of_sampled_requests(B, N, W, k, dtype):
    """Some of them greedy, and of a draft that knows some tokens only."""
    generator = torch.Generator().manual_seed(W)
    logits_BNW = (3 * torch.randn(B, N, W, generator=generator)).to(dtype)
    token_W = torch.randperm(2 * W, generator=generator)[:W]
    temperature_B = torch.tensor([0.7, 0.2, 0.0, 1.0, 5.0])[torch.arange(B) % 5]
    sampling = SamplingBatch(temperature_B, torch.arange(B) - 2, any_sampled=True)
    nodes = Nodes.positions(torch.randint(5000, (B, N), generator=generator))
    best = forecast(logits_BNW, token_W, 2 * W, nodes, sampling).sort(dim=2, descending=True, stable=True)
    noise = (sampling.seed_B, temperature_B, nodes.position_BN)
    logprob_BNK, token_BNK = trees.topk_logprob(k, logits_BNW, token_W, LOWEST_FORECAST_TEMPERATURE, *noise)
    torch.testing.assert_close(logprob_BNK, best.values[:, :, :k], rtol=5e-6, atol=5e-6)
    assert torch.equal(token_BNK, token_W[best.indices[:, :, :k]])


def test_extreme_logits():
    assert_best_of(torch.tensor([[3e38, -3e38, 0.0, -torch.inf], [-1e30, -1e30, -1e30, -2e30]]), 1.0, 4)


@pytest.mark.parametrize("ties", [False, True], ids=["no-ties", "ties"])
@pytest.mark.parametrize("K, num_steps, N", SHAPES, ids=str)
def test_build_tree(K, num_steps, N, ties):
    """Smaller trees than the others among them, and candidates that are none."""
    B, generator = 12, torch.Generator().manual_seed(N)
    candidates = random_candidates(B, K, num_steps, 100, generator, ties)
    score_BC, parent_BC = candidates.score_BC.clone(), candidates.parent_BC
    for candidate in range(score_BC.shape[1]):  # what is below one that is none is none
        gone_B = torch.rand(B, generator=generator) < 0.1
        parent_B = parent_BC[:, candidate]
        gone_B |= (parent_B >= 0) & (score_BC.gather(1, parent_B.clamp(min=0)[:, None])[:, 0] == -torch.inf)
        score_BC[gone_B, candidate] = -torch.inf
    num_nodes_B = torch.randint(1, N + 1, (B,), generator=generator)
    inputs = (torch.arange(B) + 500, score_BC, candidates.token_BC, parent_BC, num_nodes_B, N)
    for field, actual in zip(vars(build_tree_ref(*inputs)).items(), trees.build_tree(*inputs), strict=True):
        assert torch.equal(actual, field[1]), field[0]


def test_a_tree_of_all_candidates():
    candidates = random_candidates(2, 2, 2, 100, torch.Generator().manual_seed(0))
    inputs = (torch.arange(2), candidates.score_BC, candidates.token_BC, candidates.parent_BC, torch.tensor([9, 4]), 9)
    for expected, actual in zip(vars(build_tree_ref(*inputs)).values(), trees.build_tree(*inputs), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("K, num_steps, N", SHAPES, ids=str)
def test_accept_path(K, num_steps, N):
    """Picks that often agree, and nodes that only fill the tree up."""
    B, generator = 30, torch.Generator().manual_seed(N)
    tree = full_tree(torch.arange(B), random_candidates(B, K, num_steps, 12, generator), N)
    drafted_BN = torch.rand(B, N, generator=generator) < 0.9
    drafted_BN[:, 0] = True
    pick_BN = torch.randint(0, 12, (B, N), generator=generator)
    child_B1 = torch.randint(0, N, (B, 1), generator=generator)
    for _ in range(3):  # make the target agree with the way to some node
        pick_BN.scatter_(1, tree.parent_BN.gather(1, child_B1), tree.token_BN.gather(1, child_B1))
        child_B1 = tree.parent_BN.gather(1, child_B1)
    expected = accept_path_ref(tree.token_BN, tree.parent_BN, tree.mask_BNN, drafted_BN, pick_BN)
    order_BN, count_B = trees.accept_path(tree.token_BN, tree.parent_BN, drafted_BN, pick_BN)
    assert torch.equal(order_BN, expected.order_BN) and torch.equal(count_B, expected.count_B)
    assert N == 2 or count_B.max() > 1
