"""The scheduler under random traffic: whoever is evicted, retracted or cancelled, every answer is what it must be.

`FakeDecoder` stands in for the networks. Its next token is a function of (seed, position), so the right answer is
known; and it remembers what the KV of each slot was computed from, so that it notices a request that is given wrong
slots.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specbackend.batch import Accepted, DecodeBatch, ExtendBatch
from specbackend.cache.kv_pool import RequestTable
from specbackend.cache.slots import DUMMY_SLOT, SlotManager
from specbackend.config import EngineConfig
from specbackend.errors import QueueFull
from specbackend.request import Failure, FinishReason, Request, RequestStatus, Update
from specbackend.sampling_params import SamplingParams
from specbackend.scheduler import Scheduler
from specbackend.speculative.drafter import CacheRule
from specbackend.speculative.tree_shapes import tree_of
from tests.cache.test_slots import tree_slots

VOCABULARY = 12
EOS = 0


def next_token(seed: int, position: int) -> int:
    return random.Random(1000 * seed + position).randrange(VOCABULARY)


def prefix_hashes(request: Request, tokens: Sequence[int]) -> list[int]:
    return salted_hashes(tokens, request.params.cache_salt)


def salted_hashes(tokens: Sequence[int], salt: str | None) -> list[int]:
    """One number for each prefix, as KV depends on all tokens up to its own; and on the salt, so that sharing shows."""
    return list(accumulate(tokens, lambda known, token: hash((known, token)), initial=hash(salt)))[1:]


class FakeDecoder:
    """Offers what Engine needs of both its decoders.

    Draft KV is either complete and depends on the next token too (a head), or lacks the last accepted tokens until the
    next step begins (a language model as draft), see CacheRule.
    """

    def __init__(self, table: RequestTable, num_nodes: int, rule: CacheRule, rng: random.Random):
        self.table, self.num_nodes, self.rule, self.rng = table, num_nodes, rule, rng
        self.target_kv: dict[int, int] = {}  # slot -> hash of the tokens up to it
        self.draft_kv: dict[int, int] = {}  # slot -> hash of the tokens up to it, or up to the one after it
        self.shift = int(rule.successor_keys)
        self.num_extended = 0  # prompt tokens computed

    def extend(self, batch: ExtendBatch) -> Accepted:
        rows = []
        for index, (request, length) in enumerate(zip(batch.requests, batch.chunk_lens, strict=True)):
            assert length > 0 and request.num_unfed == 0
            start, end = request.num_computed, request.num_computed + length
            num_drafted = self.count_drafted(request)
            self.check_prefix(request, num_drafted=start if self.rule.has_draft_kv and request.tree else 0)
            new = [next_token(request.seed, end)] if batch.is_final(index) else []
            slots = self.table.read(request.row, end)[start:]
            self.write(request, slots, request.all_ids + new, draft=num_drafted == start)
            self.num_extended += length
            rows.append(new)
        return accepted(rows)

    def decode(self, batch: DecodeBatch) -> Accepted:
        """Accept a random part of the window, whose slots the real verification leaves in an order of its own."""
        return accepted([self._decode_one(request) for request in batch.requests])

    def _decode_one(self, request: Request) -> list[int]:
        start = request.num_computed
        self.check_prefix(request, self.num_drafted(request))
        self.catch_up(request)
        window = self.table.read(request.row, start + self.num_nodes)[start:]
        assert len(window) == len(set(window)) == self.num_nodes and DUMMY_SLOT not in window
        self.rng.shuffle(window)
        self.table.slots[request.row, start : start + self.num_nodes] = torch.tensor(window)
        for slot in window:  # the rejected nodes' KV
            self.target_kv[slot] = self.draft_kv[slot] = -1
        count = self.rng.randint(1, self.num_nodes)
        new = [next_token(request.seed, start + 1 + offset) for offset in range(count)]
        self.write(request, window[:count], request.all_ids + new, draft=not self.rule.unfed_tokens)
        if self.rule.unfed_tokens:  # the root has been read
            self.draft_kv[window[0]] = prefix_hashes(request, request.all_ids)[start]
        return new

    def num_drafted(self, request: Request) -> int:
        unfed = self.rule.unfed_tokens + request.num_unfed
        return request.num_computed - unfed if self.rule.has_draft_kv else 0

    def catch_up(self, request: Request) -> None:
        slots, hashes = self.table.read(request.row, request.num_computed), prefix_hashes(request, request.all_ids)
        for position in range(max(0, self.num_drafted(request)), len(slots)):
            self.draft_kv[slots[position]] = hashes[position + self.shift]
        request.num_unfed = 0

    def decode_without_trees(self, batch: DecodeBatch) -> Accepted:
        """Of requests that have trees at other times: their draft has to catch up then."""
        result = self.decode_plain(batch)
        for request in batch.requests:
            request.num_unfed += 1
        return result

    def decode_plain(self, batch: DecodeBatch) -> Accepted:
        rows = []
        for request in batch.requests:
            self.check_prefix(request, self.num_drafted(request) if request.tree else 0)
            new = [next_token(request.seed, request.num_computed + 1)]
            slots = self.table.read(request.row, request.num_computed + 1)[-1:]
            self.write(request, slots, request.all_ids + new, draft=False)
            rows.append(new)
        return accepted(rows)

    def count_drafted(self, request: Request) -> int:
        """The first so many computed tokens have right draft KV: what it is computed from must be right, too."""
        slots, hashes = self.table.read(request.row, request.num_computed), prefix_hashes(request, request.all_ids)
        pairs = zip(slots, hashes[self.shift :], strict=False)
        return [*(self.draft_kv[slot] == known for slot, known in pairs), False].index(False)

    def check_prefix(self, request: Request, num_drafted: int) -> None:
        slots = self.table.read(request.row, request.num_computed)
        hashes = prefix_hashes(request, request.all_ids)
        assert [self.target_kv[slot] for slot in slots] == hashes[: len(slots)]
        drafted = slots[: max(0, num_drafted)]
        assert [self.draft_kv[slot] for slot in drafted] == hashes[self.shift : len(drafted) + self.shift]

    def write(self, request: Request, slots: list[int], tokens: list[int], draft: bool) -> None:
        assert DUMMY_SLOT not in slots
        hashes = prefix_hashes(request, tokens)
        for position, slot in enumerate(slots, start=request.num_computed):
            self.target_kv[slot] = hashes[position]
            known = draft and position + self.shift < len(tokens)
            self.draft_kv[slot] = hashes[position + self.shift] if known else -1


def accepted(rows: list[list[int]]) -> Accepted:
    width = max(1, *map(len, rows))
    tokens = [row + [-1] * (width - len(row)) for row in rows]
    return Accepted(torch.tensor(tokens), torch.tensor([len(row) for row in rows]))


@dataclass(frozen=True)
class Setup:
    num_nodes: int = 1
    speculative: bool = False
    drafts_late: bool = False  # see FakeDecoder
    plain_steps: float = 0.0  # part of the steps of drafting requests that have no trees
    context: int = 24
    spare_slots: int = 0  # beyond what one request of full length needs
    rows: int = 4
    chunk: int = -1
    max_prefill: int = 64
    policy: str = "fcfs"
    radix: bool = True
    priorities: bool = False
    low_first: bool = False
    eviction: str = "lru"
    has_lower_tier: bool = False

    @property
    def rule(self) -> CacheRule:
        if self.drafts_late:
            return CacheRule(has_draft_kv=True, unfed_tokens=self.num_nodes - 1)
        return CacheRule(successor_keys=self.speculative, has_draft_kv=self.speculative)


class Simulation:
    """Drives a Scheduler as Engine does and checks it after every step."""

    def __init__(self, setup: Setup, rng: random.Random):
        self.setup, self.rng = setup, rng
        self.config = config = EngineConfig(
            model_path="none",
            chunked_prefill_size=setup.chunk,
            max_prefill_tokens=setup.max_prefill,
            schedule_policy=setup.policy,
            enable_priority_scheduling=setup.priorities,
            schedule_low_priority_values_first=setup.low_first,
            speculative_algorithm="NGRAM" if setup.speculative else None,
        )
        self.table = RequestTable(setup.rows, setup.context + setup.num_nodes, "cpu")
        num_slots = setup.context + setup.num_nodes + setup.spare_slots
        self.slots = SlotManager(num_slots, setup.rule.successor_keys, setup.radix, setup.eviction)
        self.decoder = FakeDecoder(self.table, setup.num_nodes, setup.rule, rng)
        bring = self._bring if setup.has_lower_tier else None
        self.scheduler = Scheduler(
            config, self.slots, self.table, setup.num_nodes, setup.context, frozenset({EOS}), setup.rule, bring
        )
        self.updates: dict[str, list[Update]] = {}
        self.steps = 0

    def add(self, request: Request) -> None:
        request.tree = tree_of(request.params, self.config)
        self.updates[request.request_id] = []
        self.scheduler.add(request)

    def step(self) -> list[Update]:
        self.steps += 1
        batch = self.scheduler.schedule()
        if batch is None:
            return []
        if isinstance(batch, ExtendBatch):
            result = self.decoder.extend(batch)
        elif self.setup.speculative and batch.requests[0].tree is None:
            assert not any(request.tree for request in batch.requests)
            result = self.decoder.decode_plain(batch)
        elif self.rng.random() < self.setup.plain_steps:
            result = self.decoder.decode_without_trees(batch)
        else:
            result = self.decoder.decode(batch)
        updates = self.scheduler.commit(batch, result)
        for update in updates:
            self.updates[update.request_id].append(update)
        self.check_ownership()
        return updates

    def _bring(self, tokens: Sequence[int], salt: str | None) -> None:
        """As a lower tier that knows some of every text."""
        hashes, decoder = salted_hashes(tokens, salt), self.decoder

        def fill(start: int, slots: list[int]) -> None:
            for position, slot in enumerate(slots, start):
                decoder.target_kv[slot], decoder.draft_kv[slot] = hashes[position], hashes[position + decoder.shift]

        self.slots.adopt(tokens, self.rng.randint(0, len(tokens)), fill, salt)

    def run(self, requests: list[Request], cancel_rate: float = 0.0) -> set[str]:
        """Let the requests arrive at random moments and run until all is done; returns the ids that were cancelled."""
        arriving, cancelled = list(requests), set()
        while arriving or self.scheduler.has_work:
            while arriving and self.rng.random() < 0.5:
                self.add(arriving.pop())
            if self.rng.random() < cancel_rate:
                cancelled.add(self.cancel(self.rng.choice(requests)))
            self.step()
            assert self.steps < 50 + 6 * work(requests), "somebody starves"
        return cancelled

    def cancel(self, request: Request) -> str:
        if request.request_id not in self.updates or request.status == RequestStatus.FINISHED:
            return ""
        self.scheduler.cancel(request.request_id)
        self.check_ownership()
        assert request.finish_reason == FinishReason.ABORT
        return request.request_id

    def check_ownership(self) -> None:
        """Every slot is free, the tree's or one request's own, and what a request takes from the tree is pinned."""
        scheduler, own, in_tree = self.scheduler, [], set(tree_slots(self.slots))
        active = scheduler.prefilling + scheduler.running
        assert set(scheduler._pinned) == set(scheduler._num_owned) == set(active)
        pinned_slots = set()
        for request in active:
            held = self.table.read(request.row, scheduler._num_owned[request])
            pinned = scheduler._pinned[request].slots
            assert held[: len(pinned)] == pinned
            assert len(held) >= request.num_computed
            own += held[len(pinned) :]
            pinned_slots |= set(pinned)
        assert pinned_slots <= in_tree and len(pinned_slots) == self.slots.tree.num_locked
        assert sorted(own + list(in_tree) + self.slots._free) == list(range(1, self.slots.num_slots + 1))
        rows = [request.row for request in active]
        assert sorted(rows + self.table._free_rows) == list(range(self.setup.rows))

    def check_idle(self) -> None:
        assert self.slots.num_free + self.slots.tree.num_evictable == self.slots.num_slots
        assert self.table.num_free_rows == self.setup.rows
        assert not self.scheduler._pinned and not self.scheduler._num_owned

    def check_answer(self, request: Request) -> None:
        """All tokens, once each, in order; one last update that says why it ended."""
        tokens, reason = right_answer(request, self.setup.context)
        updates = self.updates[request.request_id]
        assert emitted(updates) == tokens == request.output_ids
        assert [update.finish_reason for update in updates] == [None] * (len(updates) - 1) + [reason]
        last = updates[-1]
        assert (last.prompt_tokens, last.completion_tokens) == (len(request.input_ids), len(tokens))
        assert last.cached_tokens < last.prompt_tokens
        assert last.spec_verify_ct == sum(last.accept_counts)
        of_prefills = len(tokens) - sum(count * (1 + drafted) for drafted, count in enumerate(last.accept_counts))
        assert 1 <= of_prefills <= 1 + self.scheduler.num_retracted

    def check_cancelled_answer(self, request: Request) -> None:
        tokens, _ = right_answer(request, self.setup.context)
        updates = self.updates[request.request_id]
        assert emitted(updates) == tokens[: len(emitted(updates))]
        assert not any(update.finished for update in updates)


def emitted(updates: list[Update]) -> list[int]:
    return [token for update in updates for token in update.token_ids]


def right_answer(request: Request, context: int) -> tuple[list[int], FinishReason]:
    tokens: list[int] = []
    while True:
        token = next_token(request.seed, len(request.input_ids) + len(tokens))
        tokens.append(token)
        if token in request.params.stop_token_ids or (token == EOS and not request.params.ignore_eos):
            return tokens, FinishReason.STOP
        if len(tokens) == request.params.max_new_tokens or len(request.input_ids) + len(tokens) == context:
            return tokens, FinishReason.LENGTH


def work(requests: list[Request]) -> int:
    return sum(len(request.input_ids) + request.params.max_new_tokens for request in requests)


def random_request(index: int, setup: Setup, rng: random.Random) -> Request:
    """Prompts that often share a prefix, seeds that often agree, so that answers become prefixes too."""
    length = rng.randint(1, setup.context - 1)
    seed = rng.randrange(3)
    prompt = [next_token(seed, position) for position in range(length)]
    if rng.random() < 0.4:
        prompt[rng.randrange(length)] = rng.randrange(VOCABULARY)
    params = SamplingParams(
        max_new_tokens=rng.randint(1, 20),
        ignore_eos=rng.random() < 0.5,
        stop_token_ids=(rng.randrange(VOCABULARY),) if rng.random() < 0.3 else (),
        speculative=rng.random() < 0.6,
        priority=rng.choice([-20, 0, 1, 20]) if setup.priorities else 0,
        cache_salt="salt" if rng.random() < 0.2 else None,
    )
    return Request(f"r{index}", prompt, params, seed=seed)


SETUPS = st.builds(
    lambda num_nodes, late, low_first, **rest: Setup(
        num_nodes=num_nodes,
        speculative=num_nodes > 1,
        drafts_late=late and num_nodes > 1,
        low_first=low_first and rest["priorities"],
        **rest,
    ),
    num_nodes=st.sampled_from([1, 2, 4, 8]),
    late=st.booleans(),
    plain_steps=st.sampled_from([0.0, 0.5, 0.9]),
    spare_slots=st.sampled_from([0, 3, 17, 60]),
    rows=st.sampled_from([1, 3, 8]),
    chunk=st.sampled_from([-1, 1, 3, 7]),
    max_prefill=st.sampled_from([1, 10, 64]),
    policy=st.sampled_from(["fcfs", "lpm"]),
    radix=st.booleans(),
    priorities=st.booleans(),
    low_first=st.booleans(),
    eviction=st.sampled_from(["lru", "lfu", "priority"]),
    has_lower_tier=st.booleans(),
)


@given(setup=SETUPS, seed=st.integers(0, 2**32), cancel_rate=st.sampled_from([0.0, 0.1]))
@settings(max_examples=120, deadline=None)
def test_random_traffic(setup, seed, cancel_rate):
    rng = random.Random(seed)
    simulation = Simulation(setup, rng)
    requests = [random_request(index, setup, rng) for index in range(rng.randint(1, 14))]
    cancelled = simulation.run(requests, cancel_rate)
    for request in requests:
        if request.request_id in cancelled:
            simulation.check_cancelled_answer(request)
        else:
            simulation.check_answer(request)
    simulation.check_idle()


def endless(request_id: str, prompt: list[int], max_new_tokens: int = 1000, **params) -> Request:
    params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True, **params)
    return Request(request_id, prompt, params)


def run_until(simulation: Simulation, condition: Callable[[], bool]) -> None:
    while not condition():
        simulation.step()
        assert simulation.steps < 1000


def test_one_request_may_fill_the_whole_pool():
    for speculative in (False, True):
        simulation = Simulation(Setup(num_nodes=8 if speculative else 1, speculative=speculative), random.Random(0))
        request = endless("a", [1])
        simulation.run([request])
        assert request.num_tokens == 24
        simulation.check_answer(request)


def test_the_youngest_steps_back_first_in_line_and_loses_nothing(monkeypatch):
    """Four requests, two at a time, in a pool that holds one and a half of them at full length."""
    simulation = Simulation(Setup(spare_slots=12, rows=2), random.Random(0))
    scheduler, retract, retracted = simulation.scheduler, simulation.scheduler._retract, []

    def checked_retract(request: Request) -> None:
        assert request is max(scheduler.prefilling + scheduler.running, key=lambda each: each.arrival)
        retract(request)
        assert request is scheduler.waiting[0]
        retracted.append(request)

    monkeypatch.setattr(scheduler, "_retract", checked_retract)
    requests = [endless(f"r{index}", [index, 1, 2]) for index in range(4)]
    simulation.run(requests)
    assert retracted
    for request in requests:
        simulation.check_answer(request)


@pytest.mark.parametrize("speculative", [True, False], ids=["old-drafts", "old-plain"])
def test_requests_of_the_other_kind_may_hold_all_slots(speculative):
    """The only drafting request finds the pool full of plain ones' slots, or the other way round."""
    simulation = Simulation(Setup(num_nodes=4, speculative=True, spare_slots=4), random.Random(0))
    requests = [endless("a", [1], speculative=speculative), endless("b", [2], speculative=not speculative)]
    simulation.run(requests)
    for request in requests:
        simulation.check_answer(request)


def test_prefilling_requests_may_hold_all_slots():
    """One runs, the other takes long to prefill and holds the rest of the pool meanwhile."""
    simulation = Simulation(Setup(chunk=1, spare_slots=2), random.Random(0))
    first, second = endless("a", [1]), endless("b", list(range(1, 22)))
    simulation.add(first)
    run_until(simulation, lambda: first.status == RequestStatus.RUNNING)
    simulation.run([second])
    simulation.check_answer(first)
    simulation.check_answer(second)


@pytest.mark.parametrize("length, admitted", [(12, True), (13, False)])
def test_admits_only_what_leaves_the_running_requests_a_step(length, admitted):
    """Of 25 slots the first holds 11. The second needs one for each token, one to decode and one left for the first."""
    simulation = Simulation(Setup(spare_slots=0), random.Random(0))
    first, second = endless("a", [1] * 10), endless("b", [2] * length)
    simulation.add(first)
    run_until(simulation, lambda: first.status == RequestStatus.RUNNING)
    simulation.add(second)
    simulation.scheduler.schedule()
    assert (second.status == RequestStatus.PREFILLING) == admitted


def test_prompt_chunks_and_decode_steps_take_turns():
    simulation = Simulation(Setup(chunk=1, spare_slots=60), random.Random(0))
    first, second = endless("a", [1]), endless("b", [2] * 10)
    simulation.add(first)
    run_until(simulation, lambda: first.status == RequestStatus.RUNNING)
    simulation.add(second)
    before = len(first.output_ids)
    run_until(simulation, lambda: second.status == RequestStatus.RUNNING)
    assert len(first.output_ids) - before == 10  # one before each of the ten chunks


def test_plain_and_drafting_requests_take_turns():
    simulation = Simulation(Setup(num_nodes=2, speculative=True, spare_slots=200, context=200), random.Random(0))
    plain, drafting = endless("a", [1], speculative=False), endless("b", [2])
    simulation.add(plain)
    simulation.add(drafting)
    run_until(simulation, lambda: plain.spec_verify_ct == 20)
    assert abs(drafting.spec_verify_ct - 20) <= 1


@pytest.mark.parametrize("max_prefill", [8, 12])
def test_extend_batch_keeps_to_max_prefill_tokens_as_padded(max_prefill):
    simulation = Simulation(Setup(chunk=4, max_prefill=max_prefill, spare_slots=200), random.Random(0))
    for index, length in enumerate([2, 9, 3, 1]):
        simulation.add(endless(f"r{index}", [index] * length))
    batch = simulation.scheduler.schedule()
    assert batch.chunk_lens == [2, 4, 3][: max_prefill // 4]


def test_longest_cached_prefix_first():
    simulation = Simulation(Setup(policy="lpm", rows=1), random.Random(0))
    simulation.run([endless("warm", [1, 2, 3, 4], max_new_tokens=1)])
    known, other = endless("known", [1, 2, 3, 4, 5]), endless("other", [7, 7, 7])
    simulation.add(other)
    simulation.add(known)
    simulation.step()
    assert known.num_cached == 4
    assert other.status == RequestStatus.WAITING


@pytest.mark.parametrize("count", [2, 8])
def test_equal_prompts_that_come_together_are_computed_once(count):
    simulation = Simulation(Setup(spare_slots=400, rows=count), random.Random(0))
    requests = [endless(f"r{index}", list(range(10)), max_new_tokens=3) for index in range(count)]
    for request in requests:
        simulation.add(request)
    simulation.run([])
    assert simulation.decoder.num_extended == 10 + (count - 1)
    assert [simulation.updates[request.request_id][0].cached_tokens for request in requests] == [0] + [9] * (count - 1)
    for request in requests:
        simulation.check_answer(request)


@pytest.mark.parametrize("num_shared, is_worth_it", [(5, True), (4, False)])
def test_a_request_waits_for_a_prefix_that_saves_it_half(num_shared, is_worth_it):
    simulation = Simulation(Setup(spare_slots=400), random.Random(0))
    simulation.add(endless("first", [1] * 20))
    simulation.add(endless("second", [1] * num_shared + [2] * (10 - num_shared)))
    simulation.add(endless("third", [3] * 10))
    batch = simulation.scheduler.schedule()
    assert [request.request_id for request in batch.requests] == ["first", *["second"] * (not is_worth_it), "third"]


@pytest.mark.parametrize("change", [{"cache_salt": "other"}, {"prompt_logprobs": 0}], ids=str)
def test_who_cannot_use_a_prefix_does_not_wait_for_it(change):
    simulation = Simulation(Setup(spare_slots=400), random.Random(0))
    simulation.add(endless("first", [1] * 10))
    simulation.add(endless("second", [1] * 10, **change))
    assert len(simulation.scheduler.schedule().requests) == 2


def test_who_waited_for_a_prefix_that_is_dropped_computes_it():
    simulation = Simulation(Setup(spare_slots=400, chunk=2), random.Random(0))
    first, second = endless("first", [1] * 10), endless("second", [1] * 10)
    simulation.add(first)
    simulation.add(second)
    for _ in range(2):
        simulation.step()
    assert second.status == RequestStatus.WAITING
    simulation.cancel(first)
    simulation.step()
    assert second.num_cached == 4, "what the first had done is not lost"
    simulation.run([])
    simulation.check_answer(second)


PRIORITIES = Setup(rows=1, spare_slots=100, priorities=True)


@pytest.mark.parametrize("low_first", [False, True])
def test_the_most_urgent_first_and_of_equals_the_oldest(low_first):
    simulation = Simulation(replace(PRIORITIES, low_first=low_first), random.Random(0))
    sign = -1 if low_first else 1
    for index, urgency in enumerate([0, 3, 1, 3]):
        simulation.add(endless(f"r{index}", [index], max_new_tokens=2, priority=sign * urgency))
    order = []
    while simulation.scheduler.has_work:
        order += [update.request_id for update in simulation.step() if update.finished]
    assert order == ["r1", "r3", "r2", "r0"]


@pytest.mark.parametrize("priority, takes_it", [(11, True), (10, False)])
def test_the_much_more_urgent_takes_a_place_that_is_given_once(priority, takes_it):
    simulation = Simulation(PRIORITIES, random.Random(0))
    first, urgent = endless("first", [1]), endless("urgent", [2], priority=priority, max_new_tokens=3)
    simulation.add(first)
    run_until(simulation, lambda: len(first.output_ids) == 4)
    simulation.add(urgent)
    simulation.step()
    assert (urgent.status == RequestStatus.RUNNING) == takes_it
    run_until(simulation, lambda: urgent.finish_reason or not takes_it)
    run_until(simulation, lambda: first.status == RequestStatus.RUNNING)
    again = endless("again", [3], priority=priority)
    simulation.add(again)
    simulation.step()
    assert again.status == RequestStatus.WAITING
    simulation.run([])
    for request in (first, urgent, again):
        simulation.check_answer(request)


def test_the_youngest_of_the_least_urgent_steps_back(monkeypatch):
    """Wherever it is: decoding plainly or with drafts, or half prefilled."""
    setup = Setup(num_nodes=4, speculative=True, spare_slots=40, priorities=True, chunk=1, rows=6)
    simulation = Simulation(setup, random.Random(0))
    scheduler, retract, retracted = simulation.scheduler, simulation.scheduler._retract, []

    def checked_retract(request: Request) -> None:
        active = scheduler.prefilling + scheduler.running
        assert request is min(active, key=lambda each: (each.params.priority, -each.arrival))
        retracted.append(request.status)
        retract(request)

    monkeypatch.setattr(scheduler, "_retract", checked_retract)
    requests = [
        endless(f"r{i}", [i % 5] * (1 + i % 13), speculative=i % 2 == 0, priority=i % 3, max_new_tokens=12)
        for i in range(30)
    ]
    simulation.run(requests)
    assert {RequestStatus.PREFILLING, RequestStatus.RUNNING} <= set(retracted)
    for request in requests:
        simulation.check_answer(request)


@pytest.mark.parametrize(
    "setup, hot",
    [
        (Setup(policy="lpm", rows=2, spare_slots=200), {}),
        (Setup(priorities=True, rows=2, spare_slots=200), {"priority": 20}),
        (Setup(priorities=True, policy="lpm", rows=2, spare_slots=200), {"priority": 20}),
    ],
    ids=["lpm", "priority", "both"],
)
def test_under_overload_nobody_waits_for_ever(setup, hot):
    """Those that the policy prefers keep coming. The k-th oldest is admitted among the next 16 k all the same."""
    simulation = Simulation(setup, random.Random(0))
    simulation.run([endless("warm", [1] * 10, max_new_tokens=1)])
    names = (f"hot{index}" for index in range(10_000))
    for _ in range(8):
        simulation.add(endless(next(names), [1] * 10, max_new_tokens=2, **hot))
    cold = [endless(f"cold{index}", [2 + index] * 10, max_new_tokens=2) for index in range(5)]
    for request in cold:
        simulation.add(request)
    before = simulation.scheduler._num_admitted
    admitted: dict[str, int] = {}
    while not all(request.finish_reason for request in cold):
        while len(simulation.scheduler.waiting) < 12:
            simulation.add(endless(next(names), [1] * 10, max_new_tokens=2, **hot))
        simulation.step()
        for request in cold:
            if request.status != RequestStatus.WAITING:
                admitted.setdefault(request.request_id, simulation.scheduler._num_admitted - before)
        assert simulation.steps < 5000, "somebody starves"
    waits = [admitted[request.request_id] for request in cold]
    assert waits == sorted(waits)
    # 8 hot ones are older than the first, and 2 may be admitted in one step
    assert all(wait <= 16 * (8 + place) + 2 for place, wait in enumerate(waits, start=1))
    assert waits[-1] > 16, "the policy prefers nobody"


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_prompts_that_keep_coming_hold_up_decoding_by_one_chunk_at_a_time(num_nodes):
    setup = Setup(num_nodes=num_nodes, speculative=num_nodes > 1, context=60, chunk=5, rows=8, spare_slots=2000)
    simulation = Simulation(setup, random.Random(0))
    running = [endless("a", [1], max_new_tokens=20), endless("b", [2], max_new_tokens=20, speculative=False)]
    for request in running:
        simulation.add(request)
    run_until(simulation, lambda: all(request.status == RequestStatus.RUNNING for request in running))
    last_step = {request.request_id: simulation.steps for request in running}
    for index in range(1000):
        simulation.add(endless(f"prompt{index}", [index % 12, *range(40)], max_new_tokens=1))
        before = simulation.decoder.num_extended
        for update in simulation.step():
            if update.request_id in last_step:
                assert simulation.steps - last_step[update.request_id] <= 4  # a chunk, the other kind, a chunk, this
                last_step[update.request_id] = simulation.steps
        assert simulation.decoder.num_extended - before <= 5
        if all(request.finish_reason for request in running):
            return
    pytest.fail("decoding starves")


def test_answers_without_drafts_are_cached_for_their_like():
    """And what is drafted after one of them is as good as ever, which FakeDecoder checks."""
    for late in (False, True):
        setup = Setup(num_nodes=4, speculative=True, drafts_late=late, spare_slots=60)
        simulation = Simulation(setup, random.Random(0))
        first = endless("a", [1, 2, 3], max_new_tokens=10, speculative=False)
        simulation.run([first])
        text = first.all_ids
        simulation.run([endless("plain", [*text, 5], max_new_tokens=2, speculative=False)])
        simulation.run([endless("drafting", [*text, 5], max_new_tokens=2)])
        assert simulation.updates["plain"][0].cached_tokens == len(text) - 1
        assert simulation.updates["drafting"][0].cached_tokens == 3


def test_a_finished_prompt_is_shared_at_once():
    """A request with the same prompt reuses it while the first still runs."""
    simulation = Simulation(Setup(spare_slots=60), random.Random(0))
    first, second = endless("a", [1, 2, 3, 4]), endless("b", [1, 2, 3, 4])
    simulation.add(first)
    run_until(simulation, lambda: first.status == RequestStatus.RUNNING)
    simulation.add(second)
    simulation.step()
    assert second.num_cached == 3  # all but the one token that must be computed


def test_answers_of_finished_requests_are_cached():
    simulation = Simulation(Setup(num_nodes=4, speculative=True, spare_slots=60), random.Random(0))
    first = endless("a", [1, 2, 3], max_new_tokens=10)
    simulation.run([first])
    follow_up = endless("b", first.all_ids + [5, 6])
    simulation.run([follow_up])
    # the last token's KV was never computed, and the draft row before it consumed it: both are computed anew at a hit
    assert simulation.updates["b"][0].cached_tokens == len(first.all_ids) - 1


@pytest.mark.parametrize("at_length", [0, 4])
@pytest.mark.parametrize(
    "setup", [Setup(spare_slots=40), Setup(num_nodes=4, speculative=True, spare_slots=40)], ids=str
)
def test_a_failure_ends_its_request_without_the_tokens_of_the_step(setup, at_length):
    simulation = Simulation(setup, random.Random(0))
    failing, other = endless("failing", [1, 2, 3]), endless("other", [4, 5, 6])
    simulation.add(failing)
    simulation.add(other)
    run_until(simulation, lambda: len(failing.output_ids) >= at_length)
    told = len(failing.output_ids)
    failing.failure = Failure("regex", "cannot go on")
    run_until(simulation, lambda: other.finish_reason)
    assert (failing.finish_reason, len(failing.output_ids)) == (FinishReason.ABORT, told)
    assert simulation.updates["failing"][-1].failure == failing.failure
    simulation.check_idle()


def test_queue_full():
    simulation = Simulation(Setup(), random.Random(0))
    limit = simulation.scheduler.config.max_queued_requests
    for index in range(limit):
        simulation.add(endless(f"r{index}", [1]))
    with pytest.raises(QueueFull, match="maximum queue size"):
        simulation.add(endless("one too many", [1]))


def test_cancel_of_an_unknown_request_is_ignored():
    simulation = Simulation(Setup(), random.Random(0))
    simulation.scheduler.cancel("nobody")
    simulation.check_idle()
