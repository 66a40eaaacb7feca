"""Shadow mode: how many answers are decoded again, that bugs are found, and that nobody else notices."""

import logging
from pathlib import Path

import pytest
import torch

from specbackend import Engine
from specbackend.request import Request
from specbackend.sampling_params import SamplingParams
from specbackend.shadow import plain_params
from specbackend.speculative import tree_decoder
from specbackend.speculative.verifier import accept_path
from tests.checkpoints import write_head, write_target, write_tokenizer
from tests.speculative.random_trees import lowest_child

VOCABULARY, EOS = 12, 7
PROMPTS = [[number % VOCABULARY, 3, 5] for number in range(20)]
SAMPLED = {"temperature": 1.0, "max_new_tokens": 16, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    config = {"vocab_size": VOCABULARY, "num_hidden_layers": 7, "initializer_range": 0.15, "eos_token_id": EOS}
    model = write_target(folder / "target", **config)
    write_tokenizer(folder / "target", VOCABULARY)
    write_head(folder / "head", "EAGLE3", model.config)
    return folder


@pytest.fixture
def make_engine(folder):
    """Engines that must be without work and without a lost slot in the end."""
    made = []

    def make(shadow_fraction: float = 1.0, **params) -> Engine:
        draft = {
            "speculative_adaptive": False,
            "speculative_algorithm": "EAGLE3",
            "speculative_draft_model_path": str(folder / "head"),
        }
        tree = {"speculative_num_steps": 2, "speculative_eagle_topk": 2, "speculative_num_draft_tokens": 5}
        params = {**draft, **tree, "max_total_tokens": 2000, **params}
        made.append(Engine(model_path=str(folder / "target"), shadow_fraction=shadow_fraction, **params))
        return made[-1]

    yield make
    for engine in made:
        stats = engine.stats()
        assert not engine.has_work
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.free_slots + stats.evictable_slots == stats.total_slots


def submit(engine: Engine, name: str, number: int = 0, **params) -> None:
    engine.submit(Request(name, PROMPTS[number], SamplingParams(**{**SAMPLED, "seed": number, **params})))


def finish(engine: Engine) -> dict[str, list[int]]:
    """Step until there is no work; the tokens by request."""
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for update in engine.step():
            tokens.setdefault(update.request_id, []).extend(update.token_ids)
    return tokens


def ids(answers: list[dict]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.0, 0), (1.0, 20), (0.5, 10), (0.3, 6), (0.05, 1), (0.04, 0)], ids=str
)
def test_share_is_met_and_equality_counts(make_engine, fraction, expected):
    engine = make_engine(fraction)
    engine.generate(input_ids=PROMPTS, sampling_params=SAMPLED)
    stats = engine.stats()
    assert (stats.shadow_requests, stats.shadow_tokens) == (expected, expected * 16)
    assert stats.shadow_different_requests == 0


def test_chosen_evenly(make_engine, monkeypatch):
    engine, chosen = make_engine(0.25), []
    for number in range(12):
        before = engine.stats().shadow_requests
        engine.generate(input_ids=PROMPTS[number], sampling_params=SAMPLED)
        chosen.append(engine.stats().shadow_requests - before)
    assert chosen == [0, 0, 0, 1] * 3


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"seed": 5, "top_p": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.4},
        {"ignore_eos": False, "max_new_tokens": 60},  # ends by eos
        {"stop_token_ids": [2], "max_new_tokens": 60, "min_new_tokens": 3},
        {"max_new_tokens": 1},
        {"max_new_tokens": 1 << 20},  # ends with the context
    ],
    ids=str,
)
def test_every_end_of_an_answer_is_reached_again(make_engine, params):
    engine = make_engine()
    answers = engine.generate(input_ids=PROMPTS[:6], sampling_params={**SAMPLED, **params})
    stats = engine.stats()
    assert (stats.shadow_requests, stats.shadow_different_requests) == (6, 0)
    assert stats.shadow_tokens == sum(map(len, ids(answers)))


def test_live_answers_and_totals_are_as_without(make_engine):
    """Also those that bring no seed: shadows take none of the engine's."""
    shadowing, bare = make_engine(), make_engine(0.0)
    for _ in range(2):
        answers = [engine.generate(input_ids=PROMPTS, sampling_params=SAMPLED) for engine in (shadowing, bare)]
        assert ids(answers[0]) == ids(answers[1])
    mine, theirs = shadowing.stats(), bare.stats()
    assert mine.shadow_requests == 40
    for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "verify_steps"):
        assert getattr(mine, name) == getattr(theirs, name)


def with_wrong_tokens(monkeypatch, every: int) -> None:
    """Let verification take some child for the target's pick in every so many-th step."""
    steps = iter(range(1, 1 << 30))

    def accept(tree, pick_BN):
        if next(steps) % every == 0:
            pick_BN[:, 0] = lowest_child(tree)
        return accept_path(tree, pick_BN)

    monkeypatch.setattr(tree_decoder, "accept_path", accept)


def test_bug_is_counted_and_logged_without_what_was_said(make_engine, monkeypatch, caplog):
    engine, right = make_engine(), make_engine(0.0)
    [expected] = ids(right.generate(input_ids=PROMPTS[:1], sampling_params=[{**SAMPLED, "seed": 1}]))
    with_wrong_tokens(monkeypatch, every=2)
    with caplog.at_level(logging.WARNING):
        [wrong] = ids(engine.generate(input_ids=PROMPTS[:1], sampling_params=[{**SAMPLED, "seed": 1}]))
    stats = engine.stats()
    assert (stats.shadow_requests, stats.shadow_different_requests) == (1, 1)
    position = [a == b for a, b in zip(wrong, expected, strict=True)].index(False)
    assert caplog.messages == [f"shadow mode: an answer of 16 tokens differs from token {position} on"]


def test_plain_and_cancelled_requests_are_not_audited(make_engine):
    engine = make_engine()
    submit(engine, "plain", speculative=False)
    submit(engine, "left", 1)
    submit(engine, "never begun", 2, stop=("x",))
    engine.cancel("never begun")
    for _ in range(4):
        engine.step()
    engine.cancel("left")
    assert set(finish(engine)) == {"plain"}
    assert engine.stats().shadow_requests == 0


def test_stop_string_ends_an_answer_that_is_audited_as_far_as_it_went(make_engine):
    engine = make_engine()
    params = {**SAMPLED, "seed": 3, "temperature": 0.0, "min_new_tokens": 3, "ignore_eos": False}
    words = engine.generate(input_ids=PROMPTS[0], sampling_params=params)["text"].split()
    before = engine.stats()
    stopped = engine.generate(input_ids=PROMPTS[0], sampling_params={**params, "stop": " ".join(words[4:6])})
    assert stopped["meta_info"]["finish_reason"] == "stop" and len(stopped["output_ids"]) < 12
    after = engine.stats()
    assert after.shadow_requests - before.shadow_requests == 1
    assert len(stopped["output_ids"]) <= after.shadow_tokens - before.shadow_tokens < 16
    assert after.shadow_different_requests == 0


def test_work_is_left_until_the_shadows_are_done(make_engine):
    engine = make_engine()
    for number in range(8):
        submit(engine, str(number), number)
    open_requests = {str(number) for number in range(8)}
    while open_requests:
        open_requests -= {update.request_id for update in engine.step() if update.finished}
    stats = engine.stats()
    assert engine.has_work and stats.shadow_requests < 8
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert finish(engine) == {}
    assert engine.stats().shadow_requests == 8


def test_few_at_once_and_none_while_live_requests_wait(make_engine):
    engine = make_engine(max_running_requests=6)
    for number in range(20):
        submit(engine, str(number), number)
    most = 0
    while engine.has_work:
        waited = len(engine.scheduler.waiting)
        before = engine.shadows.num_running
        engine.step()
        assert not waited or engine.shadows.num_running <= before
        most = max(most, engine.shadows.num_running)
    assert most == 4
    assert engine.stats().shadow_requests == 20


def test_live_request_takes_the_place_of_a_shadow(make_engine):
    """There is one place. The shadow steps aside after at most one step and begins again when it is free."""
    engine = make_engine(max_running_requests=1)
    submit(engine, "first")
    while not engine.shadows.num_running:
        engine.step()
    submit(engine, "second", 1)
    engine.step()
    assert engine.stats().num_waiting == 1 and engine.shadows.num_running == 0
    assert [update.request_id for update in engine.step()] == ["second"]
    finish(engine)
    assert engine.stats().shadow_requests == 2


def test_none_is_started_where_slots_are_short(make_engine):
    engine = make_engine(context_length=64, max_total_tokens=100, disable_radix_cache=True)
    submit(engine, "long", max_new_tokens=60)
    while engine.stats().free_slots >= 50:
        engine.step()
    for number in range(4):
        submit(engine, "short", number, max_new_tokens=1)
    ended: list[str] = []
    while "long" not in ended:
        ended += [update.request_id for update in engine.step() if update.finished]
        assert engine.shadows.num_running == 0
    assert ended == ["short"] * 4 + ["long"]
    finish(engine)
    assert engine.stats().shadow_requests == 5


def test_beside_live_requests_they_run_as_a_full_group(make_engine):
    engine = make_engine()
    submit(engine, "long", max_new_tokens=60)
    for number in range(3):
        submit(engine, "short", number, max_new_tokens=4)
    for _ in range(12):
        engine.step()
        assert engine.shadows.num_running == 0
    submit(engine, "fourth", 4, max_new_tokens=4)
    while not engine.stats().shadow_requests:
        assert engine.step() is not None and engine.stats().num_running
    assert {update.request_id for _ in range(4) for update in engine.step()} == {"long"}
    finish(engine)
    assert engine.stats().shadow_requests == 5


def test_random_traffic_in_a_small_pool(make_engine):
    """Retractions, cancellations and shadows at once: all live answers are right, and all shadows equal."""
    generator = torch.Generator().manual_seed(0)
    engine, bare = make_engine(max_running_requests=5, context_length=64, max_total_tokens=110), make_engine(0.0)
    expected = ids(bare.generate(input_ids=PROMPTS, sampling_params=[{**SAMPLED, "seed": seed} for seed in range(20)]))
    tokens: dict[str, list[int]] = {}
    for number in range(20):
        submit(engine, str(number), number)
        for _ in range(int(torch.randint(12, (), generator=generator))):
            for update in engine.step():
                tokens.setdefault(update.request_id, []).extend(update.token_ids)
        if number % 5 == 4:
            engine.cancel(str(number))
    for name, rest in finish(engine).items():
        tokens.setdefault(name, []).extend(rest)
    for number in range(20):
        answer = tokens.get(str(number), [])
        assert answer == expected[number][: len(answer)]
        assert len(answer) == 16 or number % 5 == 4
    stats = engine.stats()
    assert stats.shadow_requests >= 16 and stats.shadow_different_requests == 0


def test_shutdown_drops_shadows(make_engine):
    engine = make_engine()
    for number in range(8):
        submit(engine, str(number), number, stop=("never",))
    while not engine.shadows.num_running:
        engine.step()
    engine.shutdown()
    assert not engine.has_work


def test_a_shadow_needs_no_more_than_what_picks_tokens():
    told = {"logprobs": 4, "prompt_logprobs": 0, "return_spec_trace": True}
    params = SamplingParams(max_new_tokens=50, min_new_tokens=9, top_k=3, n=2, **told)
    request = Request("0", [1], params, output_ids=[5, 6, 7], seed=99)
    expected = SamplingParams(max_new_tokens=3, min_new_tokens=3, top_k=3, seed=99, speculative=False)
    assert plain_params(request) == expected
