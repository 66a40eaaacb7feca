"""The controller at fake times: what it costs when drafts are useless, what it loses when they are good, how it adapts.

Times are in plain steps of one request, which takes 1; a step with a tree takes `ratio`.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specbackend.speculative.controller import INTEREST, MOST_CREDIT, MOST_LOSS, START_CREDIT, Controller, StepTime

RATIOS = [1.15, 1.5, 2.5]
SECONDS = 0.003  # of a plain step
SEEDS = range(60)


@dataclass
class Run:
    """What a controller decided, and how long it took."""

    tokens: float = 0.0  # per request
    time: float = 0.0
    drafted: int = 0
    plain: int = 0

    @property
    def slowdown(self) -> float:
        """Against plain decoding."""
        return self.time / self.tokens


def useless() -> float:
    return 1.0


def good(rng: random.Random, chance: float = 0.85, depth: int = 5) -> Callable[[], float]:
    """Each further token of a path is right by this chance."""

    def accept_length() -> float:
        length = 1
        while length <= depth and rng.random() < chance:
            length += 1
        return length

    return accept_length


def run(
    controller: Controller,
    accept_length: Callable[[], float],
    ratio: float,
    num_tokens: int,
    batch: int = 1,
    hold: Callable[[], float] = lambda: 1.0,
) -> Run:
    """hold: how many times as long as it should the next step takes, for which nobody is to blame."""
    found = Run()
    while found.tokens < num_tokens:
        seconds = SECONDS * hold()
        if controller.drafts(batch):
            length = accept_length()
            controller.note_drafted(batch, ratio * seconds, length)
            found.tokens, found.time, found.drafted = found.tokens + length, found.time + ratio, found.drafted + 1
        else:
            controller.note_plain(batch, seconds)
            found.tokens, found.time, found.plain = found.tokens + 1, found.time + 1, found.plain + 1
    return found


@pytest.mark.parametrize("num_tokens", [128, 512, 5000])
@pytest.mark.parametrize("ratio", [*RATIOS, 3.0])
def test_useless_drafts_cost_less_than_five_percent(ratio, num_tokens):
    found = run(Controller(), useless, ratio, num_tokens)
    assert found.drafted >= 1
    assert found.time - found.tokens <= START_CREDIT + INTEREST * found.plain + 1e-9
    assert found.slowdown < 1.05


@pytest.mark.parametrize("ratio", [4.0, 9.0])
def test_useless_trees_that_cost_more_than_a_step_may_lose_are_as_rare(ratio):
    found = run(Controller(), useless, ratio, 2000)
    assert found.drafted <= (START_CREDIT + INTEREST * found.plain) / MOST_LOSS + 1e-9


@pytest.mark.parametrize("num_tokens, most", [(128, 1.025), (512, 1.015)])
@pytest.mark.parametrize("ratio", RATIOS)
def test_good_drafts_lose_little(ratio, num_tokens, most):
    """Over 300 engines, against some that always draft. One plain step is 2% of the shortest run."""
    adaptive, always = (
        mean(run(make(), good(random.Random(seed)), ratio, num_tokens).slowdown for seed in range(300))
        for make in (Controller, AlwaysDrafting)
    )
    assert adaptive < most * always


class AlwaysDrafting(Controller):
    def drafts(self, batch_size: int) -> bool:
        return True


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_draft_that_becomes_useless_is_noticed_and_one_that_recovers_too(ratio):
    controller = Controller()
    run(controller, lambda: 4.0, ratio, 400)
    lost = run(controller, useless, ratio, 300)
    assert lost.time - lost.tokens <= MOST_CREDIT + INTEREST * lost.plain + 1e-9
    assert lost.drafted <= MOST_CREDIT / (ratio - 1) + INTEREST * lost.plain / (ratio - 1) + 1
    again = run(controller, lambda: 4.0, ratio, 2000)
    assert again.plain <= (ratio - 1) / INTEREST + again.drafted / 60 + 1  # saving up for a try, then looking in


@pytest.mark.parametrize("ratio", RATIOS)
def test_tries_are_rare_and_evenly_spread(ratio):
    controller = Controller()
    run(controller, useless, ratio, 300)
    waits = []
    for _ in range(21):
        wait = 0
        while not controller.drafts(1):
            controller.note_plain(1, SECONDS)
            wait += 1
        controller.note_drafted(1, ratio * SECONDS, 1.0)
        waits.append(wait)
    expected = (ratio - 1) / INTEREST
    assert all(expected - 1 <= wait <= expected + 1 for wait in waits[1:])


def test_one_bad_step_does_not_switch_a_good_draft_off():
    """Nor do three in a row, once it has gained; plain steps come only to be measured."""
    controller = Controller()
    run(controller, lambda: 4.0, 2.4, 100)
    lengths = cycle([4.0, 4.0, 4.0, 1.0, 1.0, 1.0])
    found = run(controller, lambda: next(lengths), 2.4, 600)
    assert found.plain <= 1 + found.drafted / 64


def test_what_pays_for_one_request_need_not_pay_for_many():
    """At 32 requests a tree costs 5 plain steps: each time they come, the engine knows already."""
    controller = Controller()
    run(controller, lambda: 4.0, 1.3, 400, batch=1)
    run(controller, lambda: 4.0, 5.0, 400, batch=32)
    for _ in range(5):
        assert run(controller, lambda: 4.0, 5.0, 20, batch=32).drafted <= 1
        alone = run(controller, lambda: 4.0, 1.3, 100, batch=1)
        assert alone.plain <= 1


def test_a_new_size_of_batch_does_not_start_from_nothing():
    """A draft that was useless gets one step to tell what it costs there, not all of the credit again."""
    controller = Controller()
    run(controller, useless, 1.5, 300)
    for batch in (2, 4, 8, 16, 32):
        assert run(controller, useless, 1.5, 10, batch=batch).drafted <= 1


def test_sizes_alike_share_what_is_known():
    controller = Controller()
    run(controller, lambda: 4.0, 1.5, 100, batch=8)
    assert run(controller, lambda: 4.0, 1.5, 20, batch=5).plain == 0
    assert run(controller, lambda: 4.0, 1.5, 20, batch=4).plain == 1


def test_a_step_that_was_held_up_is_soon_forgotten():
    """The first plain step takes ten times as long, which makes useless trees look cheap."""
    controller = Controller()
    controller.note_plain(1, 10 * SECONDS)
    found = run(controller, useless, 2.5, 512)
    assert found.slowdown < 1.05


def test_a_first_tree_that_was_held_up_does_not_cost_all_the_credit():
    controller = Controller()
    controller.note_plain(1, SECONDS)
    controller.note_drafted(1, 25 * SECONDS, 1.0)
    assert run(controller, lambda: 4.0, 2.5, 200).plain <= 2


def test_a_steps_time_falls_at_once_and_rises_by_and_by():
    time = StepTime()
    time.note(2.0)
    time.note(1.0)
    time.age = 1
    time.note(9.0)
    assert 1.0 < time.seconds < 1.01 and time.age == 0
    time.age = 100
    time.note(9.0)
    assert 1.5 < time.seconds < 2.0


def test_times_that_grow_with_the_text_are_followed():
    """All steps become ten times as slow, bit by bit: what is known of plain ones must not stay behind."""
    controller = Controller()
    for index in range(100):
        found = run(controller, lambda: 4.0, 2.5, 50, hold=lambda grown=1 + index / 10: grown)
        assert found.plain <= 2


@given(
    ratios=st.lists(st.sampled_from([1.1, 1.5, 3.0]), min_size=6, max_size=6),
    lengths=st.lists(st.tuples(st.integers(1, 32), st.lists(st.integers(1, 6), min_size=1, max_size=30)), max_size=12),
)
@settings(deadline=None)
def test_whatever_comes_the_credit_is_all_that_can_be_lost(ratios, lengths):
    """Any batches, any luck: against plain decoding, an account loses no more than its credit and interest."""
    controller, balance, plain = Controller(), dict.fromkeys(range(6), 0.0), dict.fromkeys(range(6), 0)
    for batch, accepted in lengths:
        size = (batch - 1).bit_length()
        for length in accepted:
            if controller.drafts(batch):
                controller.note_drafted(batch, ratios[size] * SECONDS, length)
                balance[size] = min(balance[size] + length - ratios[size], MOST_CREDIT - START_CREDIT)
            else:
                controller.note_plain(batch, SECONDS)
                plain[size] += 1
            assert -balance[size] <= START_CREDIT + INTEREST * plain[size] + 1e-9


@pytest.mark.parametrize("ratio", RATIOS)
def test_steps_that_are_held_up_for_a_while_mislead_it_little(ratio):
    """Others on the machine: for some steps on end everything takes twice or four times as long."""

    def slowdowns(draft) -> float:
        return mean(
            run(Controller(), draft(random.Random(seed)), ratio, 512, hold=held_up(seed)).slowdown for seed in SEEDS
        )

    always = mean(run(AlwaysDrafting(), good(random.Random(seed)), ratio, 512).slowdown for seed in SEEDS)
    assert slowdowns(lambda rng: useless) < 1.03
    assert slowdowns(good) < 1.05 * always


def held_up(seed: int) -> Callable[[], float]:
    rng = random.Random(1000 + seed)

    def factors() -> Iterator[float]:
        while True:
            factor = rng.choice([1, 1, 1, 2, 4])
            for _ in range(rng.randint(5, 40)):
                yield factor * (1 + rng.expovariate(10))

    return factors().__next__
