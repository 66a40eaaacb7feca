"""Each parameter does to every node of a tree what a slow reference does to that node's text alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specbackend.kernels import cpu
from specbackend.request import Request
from specbackend.sampling import Nodes, SamplingBatch
from specbackend.sampling.limits import scaled
from specbackend.sampling.pick import pick_tokens, target_logits
from specbackend.sampling_params import SamplingParams
from specbackend.speculative.draft_tree import DraftTree
from tests.sampling.reference import reference_distribution, reference_logits
from tests.speculative.random_trees import full_tree, path_to, random_candidates

V = 12
EOS = (3,)
PROMPT = [1, 7, 7, 2, 5, 1]
PARAMS = {
    "logit_bias": {"logit_bias": {0: 3.0, "7": -2.5, 11: 0.5}},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "repetition_reward": {"repetition_penalty": 0.6},
    "frequency_penalty": {"frequency_penalty": 1.1},
    "presence_penalty": {"presence_penalty": -1.4},
    "min_new_tokens": {"min_new_tokens": 6, "stop_token_ids": [9, 4], "ignore_eos": True},
    "allowed_token_ids": {"allowed_token_ids": [0, 2, 3, 5, 7]},
    "bad_words_ids": {"bad_words_ids": [[6], [7, 2], [2, 7, 7], [0, 2], [5, 5, 5, 2], [2, 5, 1, 7]]},
    "top_k": {"top_k": 3},
    "top_k_of_all": {"top_k": 500},
    "top_p": {"top_p": 0.6},
    "tiny_top_p": {"top_p": 1e-9},
    "min_p": {"min_p": 0.3},
    "top_k_and_top_p": {"top_k": 4, "top_p": 0.7, "temperature": 1.4},
    "none": {"temperature": 0.8},
    "all": {
        "logit_bias": {2: 2.0, 7: 1.0},
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.3,
        "min_new_tokens": 5,
        "stop_token_ids": [8],
        "allowed_token_ids": [0, 1, 2, 3, 5, 7, 8, 9, 10],
        "bad_words_ids": [[2, 7], [10]],
        "temperature": 0.9,
        "top_k": 6,
        "top_p": 0.85,
        "min_p": 0.05,
    },
}


def make_request(output: list[int], prompt=PROMPT, **params) -> Request:
    params = SamplingParams.from_dict(params)
    params.check_vocabulary(V, EOS)
    end_ids = tuple({*EOS, *params.stop_token_ids})
    return Request("a", prompt, params, output_ids=output, seed=len(output), end_ids=end_ids)


def random_tree(requests: list[Request], shape=(3, 3, 14), seed=0) -> DraftTree:
    K, num_steps, num_nodes = shape
    root_B = torch.tensor([request.all_ids[-1] for request in requests])
    generator = torch.Generator().manual_seed(seed)
    return full_tree(root_B, random_candidates(len(requests), K, num_steps, V, generator), num_nodes)


def nodes_of(tree: DraftTree, requests: list[Request]) -> Nodes:
    length_B1 = torch.tensor([[request.num_tokens] for request in requests])
    return Nodes(tree.token_BN, length_B1 + tree.depth_BN, tree.mask_BNN)


def random_logits(B: int, N: int, seed=0) -> torch.Tensor:
    return 2 * torch.randn(B, N, V, generator=torch.Generator().manual_seed(seed))


def drafted(tree: DraftTree, row: int, node: int) -> list[int]:
    """The drafts on the node's path, itself included."""
    return [int(tree.token_BN[row, n]) for n in path_to(tree.parent_BN[row].tolist(), node)[1:]]


def scaled_logits(logits_BNV: torch.Tensor, nodes: Nodes, sampling: SamplingBatch) -> torch.Tensor:
    """What the softmax is taken of."""
    return scaled(target_logits(logits_BNV, nodes, sampling), sampling.temperature_B)


def tree_logits(requests: list[Request], tree: DraftTree, logits_BNV: torch.Tensor) -> torch.Tensor:
    return scaled_logits(logits_BNV, nodes_of(tree, requests), SamplingBatch.of(requests, "cpu"))


def outputs() -> list[list[int]]:
    return [[7], [2, 7, 2], [0, 5, 5, 5], [3, 2, 7, 7, 2, 5, 1]]


# ---- against references


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_every_node_has_the_reference_distribution(params):
    requests = [make_request(output, **params) for output in outputs()]
    tree = random_tree(requests)
    logits_BNV = random_logits(*tree.token_BN.shape)
    probability_BNV = tree_logits(requests, tree, logits_BNV).softmax(-1)
    for row, request in enumerate(requests):
        for node, logits_V in enumerate(logits_BNV[row].tolist()):
            text = request.output_ids + drafted(tree, row, node)
            expected_V = torch.tensor(reference_distribution(logits_V, PROMPT, text, request.params, EOS))
            torch.testing.assert_close(probability_BNV[row, node], expected_V, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_greedy_takes_the_best_of_what_comes_before_temperature(params):
    requests = [make_request(output, **{**params, "temperature": 0}) for output in outputs()]
    tree = random_tree(requests)
    logits_BNV = random_logits(*tree.token_BN.shape)
    picked_BN = pick_tokens(logits_BNV, nodes_of(tree, requests), SamplingBatch.of(requests, "cpu"))
    for row, request in enumerate(requests):
        for node, logits_V in enumerate(logits_BNV[row].tolist()):
            text = request.output_ids + drafted(tree, row, node)
            expected_V = reference_logits(logits_V, PROMPT, text, request.params, EOS)
            assert picked_BN[row, node] == expected_V.index(max(expected_V))


HUGGING_FACE = {
    "repetition_penalty": lambda: RepetitionPenaltyLogitsProcessor(1.7),
    "repetition_reward": lambda: RepetitionPenaltyLogitsProcessor(0.6),
    "min_new_tokens": lambda: MinNewTokensLengthLogitsProcessor(len(PROMPT), 6, [3, 9, 4]),
    "bad_words_ids": lambda: NoBadWordsLogitsProcessor(PARAMS["bad_words_ids"]["bad_words_ids"]),
    "top_k": lambda: TopKLogitsWarper(3),
    "top_p": lambda: TopPLogitsWarper(0.6),
    "min_p": lambda: MinPLogitsWarper(0.3),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_every_node_has_what_hugging_face_makes_of_its_text(name):
    requests = [make_request(output, **PARAMS[name]) for output in outputs()]
    tree = random_tree(requests, seed=1)
    logits_BNV = random_logits(*tree.token_BN.shape, seed=1)
    log_probability_BNV = tree_logits(requests, tree, logits_BNV).log_softmax(-1)
    for row, request in enumerate(requests):
        for node in range(tree.token_BN.shape[1]):
            ids_1T = torch.tensor([request.all_ids + drafted(tree, row, node)])
            expected_V = HUGGING_FACE[name]()(ids_1T, logits_BNV[row, node][None])[0].log_softmax(-1)
            torch.testing.assert_close(log_probability_BNV[row, node], expected_V)


def test_ties_stay_together():
    logits_11V = torch.tensor([[[2.0, 1.0, 1.0, 1.0, 0.0, 0.0, -1, -1, -1, -1, -1, -1]]])
    nodes = Nodes.roots(torch.tensor([1]), torch.tensor([7]))

    def kept(**params):
        sampling = SamplingBatch.of([make_request([1], **params)], "cpu")
        return scaled_logits(logits_11V, nodes, sampling)[0, 0].isfinite().nonzero()[:, 0].tolist()

    assert kept(top_k=1) == [0]
    assert kept(top_k=2) == kept(top_k=4) == kept(top_p=0.4) == [0, 1, 2, 3]
    assert kept(min_p=math.exp(-1.0) * 0.999999) == [0, 1, 2, 3]
    assert kept(min_p=1.0) == [0]


@pytest.mark.parametrize("more", ["least", "rounding"])
def test_a_nucleus_that_is_full_takes_no_more(more, monkeypatch):
    """Mass strictly before a token that equals top_p keeps it out; the least bit more lets it in.

    A CPU's own kernel rounds differently.
    """
    if more == "least":
        monkeypatch.setattr(cpu, "serves", lambda *_: False)
    logits_11V = random_logits(1, 1)
    logits_11V -= logits_11V.max()
    best = (-logits_11V.logsumexp(-1)).exp().item()
    nodes = Nodes.roots(torch.tensor([1]), torch.tensor([7]))
    tops = {"least": (best, math.nextafter(best, 1)), "rounding": (best * (1 - 1e-6), best * (1 + 1e-6))}[more]
    for top_p, size in zip(tops, (1, 2), strict=True):
        sampling = SamplingBatch.of([make_request([1], top_p=top_p)], "cpu")
        assert scaled_logits(logits_11V, nodes, sampling).isfinite().sum() == size


def test_top_k_and_top_p_come_from_the_same_distribution():
    """After top_k = 2 alone, the best token would have 0.53 of what is left, and top_p = 0.5 would keep no other."""
    logits_11V = torch.full((1, 1, V), -torch.inf)
    logits_11V[0, 0, :4] = torch.tensor([0.4, 0.35, 0.15, 0.1]).log()
    sampling = SamplingBatch.of([make_request([1], top_k=2, top_p=0.5)], "cpu")
    probability_V = scaled_logits(logits_11V, Nodes.roots(torch.tensor([1]), torch.tensor([7])), sampling).softmax(-1)
    torch.testing.assert_close(probability_V[0, 0, :4], torch.tensor([0.4, 0.35, 0.0, 0.0]) / 0.75)


# ---- a node's distribution is a function of its text


@st.composite
def mixed_params(draw):
    chosen = draw(st.lists(st.sampled_from(sorted(PARAMS)), min_size=1, max_size=4))
    params = {name: value for each in chosen for name, value in PARAMS[each].items()}
    return {**params, "temperature": draw(st.sampled_from([0, 0.3, 1.0, 2.0]))}


TEXTS = st.lists(st.integers(0, V - 1), min_size=1, max_size=8)


@given(
    params=st.lists(mixed_params(), min_size=1, max_size=4),
    prompts=st.lists(TEXTS, min_size=4, max_size=4),
    outputs=st.lists(TEXTS, min_size=4, max_size=4),
    shape=st.sampled_from([(1, 3, 4), (2, 2, 5), (3, 3, 20), (4, 1, 4)]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_every_node_of_a_mixed_batch_equals_its_text_alone(params, prompts, outputs, shape, seed):
    """Bit for bit: this, and noise that depends on seed and position alone, is why verification is exact."""
    requests = [make_request(o, p, **each) for o, p, each in zip(outputs, prompts, params, strict=False)]
    tree = random_tree(requests, shape, seed)
    logits_BNV = random_logits(*tree.token_BN.shape, seed)
    result_BNV = tree_logits(requests, tree, logits_BNV)
    picked_BN = pick_tokens(logits_BNV, nodes_of(tree, requests), SamplingBatch.of(requests, "cpu"))
    for row, each in enumerate(params[: len(requests)]):
        for node in range(tree.token_BN.shape[1]):
            alone = make_request(outputs[row] + drafted(tree, row, node), prompts[row], **each)
            alone.seed = requests[row].seed
            nodes = Nodes.roots(torch.tensor([alone.all_ids[-1]]), torch.tensor([alone.num_tokens]))
            sampling = SamplingBatch.of([alone], "cpu")
            logits_11V = logits_BNV[row, node][None, None]
            assert picked_BN[row, node] == pick_tokens(logits_11V, nodes, sampling)
            if alone.params.temperature:
                assert torch.equal(result_BNV[row, node], scaled_logits(logits_11V, nodes, sampling)[0, 0])


def test_logits_of_the_caller_stay_as_they_are():
    requests = [make_request([7, 2], **params) for params in PARAMS.values()]
    tree = random_tree(requests)
    logits_BNV = random_logits(*tree.token_BN.shape)
    before = logits_BNV.clone()
    tree_logits(requests, tree, logits_BNV)
    assert torch.equal(logits_BNV, before)


@pytest.mark.parametrize("output", [[], [4]], ids=["first-token", "second-token"])
def test_the_first_token_follows_the_prompt(output):
    """Prefill picks with no output: the root is then the prompt's last token."""
    for params in PARAMS.values():
        request = make_request(output, **params)
        nodes = Nodes.roots(torch.tensor([request.all_ids[-1]]), torch.tensor([request.num_tokens]))
        logits_11V = random_logits(1, 1)
        result_V = scaled_logits(logits_11V, nodes, SamplingBatch.of([request], "cpu"))[0, 0].softmax(-1)
        expected = reference_distribution(logits_11V[0, 0].tolist(), PROMPT, output, request.params, EOS)
        torch.testing.assert_close(result_V, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_what_a_batch_does_not_use_costs_nothing():
    for params in ({"temperature": 0}, {"temperature": 0.8, "seed": 3}, {"temperature": 0, "top_k": 3, "min_p": 0.5}):
        sampling = SamplingBatch.of([make_request([7], **params)], "cpu")
        assert (sampling.before_temperature, sampling.limits) == ((), None)
    reached = SamplingBatch.of([make_request([7, 7], min_new_tokens=2)], "cpu")
    assert reached.before_temperature == ()


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.2e-38},
        {"repetition_penalty": 1.2e-38, "logit_bias": {1: 1e30, 2: -1e30}},
        {"logit_bias": {1: 1e30}, "frequency_penalty": 2.0, "temperature": 1e-38},
        {"allowed_token_ids": [5], "top_p": 1e-30, "min_p": 1.0},
    ],
    ids=str,
)
def test_extreme_values_leave_a_distribution(params):
    requests = [make_request([1, 2, 7], **params)]
    tree = random_tree(requests)
    probability_BNV = tree_logits(requests, tree, random_logits(1, tree.token_BN.shape[1])).softmax(-1)
    torch.testing.assert_close(probability_BNV.sum(-1), torch.ones(tree.token_BN.shape))
