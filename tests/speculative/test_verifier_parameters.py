"""What drafted steps emit under every sampling parameter is distributed as the target alone would, text by text."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from specbackend.request import Request
from specbackend.sampling import SamplingBatch, pick_tokens
from specbackend.sampling.limits import Limits
from specbackend.sampling.processors import (
    BEFORE_TEMPERATURE,
    AllowedTokens,
    BadWords,
    Entries,
    LogitBias,
    MinNewTokens,
    OutputPenalties,
    RepetitionPenalty,
)
from specbackend.sampling_params import SamplingParams
from tests.chi_square import SIGNIFICANT, chi_square_p
from tests.sampling.reference import reference_distribution
from tests.speculative.test_verifier import (
    DRAWS,
    EMITTED,
    FIRST_POSITION,
    FIRST_TOKEN,
    TARGET_VV,
    V,
    emitted_tokens,
)

PROMPT = [FIRST_TOKEN] * (FIRST_POSITION + 1)
EOS = (1,)
SHAPE = (2, 2, 5)  # K, steps, nodes
PARAMS = {
    "logit_bias": {"logit_bias": {0: 1.0, 3: -0.7}},
    "repetition_penalty": {"repetition_penalty": 2.0, "logit_bias": {0: 3.0, 1: 3.0}, "temperature": 0.25},
    "frequency_penalty": {"frequency_penalty": 1.5, "temperature": 0.4},
    "presence_penalty": {"presence_penalty": -0.8},
    "min_new_tokens": {"min_new_tokens": 2, "stop_token_ids": [3]},
    "allowed_token_ids": {"allowed_token_ids": [0, 1, 3]},
    "bad_words_ids": {"bad_words_ids": [[0, 2], [2, 1, 3], [2, 2, 0]]},
    "top_k": {"top_k": 2, "temperature": 1.3},
    "top_p": {"top_p": 0.8, "temperature": 0.4},
    "min_p": {"min_p": 0.4},
    "top_k_and_top_p": {"top_k": 2, "top_p": 0.55},
    "all": {
        "logit_bias": {1: 0.5},
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
        "min_new_tokens": 1,
        "allowed_token_ids": [0, 1, 3],
        "bad_words_ids": [[0, 0]],
        "temperature": 0.9,
        "top_k": 3,
        "top_p": 0.95,
        "min_p": 0.1,
    },
}


def exact_joint(params: SamplingParams) -> torch.Tensor:
    """Probability of each of the V^3 ways to go on from the prompt."""
    probabilities = {(): 1.0}
    for _ in range(EMITTED):
        longer = {}
        for text, probability in probabilities.items():
            logits = TARGET_VV[text[-1] if text else FIRST_TOKEN].tolist()
            step = reference_distribution(logits, PROMPT, list(text), params, EOS)
            longer |= {(*text, token): probability * step[token] for token in range(V)}
        probabilities = longer
    return torch.tensor([probabilities[text] for text in product(range(V), repeat=EMITTED)], dtype=torch.float64)


def parameters(kind: type, params: SamplingParams, token_BP: torch.Tensor, count_B: torch.Tensor):
    """What `kind.of` makes of one request each; but of requests by the hundred thousand, and so without loops.

    The first column of token_BP is the end of the prompt, the next count - 1 are output.
    """
    B = len(count_B)
    end_ids = tuple({*EOS, *params.stop_token_ids})
    one = kind.of([Request("a", PROMPT, params, end_ids=end_ids)], "cpu")
    if one is None:
        return None
    column_P = torch.arange(token_BP.shape[1])
    output = token_BP.where((column_P > 0) & (column_P < count_B[:, None]), -1)
    if kind is LogitBias:
        return LogitBias(repeat(one.entries, B), one.bias_E.repeat(B))
    if kind is RepetitionPenalty:
        output[:, 0] = FIRST_TOKEN
        return RepetitionPenalty(one.penalty_B.repeat(B), entries(output))
    if kind is OutputPenalties:
        return OutputPenalties(one.frequency_B.repeat(B), one.presence_B.repeat(B), entries(output))
    if kind is MinNewTokens:
        return MinNewTokens(repeat(one.ends, B), one.position_E.repeat(B))
    if kind is AllowedTokens:
        return AllowedTokens(repeat(one.allowed, B), one.everything_B.repeat(B))
    if kind is BadWords:
        L = one.before_root_BL.shape[1]
        text_BP = torch.cat([torch.tensor(PROMPT[:-1]).expand(B, -1), token_BP], dim=1)
        root_B1 = len(PROMPT) - 2 + count_B[:, None]
        before_BL = text_BP.gather(1, root_B1 + torch.arange(-L, 0))
        return BadWords(repeat(one.ends, B), one.start_WL.repeat(B, 1), before_BL)
    return Limits(*(each.repeat(B) for each in one.tensors), one.most)


def repeat(one: Entries, B: int) -> Entries:
    return Entries(torch.arange(B).repeat_interleave(len(one.token_E)), one.token_E.repeat(B))


def entries(token_BP: torch.Tensor) -> Entries:
    """All that are not -1."""
    row_E, column_E = (token_BP >= 0).nonzero(as_tuple=True)
    return Entries(row_E, token_BP[row_E, column_E])


def with_params(params: SamplingParams):
    def sampling_of(active_B, token_BP, count_B) -> SamplingBatch:
        *before, limits = (parameters(kind, params, token_BP, count_B) for kind in (*BEFORE_TEMPERATURE, Limits))
        temperature_B = torch.full((len(active_B),), params.temperature)
        return SamplingBatch(temperature_B, active_B, True, tuple(p for p in before if p is not None), limits)

    return sampling_of


def joint_p(emitted_D3: torch.Tensor, params: SamplingParams) -> float:
    """0 if an impossible text was drawn. Texts too rare for the test count as one."""
    cell_D = (emitted_D3 * torch.tensor([V * V, V, 1])).sum(1)
    probability_C = exact_joint(params)
    if (probability_C[cell_D] == 0).any():
        return 0.0
    expected_C = probability_C * len(cell_D)
    order_C = expected_C.argsort(descending=True)
    rest = int((expected_C[order_C] >= 5).sum())
    while 0 < expected_C[order_C[rest:]].sum() < 5:
        rest -= 1
    rank_C = order_C.argsort().clamp(max=rest)
    pooled_R = torch.zeros(rest + 1, dtype=torch.float64).index_add_(0, rank_C, probability_C)
    return chi_square_p(rank_C[cell_D], pooled_R[pooled_R > 0])


@pytest.mark.parametrize("name", PARAMS)
def test_drafted_steps_emit_what_the_target_would(name):
    params = SamplingParams.from_dict(PARAMS[name])
    assert joint_p(emitted_tokens(with_params(params), *SHAPE), params) > SIGNIFICANT


# ---- bugs, each in one step of a hundred


def in_one_percent(bug):
    """Pick as `bug` does for one request of a hundred."""

    def pick(logits_BNV, nodes, sampling):
        right_BN, wrong_BN = pick_tokens(logits_BNV, nodes, sampling), bug(logits_BNV, nodes, sampling)
        is_buggy_B1 = torch.arange(len(right_BN))[:, None] % 100 == 0
        return torch.where(is_buggy_B1, wrong_BN, right_BN)

    return pick


def counts_of_the_root_for_all_nodes(logits_BNV, nodes, sampling):
    """The relaxed penalties of other engines."""
    alone_BNN = torch.zeros_like(nodes.mask_BNM)
    alone_BNN[:, :, 0] = True
    return pick_tokens(logits_BNV, replace(nodes, mask_BNM=alone_BNN), sampling)


def counts_without_the_node_itself(logits_BNV, nodes, sampling):
    itself_NN = torch.eye(nodes.token_BM.shape[1], dtype=torch.bool)
    return pick_tokens(logits_BNV, replace(nodes, mask_BNM=nodes.mask_BNM & ~itself_NN), sampling)


def top_p_of_what_top_k_left(logits_BNV, nodes, sampling):
    both = sampling.limits
    top_k = replace(both, top_p_B=torch.full_like(both.top_p_B, torch.inf))
    top_p = replace(both, top_k_B=torch.full_like(both.top_k_B, V), most=V)
    return pick_tokens(top_k.apply(logits_BNV, sampling.temperature_B), nodes, replace(sampling, limits=top_p))


def no_limits(logits_BNV, nodes, sampling):
    return pick_tokens(logits_BNV, nodes, replace(sampling, limits=None))


def reversed_order(logits_BNV, nodes, sampling):
    return pick_tokens(logits_BNV, nodes, replace(sampling, before_temperature=sampling.before_temperature[::-1]))


def temperature_last(logits_BNV, nodes, sampling):
    """Limits of the distribution at temperature 1."""
    limited_BNV = sampling.limits.apply(logits_BNV, torch.ones_like(sampling.temperature_B))
    return no_limits(limited_BNV, nodes, sampling)


def one_position_too_early(logits_BNV, nodes, sampling):
    later = replace(nodes, position_BN=nodes.position_BN + 1)
    return pick_tokens(logits_BNV, later, sampling)


BUGS = [  # where impossible texts give the bug away, fewer draws will do
    (counts_of_the_root_for_all_nodes, "frequency_penalty", DRAWS),
    (counts_of_the_root_for_all_nodes, "repetition_penalty", DRAWS),
    (counts_without_the_node_itself, "frequency_penalty", DRAWS),
    (top_p_of_what_top_k_left, "top_k_and_top_p", DRAWS),
    (reversed_order, "repetition_penalty", DRAWS),
    (no_limits, "min_p", DRAWS // 10),
    (temperature_last, "top_p", DRAWS // 10),
    (one_position_too_early, "min_new_tokens", DRAWS // 10),
]


@pytest.mark.parametrize("bug, name, draws", BUGS, ids=[f"{bug.__name__}-{name}" for bug, name, _ in BUGS])
def test_the_test_sees_a_bug_in_one_percent(bug, name, draws):
    params = SamplingParams.from_dict(PARAMS[name])
    emitted_D3 = emitted_tokens(with_params(params), *SHAPE, pick=in_one_percent(bug), draws=draws)
    assert joint_p(emitted_D3, params) < SIGNIFICANT
