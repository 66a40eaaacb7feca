"""Steps with trees and without take turns, by the flip of a coin: the tokens stay the same, and so do the drafts."""

import random
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import pytest

from specbackend import Engine
from specbackend.request import Request
from specbackend.sampling_params import SamplingParams
from specbackend.speculative import adaptive_decoder
from specbackend.speculative.adaptive_decoder import AdaptiveDecoder
from specbackend.speculative.drafter import MOST_UNFED
from tests import test_algorithms, test_equivalence
from tests.checkpoints import FAMILIES, write_useless_head
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET, DEMOS
from tests.speculative.reference_heads import ReferenceEagle, ReferenceEagle3, ReferenceMtp, grow_tree
from tests.speculative.test_head_drafter import drafted_trees, official_scale  # noqa: F401, a fixture
from tests.speculative.test_standalone import FEWEST_STEPS, STEPS, steps
from tests.speculative.test_standalone import folder as self_drafting_folder  # noqa: F401, a fixture
from tests.speculative.test_standalone import make_engine as make_self_drafting

TREE = (5, 4, 8)
PLAIN_LENGTHS = [1, 3, MOST_UNFED - 1, MOST_UNFED, MOST_UNFED + 1, 2 * MOST_UNFED + 5]
ALGORITHMS = ["EAGLE", "EAGLE3", "NEXTN", "STANDALONE", "NGRAM"]


class Says:
    """Stands in for the controller: asks a function of the number of steps so far."""

    def __init__(self, drafts: Callable[[int], bool]):
        self._drafts, self.noted = drafts, []

    def drafts(self, batch_size: int) -> bool:
        return self._drafts(len(self.noted))

    def note_plain(self, batch_size: int, seconds: float) -> None:
        self.noted.append(1.0)

    def note_drafted(self, batch_size: int, seconds: float, accept_length: float) -> None:
        self.noted.append(accept_length)


def coin(seed: int, chance: float = 0.5) -> Says:
    rng = random.Random(seed)
    return Says(lambda step: rng.random() < chance)


def plain_for(count: int) -> Says:
    return Says(lambda step: step >= count)


def adaptive(engine: Engine, controller: Says) -> Engine:
    assert isinstance(engine.decoder, AdaptiveDecoder)
    engine.decoder.controller = controller
    return engine


def output_ids(answers: list[dict]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return cache(lambda family: test_algorithms.write_checkpoints(tmp_path_factory.mktemp(family), family)[0])


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tokens_are_those_of_plain_decoding(algorithm, batch, checkpoints):
    """Random checkpoints; cold, then warm, then with another coin."""
    folder = checkpoints("mimo" if algorithm == "NEXTN" else "llama")
    prompts = test_algorithms.PROMPTS
    params = [{"temperature": i % 2, "seed": i, "max_new_tokens": 50} for i in range(len(prompts))]
    expected = output_ids(test_algorithms.make_engine(folder, "plain").generate(None, params, prompts))
    shared = {"speculative_adaptive": True, "max_running_requests": batch, "max_total_tokens": 2000}
    engine = test_algorithms.make_engine(folder, algorithm, **shared)
    for seed in range(3):
        adaptive(engine, coin(seed))
        assert output_ids(engine.generate(None, params, prompts)) == expected
    stats = engine.stats()
    assert stats.free_slots + stats.evictable_slots == stats.total_slots


def demo_engine(algorithm: str, **params) -> Engine:
    paths = {"model_path": str(DEMO_TARGET), "speculative_draft_model_path": str(DEMOS / "llama-gsm8k-eagle")}
    if algorithm == "EAGLE3":
        paths["speculative_draft_model_path"] = str(DEMO_EAGLE3)
    if algorithm == "NEXTN":
        paths = {"model_path": str(DEMOS / "mimo-gsm8k")}
    if algorithm == "NGRAM":
        del paths["speculative_draft_model_path"]
    return Engine(**paths, speculative_algorithm=algorithm, speculative_adaptive=True, **params)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("algorithm", ["EAGLE", "EAGLE3", "NEXTN", "NGRAM"])
def test_tokens_are_those_of_hf_generate(algorithm, batch, demo_prompts, expected):
    """Trained drafts, of which much is accepted."""
    engine = demo_engine(algorithm, max_running_requests=batch)
    controller = coin(batch)
    for _ in ("cold", "warm"):
        answers = adaptive(engine, controller).generate(None, test_equivalence.GREEDY, demo_prompts[:4])
        assert output_ids(answers) == expected[:4]
    assert max(controller.noted) > 1 and controller.noted.count(1.0) > len(controller.noted) / 4


@pytest.mark.usefixtures("official_scale")
@pytest.mark.parametrize("count", PLAIN_LENGTHS)
@pytest.mark.parametrize("algorithm", ["EAGLE", "EAGLE3", "NEXTN"])
def test_heads_draft_after_plain_steps_as_if_they_had_read_along(algorithm, count, checkpoints, monkeypatch):
    family = "mimo" if algorithm == "NEXTN" else "llama"
    folder, (_, model_class) = checkpoints(family), FAMILIES[family]
    target = model_class.from_pretrained(folder / "target").eval()
    head = folder / ("target" if algorithm == "NEXTN" else algorithm)
    reference = {"EAGLE": ReferenceEagle, "EAGLE3": ReferenceEagle3, "NEXTN": ReferenceMtp}[algorithm](head, target)
    engine = test_algorithms.make_engine(folder, algorithm, speculative_adaptive=True, max_total_tokens=2000)
    for prompt in test_algorithms.PROMPTS[2:6]:
        adaptive(engine, plain_for(count))
        trees = drafted_trees(engine, prompt, 2, monkeypatch)
        assert len(trees[0][0]) == len(prompt) + 1 + count
        for context, tokens, parents in trees:
            assert (tokens, parents) == grow_tree(reference, context, *test_algorithms.TREE.values())


@pytest.mark.parametrize("count", PLAIN_LENGTHS)
def test_a_language_model_drafts_after_plain_steps_as_if_it_had_read_along(count, self_drafting_folder):  # noqa: F811
    """The target drafts for itself, so that all of a tree is accepted, unless its KV is wrong."""
    engine = make_self_drafting(self_drafting_folder, speculative_adaptive=True)
    controller = adaptive(engine, Says(lambda step: step < 2 or step >= 2 + count)).decoder.controller
    new_tokens = 1 + count + 5 * (STEPS + 1)
    engine.generate(None, {"temperature": 0, "max_new_tokens": new_tokens}, [[5, 6, 7]])
    assert controller.noted == [STEPS + 1.0] * 2 + [1.0] * count + [STEPS + 1.0] * 3


def test_several_requests_catch_up_together(self_drafting_folder):  # noqa: F811
    """Each is behind by another number of tokens: they begin one after the other, and the trees come later."""
    engine = make_self_drafting(self_drafting_folder, speculative_adaptive=True)
    adaptive(engine, plain_for(12))
    for number in range(4):
        params = SamplingParams(temperature=0, max_new_tokens=60)
        engine.submit(Request(str(number), [number + 1] * (number + 1), params))
        for _ in range(3):
            engine.step()
    lengths = []
    while engine.has_work:
        lengths += [len(update.token_ids) for update in engine.step() if not update.finished]
    drafted = [length for length in lengths if length > 1]
    assert drafted and set(drafted) == {STEPS + 1}


@pytest.mark.parametrize("trees", ["before", "after"])
def test_only_what_the_draft_has_read_is_cached(trees, demo_prompts):
    """Answers whose end, or beginning, was decoded plainly are good prefixes: drafts behind them are as without."""
    engine = demo_engine("EAGLE3", max_total_tokens=1 << 13)
    adaptive(engine, Says(lambda step: (step < 5) == (trees == "before")))
    answers = [engine.generate(None, test_equivalence.GREEDY, prompt) for prompt in demo_prompts[:3]]
    longer = [prompt + a["output_ids"] + [9, 8, 7] for prompt, a in zip(demo_prompts, answers, strict=False)]
    params = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
    adaptive(engine, Says(lambda step: True))
    warm = [engine.generate(None, params, prompt) for prompt in longer]
    fresh = test_equivalence.make_engine(TREE)
    cold = [fresh.generate(None, params, prompt) for prompt in longer]
    assert output_ids(warm) == output_ids(cold)
    assert [a["meta_info"]["spec_verify_ct"] for a in warm] == [a["meta_info"]["spec_verify_ct"] for a in cold]
    for prompt, answer in zip(demo_prompts, warm, strict=False):
        cached = answer["meta_info"]["cached_tokens"]
        assert len(prompt) <= cached + 1 and (trees == "before" or cached > len(prompt) + 8)


def test_a_language_models_answers_are_cached_as_far_as_it_has_read(self_drafting_folder):  # noqa: F811
    engine = make_self_drafting(self_drafting_folder, speculative_adaptive=True)
    adaptive(engine, Says(lambda step: step < 2))
    prompt, params = [5, 6, 7], {"temperature": 0, "max_new_tokens": 30}
    answer = engine.generate(None, params, prompt)["output_ids"]
    adaptive(engine, Says(lambda step: True))
    assert steps(engine, [prompt + answer + [9] * 20]) == [FEWEST_STEPS]
    read = len(prompt) + 2 * (STEPS + 1) - STEPS
    assert engine.stats().cached_tokens == read


def test_retraction_forgets_what_the_draft_has_not_read(checkpoints):
    folder = checkpoints("llama")
    params = {"temperature": 0, "max_new_tokens": 40}
    expected = output_ids(test_algorithms.make_engine(folder, "plain").generate(None, params, test_algorithms.PROMPTS))
    for algorithm in ("EAGLE3", "STANDALONE"):
        shared = {"speculative_adaptive": True, "context_length": 112, "max_total_tokens": 130}
        engine = adaptive(test_algorithms.make_engine(folder, algorithm, **shared), coin(1, chance=0.2))
        assert output_ids(engine.generate(None, params, test_algorithms.PROMPTS)) == expected


def test_trees_that_were_asked_for_are_drafted(demo_prompts):
    """Whatever the controller says of the server's own, and it learns nothing from them."""
    engine = adaptive(demo_engine("EAGLE3"), Says(lambda step: False))
    own = {**test_equivalence.GREEDY, "speculative_num_steps": 4}
    assert engine.generate(None, own, demo_prompts[0])["meta_info"]["accept_length"] > 2
    assert not engine.decoder.controller.noted


def test_updates_tell_what_was_drafted(demo_prompts):
    engine = adaptive(demo_engine("EAGLE3"), Says(lambda step: step % 3 == 0))
    engine.submit(Request("0", demo_prompts[0], SamplingParams(temperature=0, max_new_tokens=40)))
    while engine.has_work:
        [last] = engine.step()
    count = len(engine.decoder.controller.noted)
    assert last.spec_verify_ct == count
    assert last.draft_tokens == 7 * len(range(0, count, 3))


@pytest.fixture
def fake_clock(monkeypatch) -> SimpleNamespace:
    """Time passes only when `now` is set."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(adaptive_decoder, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def with_costs(engine: Engine, clock: SimpleNamespace, plain: float, drafted: float) -> list[str]:
    """Let the engine's decode steps take so long by the clock. Returns what kinds of steps there are, as they come."""
    kinds = []
    for name, cost in (("_plain", plain), ("_drafted", drafted)):
        decoder = getattr(engine.decoder, name)

        def begin(batch, inner=decoder.begin, name=name, cost=cost):
            clock.now += cost
            kinds.append(name)
            return inner(batch)

        setattr(
            engine.decoder, name, SimpleNamespace(begin=begin, begin_next=decoder.begin_next, extend=decoder.extend)
        )
    return kinds


@pytest.mark.parametrize("ratio", [1.2, 2.5])
def test_useless_head_costs_no_more_than_it_may(ratio, fake_clock, tmp_path, demo_prompts, expected):
    write_useless_head(tmp_path / "head", DEMO_EAGLE3)
    draft = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(tmp_path / "head")}
    engine = Engine(model_path=str(DEMO_TARGET), max_running_requests=1, **draft)
    kinds = with_costs(engine, fake_clock, 1.0, ratio)
    assert output_ids(engine.generate(None, test_equivalence.GREEDY, demo_prompts[:4])) == expected[:4]
    tokens = sum(len(answer) - 1 for answer in expected[:4])
    assert tokens == len(kinds), "something was accepted"
    assert kinds.count("_drafted") >= 1 and fake_clock.now < 1.05 * tokens


def test_good_head_drafts_nearly_always(fake_clock, demo_prompts, expected):
    engine = demo_engine("EAGLE3", max_running_requests=1)
    kinds = with_costs(engine, fake_clock, 1.0, 1.5)
    assert output_ids(engine.generate(None, test_equivalence.GREEDY, demo_prompts[:6])) == expected[:6]
    assert kinds.count("_plain") <= 1 + len(kinds) / 64
