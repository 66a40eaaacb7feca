"""What one request leaves in the prefix cache serves the next, speculative or plain, and costs no acceptance."""

from functools import cache

import pytest

from specbackend import Engine
from specbackend.errors import InvalidRequest
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET, DEMOS

MIMO = DEMOS / "mimo-gsm8k"
ALGORITHMS = {
    "EAGLE3": {"speculative_draft_model_path": str(DEMO_EAGLE3)},
    "EAGLE": {"speculative_draft_model_path": str(DEMOS / "llama-gsm8k-eagle")},
    "STANDALONE": {"speculative_draft_model_path": str(DEMO_TARGET)},
    "NEXTN": {"model_path": str(MIMO)},
    "NGRAM": {},
}
PLAIN, DRAFTED = {"speculative": False}, {"speculative": True}
GREEDY = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}


@pytest.fixture(scope="module", params=ALGORITHMS)
def new_engine(request):
    """Makes engines of one algorithm, which lose their cache before they are given."""
    params = {"model_path": str(DEMO_TARGET), **ALGORITHMS[request.param]}
    make = cache(lambda: Engine(speculative_algorithm=request.param, speculative_adaptive=False, **params))

    def emptied() -> Engine:
        slots = make().slots
        slots.release(slots.allocate(slots.num_available))
        return make()

    return emptied


def converse(engine: Engine, prompt: list[int], turns: list[dict], cold: bool) -> list[dict]:
    """Each turn says all that was said before, and a word of its own."""
    answers, text = [], prompt
    for turn in turns:
        if cold:
            engine.slots.release(engine.slots.allocate(engine.slots.num_available))
        answers.append(engine.generate(input_ids=text, sampling_params={**GREEDY, **turn}))
        text = text + answers[-1]["output_ids"] + [77]
    return answers


@pytest.mark.parametrize(
    "turns",
    [
        [DRAFTED, DRAFTED, DRAFTED],
        [PLAIN, DRAFTED, PLAIN, DRAFTED],
        [DRAFTED, PLAIN, PLAIN, DRAFTED, DRAFTED],
        [PLAIN, PLAIN, DRAFTED],
    ],
    ids=lambda turns: "-".join("drafted" if turn["speculative"] else "plain" for turn in turns),
)
def test_a_conversation_is_drafted_as_well_as_without_a_cache(new_engine, turns, demo_prompts):
    prompt = demo_prompts[3]
    warm, cold = (converse(new_engine(), prompt, turns, is_cold) for is_cold in (False, True))
    for one, other in zip(warm, cold, strict=True):
        assert one["output_ids"] == other["output_ids"]
        assert one["meta_info"]["spec_verify_ct"] == other["meta_info"]["spec_verify_ct"]
        assert other["meta_info"]["cached_tokens"] == 0
    assert all(answer["meta_info"]["cached_tokens"] >= len(prompt) - 1 for answer in warm[1:])


@pytest.mark.parametrize("kind", [PLAIN, DRAFTED], ids=["plain", "drafted"])
def test_an_answer_is_cached_for_its_like(new_engine, kind, demo_prompts):
    _, second = converse(new_engine(), demo_prompts[3], [kind, kind], cold=False)
    known = second["meta_info"]["prompt_tokens"] - 2  # the answer's last token has no KV, and the new word none
    assert second["meta_info"]["cached_tokens"] >= known - 4  # STANDALONE has not read the last few


def test_salts_keep_caches_apart(new_engine, demo_prompts):
    engine, prompt = new_engine(), demo_prompts[3]

    def cached(**salt: str) -> int:
        return engine.generate(input_ids=prompt, sampling_params={**GREEDY, **salt})["meta_info"]["cached_tokens"]

    assert cached(cache_salt="a") == 0
    assert cached(cache_salt="b") == cached() == 0
    assert cached(extra_key="a") == cached(cache_salt="b") == cached() == len(prompt) - 1


def test_several_answers_compute_their_prompt_once(new_engine, demo_prompts):
    engine, prompt = new_engine(), demo_prompts[3]
    answers = engine.generate(input_ids=prompt, sampling_params={**GREEDY, "n": 4})
    assert [answer["meta_info"]["cached_tokens"] for answer in answers] == [0] + [len(prompt) - 1] * 3


def test_priorities_are_for_servers_that_serve_them(new_engine):
    engine = new_engine()
    with pytest.raises(InvalidRequest, match=r"^priority: .*enable_priority_scheduling"):
        engine.generate(input_ids=[5, 6], sampling_params={"priority": 1})
    assert engine.generate(input_ids=[5, 6], sampling_params={"priority": 0, "max_new_tokens": 1})["output_ids"]


def test_flush_drops_what_no_request_uses_and_the_answers_stay(new_engine):
    engine = new_engine()
    prompt = list(range(40, 80))
    before = engine.generate(input_ids=prompt, sampling_params=GREEDY)
    view = engine.cache_view(10)
    assert sum(node.num_tokens for node in view.nodes) == view.num_tokens == engine.slots.tree.num_slots > 0
    running = engine.generate(input_ids=prompt, sampling_params=GREEDY, stream=True)
    next(running)
    assert engine.flush_cache() < view.num_tokens
    assert engine.cache_view(10).locked_tokens == engine.cache_view(10).num_tokens > 0
    assert list(running)[-1]["output_ids"] == before["output_ids"]
    assert engine.flush_cache() > 0
    assert engine.slots.num_free == engine.slots.num_slots
    again = engine.generate(input_ids=prompt, sampling_params=GREEDY)
    assert (again["output_ids"], again["meta_info"]["cached_tokens"]) == (before["output_ids"], 0)
