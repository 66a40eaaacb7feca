import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from specbackend.kernels.build_tree import build_tree, build_tree_ref, example_inputs
from specbackend.speculative import draft_tree
from specbackend.speculative.draft_tree import Candidates
from tests.speculative.random_trees import random_candidates

INF = float("inf")


def assert_same(tree, expected) -> None:
    for name, tensor in vars(expected).items():
        assert torch.equal(getattr(tree, name), tensor), name


def assert_equals_reference_and_the_decoder(inputs: dict) -> None:
    tree = build_tree(**inputs)
    assert_same(tree, build_tree_ref(**inputs))
    root_token_B, score_BC, token_BC, parent_BC, num_nodes_B, most = inputs.values()
    candidates = Candidates(score_BC, token_BC, parent_BC)
    assert_same(tree, draft_tree.build_tree(root_token_B, candidates, num_nodes_B, most))


@pytest.mark.parametrize(
    "B, K, num_steps, most",
    [(2, 2, 3, 1), (2, 1, 1, 2), (2, 1, 5, 6), (5, 4, 5, 8), (2, 4, 3, 25), (1, 8, 5, 64), (1, 10, 12, 128)],
)
def test_equals_reference_and_the_decoder(B, K, num_steps, most, device):
    assert_equals_reference_and_the_decoder(example_inputs(B, K, num_steps, most, device=device))


@st.composite
def candidate_sets(draw) -> dict:
    """Of two requests. Candidates of any shape: below any earlier one, no better than it, now and then none at all."""
    C = draw(st.integers(1, 40))
    rows = []
    for _ in range(2):
        score, parent = [], []
        for candidate in range(C):
            parent.append(draw(st.integers(-1, candidate - 1)))
            drop = draw(st.sampled_from([0.0, 0.0, 0.5, 1.25, INF]))
            score.append((score[parent[-1]] if parent[-1] >= 0 else 0.0) - drop)
        rows.append((score, parent))
    most = draw(st.integers(1, 48))
    return {
        "root_token_B": torch.tensor([1, 2**40]),
        "score_BC": torch.tensor([score for score, _ in rows]),
        "token_BC": torch.arange(2 * C).view(2, C),
        "parent_BC": torch.tensor([parent for _, parent in rows]),
        "num_nodes_B": torch.tensor(draw(st.lists(st.integers(1, most), min_size=2, max_size=2))),
        "most": most,
    }


@given(inputs=candidate_sets())
@settings(
    max_examples=15,
    deadline=None,
    phases=[Phase.generate],  # shrinking takes the interpreter minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_equals_the_decoder_on_any_candidates(inputs, device):
    on_device = {name: each if name == "most" else each.to(device) for name, each in inputs.items()}
    assert_equals_reference_and_the_decoder(on_device)


@pytest.mark.parametrize("ties", [False, True], ids=["no-ties", "ties"])
def test_equals_the_decoder_on_what_a_drafter_proposes(ties, device):
    candidates = random_candidates(6, 4, 3, 100, torch.Generator().manual_seed(0), ties)
    scores_tokens_parents = (candidates.score_BC, candidates.token_BC, candidates.parent_BC)
    num_nodes_B = torch.tensor([1, 2, 5, 8, 8, 3], device=device)
    inputs = (torch.arange(6, device=device), *(each.to(device) for each in scores_tokens_parents), num_nodes_B)
    tree = build_tree(*inputs, most=8)
    expected = draft_tree.build_tree(inputs[0], Candidates(*inputs[1:4]), num_nodes_B, most=8)
    assert_same(tree, expected)


def test_hand_drawn_tree(device):
    #        9
    #       / \
    #      5   6        candidates: 5 (-1), 6 (-2), then 7 (-3) below 5, 4 (-9) below 6 and 8 (-1) below 5
    #     / \           of the best three, 7 is not one
    #    7   8
    tree = build_tree(
        torch.tensor([9], device=device),
        torch.tensor([[-1.0, -2.0, -3.0, -9.0, -1.0]], device=device),
        torch.tensor([[5, 6, 7, 4, 8]], device=device),
        torch.tensor([[-1, -1, 0, 1, 0]], device=device),
        torch.tensor([3], device=device),
        most=4,
    )
    assert tree.token_BN.tolist() == [[9, 5, 6, 8]]
    assert tree.parent_BN.tolist() == [[0, 0, 0, 1]]
    assert tree.depth_BN.tolist() == [[0, 1, 1, 2]]
    assert tree.drafted_BN.tolist() == [[True, True, False, True]]  # of three nodes, by score; 6 fills up
    mask = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    assert tree.mask_BNN.int().tolist() == [mask]


def test_a_tree_of_the_root_alone(device):
    inputs = example_inputs(B=2, K=4, num_steps=1, most=1, device=device)
    tree = build_tree(**inputs)
    assert_same(tree, build_tree_ref(**inputs))
    assert torch.equal(tree.token_BN, inputs["root_token_B"][:, None])
    assert tree.drafted_BN.tolist() == [[True], [True]]


def test_the_deepest_chain(device):
    """127 candidates, each below the one before: as deep as a tree can be."""
    C = 127
    tree = build_tree(
        torch.tensor([0], device=device),
        -torch.arange(C, dtype=torch.float32, device=device)[None],
        torch.arange(C, device=device)[None],
        torch.arange(-1, C - 1, device=device)[None],
        torch.tensor([128], device=device),
        most=128,
    )
    assert tree.depth_BN.tolist() == [list(range(128))]
    assert torch.equal(tree.mask_BNN[0], torch.ones(128, 128, dtype=torch.bool, device=device).tril())


def test_rejects_trees_that_are_too_large(device):
    inputs = example_inputs(B=1, K=10, num_steps=5, most=129, device=device)
    with pytest.raises(AssertionError):
        build_tree(**inputs)
