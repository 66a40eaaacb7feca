"""The bundled drafts do what their cards say: exact like all others, and better the better the algorithm is."""

from functools import cache

import pytest

from specbackend import Engine
from specbackend.models import linear
from specbackend.sampling import Likeliest
from specbackend.speculative import tree_growth
from specbackend.speculative.native_growth import NativeGrower
from specbackend.speculative.native_step import NativeTreeDecoder
from specbackend.speculative.tree_decoder import TreeDecoder
from specbackend.speculative.tree_growth import TreeGrower
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET, DEMOS, NEW_TOKENS
from tests.test_equivalence import mean_accept_length

EAGLE3 = {
    "speculative_adaptive": False,
    "speculative_algorithm": "EAGLE3",
    "speculative_draft_model_path": str(DEMO_EAGLE3),
}
EAGLE = {
    "speculative_adaptive": False,
    "speculative_algorithm": "EAGLE",
    "speculative_draft_model_path": str(DEMOS / "llama-gsm8k-eagle"),
}
CHAIN = {"speculative_num_steps": 5, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 6}
TREE = {**CHAIN, "speculative_eagle_topk": 4}
SETUPS = {
    "plain": {},
    "EAGLE3": EAGLE3,
    "EAGLE3 chain": {**EAGLE3, **CHAIN},
    "EAGLE3 tree": {**EAGLE3, **TREE},
    "EAGLE": EAGLE,
    "EAGLE+map": {**EAGLE, "speculative_token_map": str(DEMOS / "llama-gsm8k-eagle" / "freq_256.pt")},
    "NEXTN": {
        "model_path": str(DEMOS / "mimo-gsm8k"),
        "speculative_adaptive": False,
        "speculative_algorithm": "NEXTN",
        "speculative_num_steps": 1,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 2,
    },
    "NGRAM": {"speculative_adaptive": False, "speculative_algorithm": "NGRAM"},
}


@pytest.fixture(scope="module")
def answers(demo_prompts):
    @cache
    def generate(name: str) -> list[dict]:
        engine = Engine(**{"model_path": str(DEMO_TARGET), "max_running_requests": 20} | SETUPS[name])
        sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS}
        return engine.generate(input_ids=demo_prompts, sampling_params=sampling)

    return generate


@pytest.mark.parametrize("name", SETUPS)
def test_greedy_equals_hf_generate(name, answers, expected):
    assert [answer["output_ids"] for answer in answers(name)] == expected


@pytest.mark.parametrize("name", ["plain", "EAGLE3", "EAGLE+map", "NEXTN"])
@pytest.mark.usefixtures("no_compiler")
def test_packed_weights_change_nothing(name, demo_prompts, expected, monkeypatch):
    monkeypatch.setattr(linear, "MIN_PACKED_SIZE", 0)  # the demo's are too small to be packed
    engine = Engine(**{"model_path": str(DEMO_TARGET)} | SETUPS[name])
    assert isinstance(engine.plain.runner.model.lm_head, linear.PackedLinear)
    answers = engine.generate(
        input_ids=demo_prompts[:10], sampling_params={"temperature": 0, "max_new_tokens": NEW_TOKENS}
    )
    assert [answer["output_ids"] for answer in answers] == expected[:10]


def test_better_algorithms_accept_more(answers):
    length = {name: mean_accept_length(answers(name)) for name in SETUPS}
    assert length["EAGLE3"] > length["EAGLE"] >= length["EAGLE+map"] > 2
    assert length["EAGLE3 tree"] > length["EAGLE3 chain"], "a tree of as many nodes"
    assert length["NEXTN"] > 1.5
    assert length["NGRAM"] > 1.3


def blindly_likeliest(K, draft_logits_BNW, token_W, vocab_size, nodes, sampling) -> Likeliest:
    """As if nobody could know the noise: candidates by their probability alone."""
    best = (draft_logits_BNW / sampling.temperature_B[:, None, None]).log_softmax(-1).topk(K)
    return Likeliest(best.values, token_W[best.indices])


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
def test_sampled_text_is_drafted_with_the_targets_own_noise(shape, demo_prompts, monkeypatch):
    engine = Engine(model_path=str(DEMO_TARGET), max_running_requests=20, **EAGLE3, **shape)

    def accept_length() -> float:
        params = {"temperature": 1.0, "max_new_tokens": NEW_TOKENS, "seed": 1}
        return mean_accept_length(engine.generate(input_ids=demo_prompts[:20], sampling_params=params))

    foreseen = accept_length()
    monkeypatch.setattr(NativeTreeDecoder, "decode", TreeDecoder.decode)
    monkeypatch.setattr(NativeGrower, "grow", TreeGrower.grow)
    assert accept_length() == foreseen
    monkeypatch.setattr(tree_growth, "likeliest", blindly_likeliest)
    assert foreseen > 1.2 * accept_length()


def test_size():
    assert sum(path.stat().st_size for path in DEMOS.rglob("*") if path.is_file()) < 30e6
