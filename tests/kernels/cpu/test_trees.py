"""What the CPU's kernels say of draft trees against the references of the kernels for GPUs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specbackend.config import TreeShape
from specbackend.kernels import cpu
from specbackend.kernels.accept_path import accept_path_ref
from specbackend.kernels.build_tree import build_tree_ref
from specbackend.kernels.cpu import trees
from specbackend.kernels.topk_logprob import topk_logprob_ref
from specbackend.sampling import Likeliest
from specbackend.speculative.beam import Beam, next_level
from specbackend.speculative.tree_shapes import TreeShapes
from tests.speculative.random_trees import full_tree, random_candidates

SHAPES = [(1, 1, 2), (1, 5, 6), (4, 1, 2), (4, 3, 8), (4, 5, 8), (4, 3, 25), (3, 8, 32), (8, 4, 64), (10, 12, 128)]


def assert_best_of(logits_RW: torch.Tensor, scale: float, k: int) -> None:
    token_W = 7 + torch.randperm(logits_RW.shape[1], generator=torch.Generator().manual_seed(k))
    logprob_1RK, token_1RK = trees.topk_logprob(logits_RW[None], scale, k, token_W)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, N, V", [(1, 1, 1), (2, 3, 127), (3, 1, 128), (2, 2, 257), (4, 8, 8192), (1, 3, 32003)])
def test_argmax(B, N, V, dtype):
    generator = torch.Generator().manual_seed(V)
    logits_BNV = torch.randn(B, N, V, generator=generator).to(dtype)  # in bfloat16 many are equal: the first counts
    expected_BN = logits_BNV.float().sort(dim=2, descending=True, stable=True).indices[:, :, 0]
    assert torch.equal(trees.argmax(logits_BNV), expected_BN)
    wide = torch.cat([logits_BNV, 9 + logits_BNV], dim=2)
    assert torch.equal(trees.argmax(wide[:, :, :V]), expected_BN)
    assert torch.equal(trees.argmax(wide), expected_BN + V)


@given(st.integers(1, 300), st.integers(0, 2**30))
@settings(max_examples=60, deadline=None)
def test_argmax_of_few_values(V, seed):
    generator = torch.Generator().manual_seed(seed)
    logits_RV = torch.randint(-2, 1 + seed % 3, (3, V), generator=generator).float()
    logits_RV[torch.rand(3, V, generator=generator) < 0.3] = -torch.inf
    logits_RV[2] = -torch.inf
    expected_R = logits_RV.sort(dim=1, descending=True, stable=True).indices[:, 0]
    assert torch.equal(trees.argmax(logits_RV[None])[0], expected_R)


@pytest.mark.parametrize("V", [5, 128, 300])
def test_what_is_no_number_has_an_index_nevertheless(V):
    assert trees.argmax(torch.full((1, 1, V), torch.nan)).item() == 0


@pytest.mark.parametrize("ties", [False, True], ids=["no-ties", "ties"])
@pytest.mark.parametrize("K, num_steps, dtype", [(1, 4, torch.float32), (3, 1, torch.float32), (4, 5, torch.bfloat16)])
def test_levels(K, num_steps, dtype, ties, monkeypatch):
    """Of requests some of which have smaller trees, level by level, from the root on."""
    B, D, generator = 6, 5, torch.Generator().manual_seed(K)
    sizes = [(1 + b % num_steps, 1 + b % K) for b in range(B)]
    shapes = TreeShapes.of([TreeShape(steps, topk, 2) for steps, topk in sizes], torch.device("cpu"))
    W = (num_steps - 1) * K
    own_LKW = torch.eye(W, dtype=torch.bool).view(num_steps - 1, K, W)
    actual = expected = Beam.root(torch.arange(B), W)
    for level in range(num_steps):
        P = actual.token_BP.shape[1]
        hidden_BPD = torch.randn(B, P, D, generator=generator).to(dtype)
        likely = Likeliest(*random_children(B, P, K, ties, generator))
        own_KW = own_LKW[level] if level < num_steps - 1 else None
        candidates, actual = next_level(level, actual, likely, hidden_BPD, shapes, own_KW)
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "serves", lambda *_: False)
            patch.setattr(torch.Tensor, "topk", stable_topk)
            expected_candidates, expected = next_level(level, expected, likely, hidden_BPD, shapes, own_KW)
        assert_same_fields(candidates, expected_candidates)
        if own_KW is not None:
            assert_same_fields(actual, expected)
    assert actual is expected is None


def random_children(B: int, P: int, K: int, ties: bool, generator) -> tuple[torch.Tensor, torch.Tensor]:
    score_BPK = -torch.rand(B, P, K, generator=generator)
    logprob_BPK = ((4 * score_BPK).round() if ties else score_BPK).sort(dim=2, descending=True).values
    return logprob_BPK, torch.randint(99, (B, P, K), generator=generator)


def stable_topk(x: torch.Tensor, k: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    best = x.sort(dim=dim, descending=True, stable=True)
    return best.values.narrow(dim, 0, k), best.indices.narrow(dim, 0, k)


def assert_same_fields(actual, expected) -> None:
    for (name, one), other in zip(vars(actual).items(), vars(expected).values(), strict=True):
        assert torch.equal(one, other), name


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
