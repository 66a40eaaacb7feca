"""A request's own draft tree is what a server of that tree would draft, whatever the others in the batch do."""

import pytest

from specbackend import Engine
from specbackend.config import TREE, EngineConfig, TreeShape
from specbackend.errors import InvalidRequest
from specbackend.request import Request
from specbackend.sampling_params import SamplingParams
from specbackend.speculative.native_step import NativeTreeDecoder
from specbackend.speculative.tree_decoder import TreeDecoder
from specbackend.speculative.tree_shapes import tree_of
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET
from tests.speculative.test_head_drafter import drafted_trees

SERVER = (5, 4, 8)
NEW_TOKENS = 40


def tree_params(*tree) -> dict:
    return {name: value for name, value in zip(TREE, tree, strict=True) if value is not None}


def make_engine(*tree, **params) -> Engine:
    draft = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(DEMO_EAGLE3)}
    return Engine(model_path=str(DEMO_TARGET), speculative_adaptive=False, **draft, **tree_params(*tree), **params)


def steps_and_tokens(engine: Engine, prompts, params) -> list[tuple[int, list[int]]]:
    answers = engine.generate(input_ids=prompts, sampling_params=params)
    return [(answer["meta_info"]["spec_verify_ct"], answer["output_ids"]) for answer in answers]


# what a request asks for, and the server that does the same for all
OWN = [
    ((None, None, None), SERVER),
    ((3, 2, 5), (3, 2, 5)),
    ((None, 1, None), (5, 1, 6)),
    ((2, 1, None), (2, 1, 3)),
    ((1, 4, 3), (1, 4, 3)),
    ((None, None, 4), (5, 4, 4)),
    ((2, 3, None), (2, 3, 8)),
    ((None, 1, 4), (3, 1, 4)),
]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_own_trees_mixed_in_one_batch(temperature, demo_prompts):
    sampling = [{"temperature": temperature, "seed": i, "max_new_tokens": NEW_TOKENS} for i in range(10)]
    prompts = demo_prompts[:10]
    expected = []
    for index, (_, server) in enumerate(OWN):
        engine = make_engine(*server)
        expected += steps_and_tokens(engine, prompts[index : index + 1], sampling[index : index + 1])
    plain = {"speculative": False}
    expected += steps_and_tokens(engine, prompts[8:], [{**each, **plain} for each in sampling[8:]])
    own = [tree_params(*asked) for asked, _ in OWN] + [plain, {"speculative_num_draft_tokens": 1}]
    together = [{**each, **tree} for each, tree in zip(sampling, own, strict=True)]
    assert steps_and_tokens(make_engine(*SERVER), prompts, together) == expected
    assert len({steps for steps, _ in expected}) > 4, "the trees do not differ enough to tell"


def test_an_own_tree_grows_as_on_a_server_of_that_tree(demo_prompts, monkeypatch):
    """Of all its candidates, so that one too many anywhere would show."""
    large, small = make_engine(5, 4, 20), make_engine(5, 2, 19)
    for prompt in demo_prompts[:6]:
        own = drafted_trees(large, prompt, 3, monkeypatch, **tree_params(5, 2, 19))
        assert own == drafted_trees(small, prompt, 3, monkeypatch)


def test_a_batch_of_small_trees_verifies_no_more_nodes_than_they_have(demo_prompts, monkeypatch):
    engine = make_engine(*SERVER)
    monkeypatch.setattr(NativeTreeDecoder, "decode", TreeDecoder.decode)
    rows, forward = [], engine.decoder.runner.forward

    def recording_forward(batch):
        rows.append(batch.token_BQ.shape[1])
        return forward(batch)

    monkeypatch.setattr(engine.decoder.runner, "forward", recording_forward)
    params = {"temperature": 0, "max_new_tokens": 8, **tree_params(2, 2, 3)}
    engine.generate(input_ids=[[1, 2, 3, 4], [4, 5, 6, 7]], sampling_params=params)
    assert rows[0] == 4 and set(rows[1:]) == {3}


def test_ngram_trees_have_their_own_size():
    ngram = {"speculative_algorithm": "NGRAM", "speculative_adaptive": False}
    engine = Engine(model_path=str(DEMO_TARGET), speculative_num_draft_tokens=10, **ngram)
    prompt, params = [5, 6, 7, 8, 9, 10, 11, 12] * 4, {"temperature": 0, "max_new_tokens": 30}
    of_size = {
        size: steps_and_tokens(engine, [prompt], {**params, "speculative_num_draft_tokens": size})[0]
        for size in (1, 2, 5, 10)
    }
    assert len({tuple(tokens) for _, tokens in of_size.values()}) == 1
    assert of_size[1][0] == 29
    small = Engine(model_path=str(DEMO_TARGET), speculative_num_draft_tokens=5, **ngram)
    assert steps_and_tokens(small, [prompt], params)[0] == of_size[5]


EAGLE3 = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": "d"}
NGRAM = {"speculative_algorithm": "NGRAM"}
REFUSED = [
    (EAGLE3, (6, None, None), "speculative_num_steps", "5"),
    (EAGLE3, (None, 5, None), "speculative_eagle_topk", "4"),
    (EAGLE3, (None, None, 9), "speculative_num_draft_tokens", "8"),
    (EAGLE3, (1, 2, 4), "speculative_num_draft_tokens", "2 tokens"),
    (EAGLE3, (3, 1, 5), "speculative_num_draft_tokens", "3 tokens"),
    (NGRAM, (2, None, None), "speculative_num_steps", "NGRAM"),
    (NGRAM, (None, 1, None), "speculative_eagle_topk", "NGRAM"),
    (NGRAM, (None, None, 13), "speculative_num_draft_tokens", "12"),
    ({}, (None, None, 4), "speculative_num_draft_tokens", "speculative_algorithm"),
]


@pytest.mark.parametrize("server, asked, field, told", REFUSED, ids=str)
def test_refused_by_name(server, asked, field, told):
    with pytest.raises(InvalidRequest, match=told) as refusal:
        tree_of(SamplingParams(**tree_params(*asked)), EngineConfig("m", **server))
    assert refusal.value.field == field


@pytest.mark.parametrize(
    "asked, tree",
    [
        ((None, None, 1), None),
        ((None, 1, None), TreeShape(5, 1, 6)),
        ((None, 1, 3), TreeShape(2, 1, 3)),
        ((4, 1, 3), TreeShape(2, 1, 3)),
        ((1, None, None), TreeShape(1, 4, 5)),
        ((None, None, 3), TreeShape(2, 4, 3)),
    ],
    ids=str,
)
def test_what_is_not_asked_for_is_as_large_as_the_server_allows(asked, tree):
    assert tree_of(SamplingParams(**tree_params(*asked)), EngineConfig("m", **EAGLE3)) == tree


@pytest.mark.parametrize(("asked", "drafted"), [((None, None, 4), 3), ((2, 1, None), 2), ((None, None, 1), 0)])
def test_updates_tell_how_much_was_drafted(asked, drafted):
    engine = make_engine(*SERVER)
    engine.submit(Request("0", [1, 2, 3], SamplingParams(temperature=0, max_new_tokens=8, **tree_params(*asked))))
    while engine.has_work:
        updates = engine.step()
    assert updates[0].draft_tokens == drafted * updates[0].spec_verify_ct
