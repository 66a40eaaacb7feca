"""Accepting a path equals walking the tree, and what a drafted step emits is distributed as the target alone would."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specbackend.sampling import Nodes, SamplingBatch, forecast, pick_tokens
from specbackend.speculative.draft_tree import Candidates, build_tree
from specbackend.speculative.verifier import AcceptedPath, accept_path
from tests.chi_square import SIGNIFICANT, chi_square_p
from tests.speculative.random_trees import random_candidates, tree_of


def walk(token_N: list[int], parent_N: list[int], pick_N: list[int]) -> list[int]:
    """The definition of acceptance, one node at a time."""
    path = [0]
    while True:
        node = path[-1]
        child = [n for n in range(1, len(token_N)) if parent_N[n] == node and token_N[n] == pick_N[node]]
        if not child:
            return path
        path += child


@st.composite
def trees(draw):
    """(tokens, parents, picks) over few tokens, so that long paths are accepted often; siblings differ."""
    tokens, parents = [draw(st.integers(0, 3))], [0]
    for _ in range(draw(st.integers(0, 31))):
        parent = draw(st.integers(0, len(tokens) - 1))
        siblings = {token for token, other in zip(tokens[1:], parents[1:], strict=True) if other == parent}
        if len(siblings) < 4:
            tokens.append(draw(st.sampled_from([token for token in range(4) if token not in siblings])))
            parents.append(parent)
    return tokens, parents, [draw(st.integers(0, 3)) for _ in tokens]


@given(trees())
@settings(max_examples=80, deadline=None)
def test_accept_path_equals_walking(drawn):
    tokens, parents, picks = drawn
    path = accept_path(tree_of(tokens, parents), torch.tensor([picks]))
    expected = walk(tokens, parents, picks)
    assert path.order_BN[0, : path.count_B].tolist() == expected
    assert sorted(path.order_BN[0].tolist()) == list(range(len(tokens)))
    assert path.order_BN[0, path.count_B :].tolist() == sorted(set(range(len(tokens))) - set(expected))


def test_hand_drawn_tree():
    #        5
    #       / \
    #      7   8        the target picks 8 after 5, 7 after 8, 1 after the lower 7
    #      |   |        the left 7 is right about its child, but is not on the path
    #      3   7
    tree = tree_of([5, 7, 8, 3, 7], [0, 0, 0, 1, 2])
    path = accept_path(tree, torch.tensor([[8, 3, 7, 0, 1]]))
    assert path.order_BN.tolist() == [[0, 2, 4, 1, 3]]
    assert path.count_B.tolist() == [3]


def test_the_root_alone():
    path = accept_path(tree_of([5], [0]), torch.tensor([[5]]))
    assert (path.order_BN.tolist(), path.count_B.tolist()) == ([[0]], [1])


def test_requests_of_a_batch_do_not_mix():
    first, second = ([5, 1, 2], [0, 0, 0]), ([5, 1, 2], [0, 0, 1])
    picks = [[2, 0, 0], [1, 2, 0]]
    trees = [tree_of(*first), tree_of(*second)]
    batch = type(trees[0])(*(torch.cat(pair) for pair in zip(*(vars(t).values() for t in trees), strict=True)))
    path = accept_path(batch, torch.tensor(picks))
    assert path.count_B.tolist() == [2, 3]
    assert path.order_BN.tolist() == [[0, 2, 1], [0, 1, 2]]


# ---- losslessness ----

DRAWS = 200_000
V = 4
EMITTED = 3
TARGET_VV = torch.tensor([[0.9, 0.0, 1.2, -0.4], [0.2, 1.5, 0.1, 0.6], [-0.3, 0.8, 0.0, 1.1], [1.0, -0.2, 0.5, 0.3]])
FIRST_TOKEN, FIRST_POSITION = 2, 11


def exact_joint(temperature: float) -> torch.Tensor:
    """Probability of each of the V^3 ways to go on from FIRST_TOKEN; the target looks at the last token only."""
    step_VV = (TARGET_VV / temperature).softmax(-1)
    return torch.einsum("a,ab,bc->abc", step_VV[FIRST_TOKEN], step_VV, step_VV).flatten()


def with_temperature(temperature: float):
    """Sampling parameters of the draws that are not done, as `emitted_tokens` asks for them."""
    return lambda active_B, token_BP, count_B: SamplingBatch(
        torch.full((len(active_B),), temperature), active_B, any_sampled=True
    )


def emitted_tokens(
    sampling_of,
    K,
    num_steps,
    num_nodes,
    position_of=None,
    pick=pick_tokens,
    accept=accept_path,
    draws=DRAWS,
    draft=None,
) -> torch.Tensor:
    """[D, 3]: what drafted steps emit, by the real tree, picks and acceptance; drafts are random if nobody drafts.

    Each draw is a request of its own, whose seed is its number and whose prompt ends with FIRST_TOKEN.
    """
    generator = torch.Generator().manual_seed(1)
    token_DP = torch.full((draws, 1 + EMITTED + num_nodes), FIRST_TOKEN)
    count_D = torch.ones(draws, dtype=torch.int64)
    active_B = torch.arange(draws)
    while len(active_B):
        count_B1 = count_D[active_B, None]
        sampling = sampling_of(active_B, token_DP[active_B], count_B1[:, 0])
        root_B = token_DP[active_B, count_B1[:, 0] - 1]
        if draft:
            candidates = draft(Nodes.roots(root_B, FIRST_POSITION + count_B1[:, 0]), sampling, K)
        else:
            candidates = random_candidates(len(active_B), K, num_steps, V, generator)
        tree = build_tree(root_B, candidates, torch.full_like(root_B, num_nodes), num_nodes)
        position_BN = FIRST_POSITION + count_B1 + tree.depth_BN
        if position_of:
            position_BN = position_of(position_BN, tree)
        pick_BN = pick(TARGET_VV[tree.token_BN], Nodes(tree.token_BN, position_BN, tree.mask_BNN), sampling)
        path = accept(tree, pick_BN)
        # the columns past the path's end are junk that the next step overwrites
        token_DP[active_B[:, None], count_B1 + torch.arange(num_nodes)] = pick_BN.gather(1, path.order_BN)
        count_D[active_B] += path.count_B
        active_B = active_B[count_D[active_B] <= EMITTED]
    return token_DP[:, 1 : 1 + EMITTED]


def joint_p(emitted_D3: torch.Tensor, temperature: float) -> float:
    cell_D = (emitted_D3 * torch.tensor([V * V, V, 1])).sum(1)
    return chi_square_p(cell_D, exact_joint(temperature))


SHAPES = [(1, 2, 3, 1.0), (2, 2, 5, 0.7), (3, 2, 6, 1.3), (2, 3, 6, 1.0)]


@pytest.mark.parametrize(
    "K, num_steps, N, temperature", SHAPES, ids=["K{}-steps{}-N{}-T{}".format(*shape) for shape in SHAPES]
)
def test_drafted_steps_emit_what_the_target_would(K, num_steps, N, temperature):
    assert joint_p(emitted_tokens(with_temperature(temperature), K, num_steps, N), temperature) > SIGNIFICANT


def test_drafted_steps_emit_the_very_tokens_of_plain_decoding():
    """Stronger than any distribution: each seed's tokens are the same for all trees, and for none."""
    draws = 20_000
    sampling = SamplingBatch(torch.ones(draws), torch.arange(draws), any_sampled=True)
    token_D, plain = torch.full((draws,), FIRST_TOKEN), []
    for position in range(FIRST_POSITION + 1, FIRST_POSITION + 1 + EMITTED):
        logits_D1V = TARGET_VV[token_D][:, None]
        token_D = pick_tokens(logits_D1V, Nodes.roots(token_D, torch.full((draws,), position)), sampling)[:, 0]
        plain.append(token_D)
    for shape in [(1, 2, 3), (3, 2, 6), (3, 3, 20)]:
        assert torch.equal(emitted_tokens(with_temperature(1.0), *shape, draws=draws), torch.stack(plain, dim=1))


DRAFT_VV = TARGET_VV + torch.tensor(
    [[0.5, -0.4, 0.0, 0.3], [0.0, 0.6, -0.7, 0.1], [0.4, 0.0, 0.2, -0.6], [-0.3, 0.5, 0.0, 0.2]]
)


def foreseen(nodes: Nodes, sampling: SamplingBatch, K: int) -> Candidates:
    """One level of what a draft, whose logits are not quite the target's, expects the target to pick."""
    logits_B1V = DRAFT_VV[nodes.token_BM]
    score_BK, token_BK = forecast(logits_B1V, torch.arange(V), V, nodes, sampling)[:, 0].topk(K)
    return Candidates(score_BK, token_BK, torch.full_like(token_BK, -1))


@pytest.mark.parametrize("K", [1, 2, 3])
def test_drafts_that_know_the_noise_change_nothing(K):
    """They are right far more often, and about those tokens that the noise favours: still it is the target's pick."""
    right = []

    def counting_accept(tree, pick_BN) -> AcceptedPath:
        right.append((tree.token_BN[:, 1:] == pick_BN[:, :1]).any(1).float().mean().item())
        return accept_path(tree, pick_BN)

    emitted_D3 = emitted_tokens(with_temperature(0.8), K, 1, K + 1, accept=counting_accept, draft=foreseen)
    assert joint_p(emitted_D3, 0.8) > SIGNIFICANT
    overlap = torch.minimum((DRAFT_VV / 0.8).softmax(-1), (TARGET_VV / 0.8).softmax(-1)).sum(-1)[FIRST_TOKEN]
    best = (TARGET_VV[FIRST_TOKEN] / 0.8).softmax(-1).sort(descending=True).values[:K].sum()
    assert right[0] > best, "no draft that does not know the noise can be right as often"
    if K == 1:
        assert 0.85 * overlap < right[0] <= overlap + 0.01, "nor can rejection sampling accept more than the overlap"


def take_the_best_guess(tree, pick_BN) -> AcceptedPath:
    """Trusts a draft that knows the noise in one step of 25."""
    pick_BN[::25, 0] = tree.token_BN[::25, 1]
    return accept_path(tree, pick_BN)


def test_the_test_sees_such_drafts_favoured():
    emitted_D3 = emitted_tokens(with_temperature(0.8), 1, 1, 2, accept=take_the_best_guess, draft=foreseen)
    assert joint_p(emitted_D3, 0.8) < SIGNIFICANT


def without_position(position_BN, tree):
    return torch.zeros_like(position_BN)


def without_depth(position_BN, tree):
    return position_BN - tree.depth_BN


def off_by_one_below_the_root(position_BN, tree):
    return position_BN - (tree.depth_BN > 0).long()


def always_the_best_child(tree, pick_BN) -> AcceptedPath:
    pick_BN[:, 0] = tree.token_BN[:, 1]
    return accept_path(tree, pick_BN)


def sometimes_the_best_child(tree, pick_BN) -> AcceptedPath:
    pick_BN[::25, 0] = tree.token_BN[::25, 1]
    return accept_path(tree, pick_BN)


@pytest.mark.parametrize("bug", [without_position, without_depth, off_by_one_below_the_root], ids=lambda f: f.__name__)
def test_the_test_sees_noise_keyed_wrongly(bug):
    assert joint_p(emitted_tokens(with_temperature(1.0), 2, 2, 5, position_of=bug), 1.0) < SIGNIFICANT


@pytest.mark.parametrize("bug", [always_the_best_child, sometimes_the_best_child], ids=lambda f: f.__name__)
def test_the_test_sees_drafts_favoured(bug):
    assert joint_p(emitted_tokens(with_temperature(1.0), 2, 2, 5, accept=bug), 1.0) < SIGNIFICANT
