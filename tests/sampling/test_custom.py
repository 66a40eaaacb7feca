"""The server's own logits processors see the true text in every place, and what they do wrong hurts nobody else."""

import pytest
import torch

from specbackend import Engine
from specbackend.errors import ConfigError, InvalidRequest
from specbackend.request import Failure, Request
from specbackend.sampling import Nodes, SamplingBatch, target_logits
from specbackend.sampling.custom import load_processors
from specbackend.sampling_params import SamplingParams
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET
from tests.speculative.random_trees import path_to, tree_of

NEW_TOKENS, MODULE = 24, "tests.custom_processors"
EAGLE3 = {
    "speculative_adaptive": False,
    "speculative_algorithm": "EAGLE3",
    "speculative_draft_model_path": str(DEMO_EAGLE3),
}


def make_engine(*names: str, **params) -> Engine:
    processors = ", ".join(f"{MODULE}:{name}" for name in names)
    return Engine(model_path=str(DEMO_TARGET), logits_processors=processors, **params)


def test_called_once_for_each_place_with_its_own_text():
    calls = []

    def recording(prompt_ids, output_ids, logits, custom_params):
        calls.append((prompt_ids, output_ids, logits.tolist(), custom_params))
        return logits * 2

    params = SamplingParams.from_dict({"temperature": 0, "custom_params": {"a": 1}, "logit_bias": {3: 1.5}})
    request = Request("a", [5, 6], params, output_ids=[7], processors=(recording,))
    other = Request("b", [9], SamplingParams(temperature=0.0))
    parents, tokens = [0, 0, 1, 1, 3], [7, 8, 9, 10, 11]
    tree = tree_of(tokens, parents)
    both = Nodes(*(each.expand(2, *each.shape[1:]) for each in (tree.token_BN, 3 + tree.depth_BN, tree.mask_BNN)))
    logits_BNV = torch.randn(2, 5, 12)
    found_BNV = target_logits(logits_BNV, both, SamplingBatch.of([request, other], "cpu"))
    biased_NV = logits_BNV[0].clone()
    biased_NV[:, 3] += 1.5
    paths = [[tokens[node] for node in path_to(parents, place)] for place in range(5)]
    assert calls == [([5, 6], path, biased_NV[n].tolist(), {"a": 1}) for n, path in enumerate(paths)]
    torch.testing.assert_close(found_BNV[0], biased_NV * 2)
    assert torch.equal(found_BNV[1], logits_BNV[1])


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "top_k": 20}], ids=str)
@pytest.mark.parametrize(
    "server", [EAGLE3, {"speculative_adaptive": False, "speculative_algorithm": "NGRAM"}], ids=["eagle3", "ngram"]
)
def test_drafted_text_is_that_of_plain_decoding(server, sampling, demo_prompts):
    names = ("no_token_twice_in_a_row", "sum_of_the_text")
    params = [
        {**sampling, "max_new_tokens": NEW_TOKENS, "seed": i, "custom_params": {"favour": favour}, "top_p": 0.95}
        for i, favour in enumerate((0.0, 4.0, 30.0, 2.0))
    ]
    plain, drafted = make_engine(*names), make_engine(*names, **server)
    expected = plain.generate(input_ids=demo_prompts[:4], sampling_params=params)
    answers = drafted.generate(input_ids=demo_prompts[:4], sampling_params=params)
    assert [answer["output_ids"] for answer in answers] == [answer["output_ids"] for answer in expected]
    assert all(
        a != b for answer in answers for a, b in zip(answer["output_ids"], answer["output_ids"][1:], strict=False)
    )
    forced = answers[2]["output_ids"]
    sums = [(sum(forced[:i]) * 31 + len(demo_prompts[2])) % 1024 for i in range(NEW_TOKENS)]
    assert sum(a == b for a, b in zip(forced, sums, strict=True)) > NEW_TOKENS // 2


@pytest.mark.parametrize("server", [{}, EAGLE3], ids=["plain", "drafted"])
@pytest.mark.parametrize(
    "name, told",
    [("raises", "KeyError"), ("forbids_all", "-inf"), ("of_another_shape", "1023")],
)
def test_what_goes_wrong_ends_the_request_that_asked_for_it(name, told, server, demo_prompts):
    engine = make_engine(name, **server)
    params = {"temperature": 0, "max_new_tokens": NEW_TOKENS}
    expected = Engine(model_path=str(DEMO_TARGET)).generate(input_ids=demo_prompts[0], sampling_params=params)
    bad = SamplingParams.from_dict({**params, "custom_params": {"after": 6}})
    engine.submit(Request("bad", demo_prompts[1], bad))
    engine.submit(Request("good", demo_prompts[0], SamplingParams.from_dict(params)))
    tokens, failure = [], None
    while engine.has_work:
        for update in engine.step():
            if update.request_id == "good":
                tokens += update.token_ids
            failure = update.failure or failure
    assert tokens == expected["output_ids"]
    assert isinstance(failure, Failure) and failure.field == "logits_processors" and told in failure.message
    stats = engine.stats()
    assert stats.free_slots + stats.evictable_slots == stats.total_slots


def test_custom_params_are_refused_where_nothing_reads_them():
    engine = Engine(model_path=str(DEMO_TARGET))
    with pytest.raises(InvalidRequest) as refusal:
        engine.submit(Request("a", [1], SamplingParams(custom_params={"a": 1})))
    assert refusal.value.field == "custom_params"


@pytest.mark.parametrize(
    "names", ["nowhere:f", f"{MODULE}:nothing", MODULE, f"{MODULE}:raises,", f"{MODULE}:NOT_CALLABLE", "a..b:c"]
)
def test_what_cannot_be_loaded_is_a_load_error(names):
    with pytest.raises(ConfigError, match="logits_processors"):
        load_processors(names)
