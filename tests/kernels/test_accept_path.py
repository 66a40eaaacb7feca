import pytest
import torch

from specbackend.kernels.accept_path import accept_path, accept_path_ref, example_inputs
from specbackend.speculative import verifier
from specbackend.speculative.draft_tree import DraftTree, ancestor_mask
from tests.speculative.random_trees import tree_of

SHAPES = [(1, 1, 1, 1), (7, 8, 4, 5), (4, 13, 3, 4), (3, 6, 1, 5), (4, 64, 8, 5), (2, 128, 10, 5)]


def assert_same(path, expected) -> None:
    assert torch.equal(path.order_BN, expected.order_BN)
    assert torch.equal(path.count_B, expected.count_B)


@pytest.mark.parametrize("B, N, K, num_steps", SHAPES)
def test_equals_reference_and_the_verifier(B, N, K, num_steps, device):
    inputs = example_inputs(B, N, K, num_steps, device=device)
    path = accept_path(**inputs)
    assert_same(path, accept_path_ref(**inputs))
    token_BN, parent_BN, mask_BNN, drafted_BN, pick_BN = inputs.values()
    tree = DraftTree(token_BN, parent_BN, mask_BNN, mask_BNN.sum(dim=2) - 1, drafted_BN)
    assert_same(path, verifier.accept_path(tree, pick_BN))


def test_hand_drawn_tree(device):
    #        5
    #       / \
    #      7   8        the target picks 8 after 5, 7 after 8, 1 after the lower 7
    #      |   |        the left 7 is right about its child, but is not on the path
    #      3   7
    tree = tree_of([5, 7, 8, 3, 7], [0, 0, 0, 1, 2])
    tensors = (tree.token_BN, tree.parent_BN, tree.mask_BNN, tree.drafted_BN, torch.tensor([[8, 3, 7, 0, 1]]))
    path = accept_path(*(tensor.to(device) for tensor in tensors))
    assert path.order_BN.tolist() == [[0, 2, 4, 1, 3]]
    assert path.count_B.tolist() == [3]


def test_fillers_are_not_accepted(device):
    """The deepest chain, right throughout; where one node is a filler, the path ends before it."""
    N = 128
    token_BN = torch.arange(N, device=device).repeat(2, 1)
    parent_BN = (token_BN - 1).clamp(min=0)
    drafted_BN = torch.ones(2, N, dtype=torch.bool, device=device)
    drafted_BN[1, 100] = False
    path = accept_path(token_BN, parent_BN, ancestor_mask(parent_BN), drafted_BN, token_BN + 1)
    assert path.count_B.tolist() == [128, 100]
    assert torch.equal(path.order_BN, token_BN)


def test_the_root_is_always_accepted(device):
    """Whatever its token, and whatever the target picks after it."""
    inputs = example_inputs(B=2, N=8, K=4, num_steps=5, device=device)
    inputs["pick_BN"].fill_(-1)
    inputs["drafted_BN"].fill_(False)
    assert accept_path(**inputs).count_B.tolist() == [1, 1]


def test_rejects_trees_that_are_too_large(device):
    inputs = example_inputs(B=1, N=129, K=10, num_steps=5, device=device)
    with pytest.raises(AssertionError):
        accept_path(**inputs)
