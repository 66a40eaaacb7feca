"""The mask of every node of a tree is what a fresh matcher says of the node's whole text."""

import random

import pytest
import torch
from llguidance import LLMatcher

from specbackend.request import Request
from specbackend.sampling import Nodes, SamplingBatch
from specbackend.sampling.pick import pick_tokens, target_logits
from specbackend.sampling_params import SamplingParams
from specbackend.speculative.draft_tree import DraftTree
from tests.grammar.texts import EOS, VOCAB_SIZE, fresh_matcher, ids_of, legal_by_definition, make_compiler
from tests.speculative.random_trees import path_to

GUIDES = {
    "regex": r"(ab?c|[a-c]{2}x|é)*(z|\d{1,2})",
    "json_schema": '{"type": "array", "items": {"enum": ["a", "é", 12, null]}, "maxItems": 3}',
    "choice": '["a", "ab", "abcé", "b1"]',
}
PROMPT = ids_of("prompt")


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    return make_compiler(tmp_path_factory.mktemp("bytes"))


def grammar_of(kind: str) -> str:
    if kind == "json_schema":
        options = {"whitespace_pattern": r"( |\n[ \t]{0,16})?"}
        return LLMatcher.grammar_from_json_schema(GUIDES[kind], overrides=options)
    return LLMatcher.grammar_from_regex(GUIDES[kind] if kind == "regex" else "a|ab|abcé|b1")


def grown_request(compiler, kind: str | None, rng: random.Random) -> Request:
    """In the middle of a text that the guide allows."""
    request = Request("r", PROMPT, output_ids=[])
    if kind is None:
        request.output_ids = ids_of("zzz")
        return request
    request.grammar = compiler.start(kind, GUIDES[kind])
    for _ in range(rng.randint(0, 3)):
        token = rng.choice(request.grammar.legal_after(()).nonzero()[0].tolist())
        request.grammar.advance(token)
        request.output_ids.append(token)
        if request.grammar.is_complete:
            break
    return request


def random_tree(requests: list[Request], num_nodes: int, rng: random.Random) -> DraftTree:
    """Most tokens are legal where they stand, some end the text in the middle, some are anything."""
    tokens, parents = [], []
    for request in requests:
        token_N, parent_N = [request.all_ids[-1]], [0]
        while len(token_N) < num_nodes:
            parent = rng.randrange(len(token_N))
            path = tuple(token_N[node] for node in path_to(parent_N, parent)[1:])
            legal = request.grammar.legal_after(path) if request.grammar else None
            likely = [] if legal is None else legal.nonzero()[0].tolist()
            token = rng.choice(likely if likely and rng.random() < 0.7 else [*EOS, rng.randrange(VOCAB_SIZE)])
            if (token, parent) not in zip(token_N, parent_N, strict=True):
                token_N.append(token)
                parent_N.append(parent)
        tokens.append(token_N)
        parents.append(parent_N)
    token_BN = torch.tensor(tokens)
    return DraftTree.of(token_BN, torch.tensor(parents), torch.ones_like(token_BN, dtype=torch.bool))


def nodes_of(tree: DraftTree, requests: list[Request]) -> Nodes:
    length_B = torch.tensor([request.num_tokens for request in requests])
    return Nodes(tree.token_BN, length_B[:, None] + tree.depth_BN, tree.mask_BNN)


@pytest.mark.parametrize("seed", range(12))
def test_every_node_is_masked_as_by_a_fresh_matcher(compiler, seed):
    rng = random.Random(seed)
    kinds = ["regex", None, "json_schema", "choice"]
    requests = [grown_request(compiler, kind, rng) for kind in kinds]
    tree = random_tree(requests, 10, rng)
    logits_BNV = torch.randn(4, 10, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))
    masked_BNV = target_logits(logits_BNV, nodes_of(tree, requests), SamplingBatch.of(requests, "cpu"))
    plain_BNV = target_logits(logits_BNV, nodes_of(tree, requests), SamplingBatch.of([Request("r", PROMPT)] * 4, "cpu"))
    forbidden = 0
    for row, (kind, request) in enumerate(zip(kinds, requests, strict=True)):
        if kind is None:
            assert torch.equal(masked_BNV[row], plain_BNV[row]), "requests without a grammar are left alone"
            continue
        matcher = fresh_matcher(grammar_of(kind))
        for node in range(10):
            path = [tree.token_BN[row, n].item() for n in path_to(tree.parent_BN[row].tolist(), node)[1:]]
            legal = legal_by_definition(matcher, request.output_ids + path)
            finite_V = masked_BNV[row, node].isfinite().numpy()
            forbidden += legal is None
            assert finite_V.all() if legal is None else (finite_V == legal).all()
    assert forbidden, "no drafted token was forbidden: only half is tested"


def test_what_is_allowed_keeps_its_logit_and_the_rest_is_never_picked(compiler):
    request = Request("r", PROMPT, SamplingParams(temperature=0))
    request.grammar = compiler.start("regex", "[ab]c")
    logits_1NV = torch.zeros(1, 1, VOCAB_SIZE)
    a, b = ids_of("ab")
    logits_1NV[0, 0, b], logits_1NV[0, 0, 7] = 1.0, 99.0
    nodes = Nodes.roots(torch.tensor([PROMPT[-1]]), torch.tensor([len(PROMPT)]))
    sampling = SamplingBatch.of([request], "cpu")
    masked_V = target_logits(logits_1NV, nodes, sampling)[0, 0]
    assert masked_V[[a, b]].tolist() == [0.0, 1.0] and masked_V.isfinite().sum() == 2
    assert pick_tokens(logits_1NV, nodes, sampling).item() == b
    assert logits_1NV[0, 0, 7] == 99.0, "the model's own logits stay"


def test_a_batch_without_grammars_has_no_processor():
    assert SamplingBatch.of([Request("r", PROMPT)], "cpu").before_temperature == ()
