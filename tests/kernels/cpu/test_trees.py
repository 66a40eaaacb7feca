"""What the CPU's kernels say of draft trees against the references of the kernels for GPUs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specbackend.kernels.accept_path import accept_path_ref
from specbackend.kernels.build_tree import build_tree_ref
from specbackend.kernels.cpu import trees
from specbackend.kernels.topk_logprob import topk_logprob_ref
from tests.speculative.random_trees import full_tree, random_candidates

SHAPES = [(1, 1, 2), (1, 5, 6), (4, 1, 2), (4, 3, 8), (4, 5, 8), (4, 3, 25), (3, 8, 32), (8, 4, 64), (10, 12, 128)]


def assert_best_of(logits_RW: torch.Tensor, scale: float, k: int) -> None:
    logprob_RK, index_RK = trees.topk_logprob(logits_RW, scale, k)
    expected = topk_logprob_ref(logits_RW, torch.full((len(logits_RW),), scale), k)
    assert torch.equal(index_RK, expected.index_RK)
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
