"""Trees as tensors say what walking from parent to parent says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specbackend.speculative.draft_tree import Candidates, ancestor_mask
from tests.speculative.random_trees import full_tree, path_to, random_candidates

SHAPES = [(1, 1, 2), (1, 5, 6), (4, 1, 2), (4, 1, 5), (4, 3, 2), (4, 3, 8), (4, 3, 25), (3, 8, 32), (8, 4, 64)]
SHAPE_IDS = ["K{}-steps{}-N{}".format(*shape) for shape in SHAPES]


@st.composite
def parents(draw) -> list[int]:
    size = draw(st.integers(1, 33))
    return [0] + [draw(st.integers(0, node - 1)) for node in range(1, size)]


def mask_by_walking(parent_N: list[int]) -> list[list[bool]]:
    return [[other in path_to(parent_N, node) for other in range(len(parent_N))] for node in range(len(parent_N))]


@given(parents())
@settings(max_examples=60, deadline=None)
def test_ancestor_mask_equals_walking(parent_N):
    assert ancestor_mask(torch.tensor([parent_N]))[0].tolist() == mask_by_walking(parent_N)


@pytest.mark.parametrize("N", [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 65])
def test_ancestor_mask_of_the_deepest_tree(N):
    chain = [0, *range(N - 1)]
    assert torch.equal(ancestor_mask(torch.tensor([chain, chain])), torch.ones(2, N, N, dtype=torch.bool).tril())


def slow_tree(root: int, score: list[float], token: list[int], parent: list[int], num_nodes: int):
    """The definition: (tokens, parents) of the root and the best candidates; ties go to the lower index."""
    best = sorted(range(len(score)), key=lambda c: (-score[c], c))[: num_nodes - 1]
    kept = sorted(best)
    parents = [0 if parent[c] < 0 else kept.index(parent[c]) + 1 for c in kept]
    return [root] + [token[c] for c in kept], [0] + parents


@pytest.mark.parametrize("ties", [False, True], ids=["no-ties", "ties"])
@pytest.mark.parametrize("K, num_steps, N", SHAPES, ids=SHAPE_IDS)
def test_build_tree_equals_definition(K, num_steps, N, ties):
    """On ties too every kept node has its parent kept: slow_tree's index() would raise if not."""
    B = 40
    candidates = random_candidates(B, K, num_steps, 100, torch.Generator().manual_seed(N), ties)
    tree = full_tree(torch.arange(B), candidates, N)
    for b in range(B):
        one = [each[b].tolist() for each in (candidates.score_BC, candidates.token_BC, candidates.parent_BC)]
        tokens, parents = slow_tree(b, *one, N)
        assert (tree.token_BN[b].tolist(), tree.parent_BN[b].tolist()) == (tokens, parents)
        assert tree.mask_BNN[b].tolist() == mask_by_walking(parents)
        assert tree.depth_BN[b].tolist() == [len(path_to(parents, node)) - 1 for node in range(N)]


def test_all_scores_equal():
    """The hardest tie: everything is certain, so the order of the candidates decides alone."""
    candidates = random_candidates(1, 4, 5, 100, torch.Generator().manual_seed(0))
    flat = Candidates(torch.zeros_like(candidates.score_BC), candidates.token_BC, candidates.parent_BC)
    tree = full_tree(torch.tensor([7]), flat, 8)
    assert tree.token_BN[0].tolist() == [7] + candidates.token_BC[0, :7].tolist()
    assert tree.parent_BN[0, :5].tolist() == [0] * 5


def test_topk_one_is_a_chain():
    tree = full_tree(torch.tensor([9]), random_candidates(1, 1, 5, 100, torch.Generator().manual_seed(0)), 6)
    assert tree.parent_BN[0].tolist() == [0, 0, 1, 2, 3, 4]
    assert tree.depth_BN[0].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_tree_of_nothing_but_the_root():
    tree = full_tree(torch.tensor([9, 4]), random_candidates(2, 3, 2, 100, torch.Generator().manual_seed(0)), 1)
    assert (tree.token_BN.tolist(), tree.parent_BN.tolist()) == ([[9], [4]], [[0], [0]])
    assert tree.drafted_BN.tolist() == [[True], [True]]


def test_all_candidates_kept():
    candidates = random_candidates(2, 3, 3, 100, torch.Generator().manual_seed(0))
    C = candidates.token_BC.shape[1]
    tree = full_tree(torch.tensor([1, 2]), candidates, C + 1)
    assert torch.equal(tree.token_BN[:, 1:], candidates.token_BC)
    assert torch.equal(tree.parent_BN[:, 1:], candidates.parent_BC + 1)
