"""Picks and forecasts by kernels are those of plain torch, which is their definition."""

import pytest
import torch

from specbackend.request import Request
from specbackend.sampling import Nodes, SamplingBatch, likeliest
from specbackend.sampling.pick import pick_tokens, target_logits
from specbackend.sampling.processors import _ban_unset
from specbackend.sampling_params import SamplingParams
from tests.grammar.texts import VOCAB_SIZE, ids_of, make_compiler
from tests.sampling.test_processors import make_request, nodes_of, random_tree

V = 12
BATCHES = {
    "greedy": [{"temperature": 0}] * 4,
    "mixed": [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.3}, {"temperature": 2.0}],
    "extreme": [{"temperature": 1e-6}, {"temperature": 1e-38}, {"temperature": 0}, {"temperature": 3.4e38}],
    "limited": [
        {"temperature": 0.8, "top_k": 3, "top_p": 0.7},
        {"temperature": 0, "top_k": 2},
        {"temperature": 1.2, "min_p": 0.2},
        {"temperature": 1.0},
    ],
    "adjusted": [
        {"temperature": 0.8, "top_p": 0.6, "allowed_token_ids": [2, 5, 7]},
        {"temperature": 0, "bad_words_ids": [[7], [2, 5]]},
        {"temperature": 1.2, "repetition_penalty": 1.7},
        {"temperature": 1.0, "allowed_token_ids": [11]},
    ],
}


@pytest.fixture(params=[(1, 1, 1), (3, 2, 7)], ids=["roots", "trees"])
def shape(request) -> tuple[int, int, int]:
    """Of random_tree."""
    return request.param


def places(requests: list, shape: tuple[int, int, int], device) -> Nodes:
    nodes = nodes_of(random_tree(requests, shape), requests)
    return Nodes(*(each.to(device) for each in (nodes.token_BM, nodes.position_BN, nodes.mask_BNM)))


def requests_of(batch: str, seed: int) -> list:
    requests = [make_request([7, 2, 5], **params) for params in BATCHES[batch]]
    for row, each in enumerate(requests):
        each.seed = (1 << 63) + 17 * seed + row
    return requests


def random_logits(nodes: Nodes, W: int, seed: int) -> torch.Tensor:
    """Coarse ones, so that some are equal; a third of them -inf."""
    shape_BNW, g = (*nodes.position_BN.shape, W), torch.Generator().manual_seed(seed)
    logits_BNW = (8 * torch.randn(shape_BNW, generator=g)).round() / 4
    return logits_BNW.masked_fill(torch.rand(shape_BNW, generator=g) < 1 / 3, -torch.inf).to(nodes.token_BM.device)


@pytest.mark.parametrize("batch", BATCHES)
def test_picks(batch, shape, device, request):
    cases = []
    for seed in range(8):
        requests = requests_of(batch, seed)
        nodes = places(requests, shape, device)
        cases.append((random_logits(nodes, V, seed), nodes, SamplingBatch.of(requests, device)))
    expected = [pick_tokens(*case) for case in cases]
    request.getfixturevalue("on_kernels")
    for case, expected_BN in zip(cases, expected, strict=True):
        assert torch.equal(pick_tokens(*case), expected_BN)


@pytest.mark.parametrize("batch", BATCHES)
def test_forecasts(batch, shape, device, request):
    """Of a draft that knows some of the tokens."""
    token_W, K = torch.tensor([0, 2, 3, 5, 6, 7, 10, 11], device=device), 4
    requests = requests_of(batch, seed=1)
    nodes = places(requests, shape, device)
    g = torch.Generator().manual_seed(3)
    logits_BNW = 2 * torch.randn(*nodes.position_BN.shape, len(token_W), generator=g).to(device)
    args = (K, logits_BNW, token_W, V, nodes, SamplingBatch.of(requests, device))
    expected = likeliest(*args)
    request.getfixturevalue("on_kernels")
    found = likeliest(*args)
    torch.testing.assert_close(found.logprob_BNK, expected.logprob_BNK, rtol=1e-5, atol=1e-5)
    possible_BNK = expected.logprob_BNK > -torch.inf
    assert torch.equal(found.token_BNK[possible_BNK], expected.token_BNK[possible_BNK])


@pytest.mark.parametrize("vocab_size", [1, 77, 96])
def test_masks_of_bits(vocab_size, device, request):
    g = torch.Generator().manual_seed(vocab_size)
    bits_RNW = torch.randint(0, 256, (3, 5, 12), dtype=torch.uint8, generator=g).to(device)
    logits_RNV = torch.randn(3, 5, vocab_size, generator=g).to(device)

    def masked() -> torch.Tensor:
        copy_RNV = logits_RNV.clone()
        for logits_NV, bits_NW in zip(copy_RNV, bits_RNW, strict=True):
            _ban_unset(logits_NV, bits_NW)
        return copy_RNV

    expected_RNV = masked()
    request.getfixturevalue("on_kernels")
    assert torch.equal(masked(), expected_RNV)
    assert expected_RNV.isneginf().any() and expected_RNV.isfinite().any()


def test_a_grammar(tmp_path, device, on_kernels):
    assert -(-VOCAB_SIZE // 8) % 4, "the kernel reads whole words"
    asked = Request("r", ids_of("prompt"), SamplingParams(temperature=0))
    asked.grammar = make_compiler(tmp_path).start("regex", "[ab]c")
    nodes = Nodes.roots(*(torch.tensor([number], device=device) for number in (asked.input_ids[-1], 6)))
    logits_1NV = torch.zeros(1, 1, VOCAB_SIZE, device=device)
    allowed_V = target_logits(logits_1NV, nodes, SamplingBatch.of([asked], device))[0, 0].isfinite()
    assert allowed_V.nonzero().flatten().tolist() == sorted(ids_of("ab"))
