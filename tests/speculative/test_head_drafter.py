"""The drafted trees are those of the official algorithm: same tokens, same parents."""

import pytest
import torch

from specbackend.request import Request, SamplingParams
from specbackend.speculative import head_drafter
from tests.conftest import DEMO_EAGLE3
from tests.speculative.reference_eagle3 import ReferenceDraft, grow_tree
from tests.test_equivalence import make_engine


@pytest.fixture(scope="module")
def reference(hf_target) -> ReferenceDraft:
    return ReferenceDraft(DEMO_EAGLE3, hf_target)


def drafted_trees(engine, prompt: list[int], steps: int, monkeypatch) -> list[tuple[list[int], list[int], list[int]]]:
    """Run a few decode steps; return (all tokens before the step, tree tokens, tree parents) of each."""
    trees, build_tree = [], head_drafter.build_tree

    def recording_build_tree(*args):
        trees.append(build_tree(*args))
        return trees[-1]

    monkeypatch.setattr(head_drafter, "build_tree", recording_build_tree)
    request = Request("probe", prompt, SamplingParams(max_new_tokens=200, temperature=0))
    engine.submit(request)
    contexts = []
    while len(trees) < steps and engine.has_work:
        known, before = len(trees), request.all_ids
        engine.step()
        contexts += [before] * (len(trees) - known)
    engine.cancel("probe")
    return [
        (context, tree.token_BN[0].tolist(), tree.parent_BN[0].tolist())
        for context, tree in zip(contexts, trees, strict=True)
    ]


@pytest.mark.parametrize("tree", [(5, 4, 8), (5, 1, 6), (3, 8, 32), (1, 3, 4)], ids=str)
@torch.no_grad()
def test_tree_equals_official_growth(tree, reference, hf_target, demo_prompts, monkeypatch):
    engine = make_engine(tree)
    for prompt in demo_prompts[:25]:
        for context, tokens, parents in drafted_trees(engine, prompt, 3, monkeypatch):
            assert (tokens, parents) == grow_tree(reference, hf_target, context, *tree)
