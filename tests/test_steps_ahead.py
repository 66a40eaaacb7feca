"""Steps begun before the last one's results are read, on a device that does nothing before somebody waits for it."""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby

import pytest
import torch

from specbackend import Engine
from specbackend.cache.kv_pool import RequestTable
from specbackend.request import FinishReason, Request
from specbackend.sampling_params import SamplingParams
from specbackend.scheduler import Scheduler
from specbackend.speculative.drafter import MOST_UNFED
from specbackend.step_graphs import HostBuffers, StepBuffers
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET, DEMOS
from tests.speculative.test_adaptive_decoder import Says, coin
from tests.test_equivalence import GREEDY, make_engine
from tests.test_step_graphs import PROMPT_WIDTHS, SAMPLED, num_steps, output_ids

TREES = {"plain": None, "5-4-8": (5, 4, 8), "5-1-6": (5, 1, 6)}
NEXTN = {"model_path": str(DEMOS / "mimo-gsm8k"), "speculative_algorithm": "NEXTN", "speculative_adaptive": False}


@dataclass
class LateDevice:
    """What it is told to do waits in line. A host that reads too early, or refills what waits, gets wrong answers."""

    line: deque[Callable[[], object]] = field(default_factory=deque)
    downloads: dict[int, int] = field(default_factory=dict)  # by host buffers, how many are in line
    num_begun: int = 0  # recorded steps
    num_ahead: int = 0  # of these, those in line behind another
    is_busy: bool = False

    def tell(self, work: Callable[[], object]) -> None:
        self.line.append(work)

    def finish(self, is_over: Callable[[], bool] = lambda: False) -> None:
        if self.is_busy:  # it is its own work that looks
            return
        self.is_busy = True
        while self.line and not is_over():
            self.line.popleft()()
        self.is_busy = False


@pytest.fixture
def late(monkeypatch) -> LateDevice:
    device, send, download, slots = LateDevice(), StepBuffers.send, StepBuffers.download, RequestTable.slots.fget

    def record(compute):
        device.finish()
        compute()

        def replay() -> None:
            device.num_begun += 1
            device.num_ahead += any(device.downloads.values())
            device.tell(compute)

        return replay

    def late_download(buffers: StepBuffers, host: HostBuffers) -> None:
        device.downloads[id(host)] = device.downloads.get(id(host), 0) + 1

        def work() -> None:
            download(buffers, host)
            device.downloads[id(host)] -= 1

        device.tell(work)

    def wait(host: HostBuffers) -> None:
        device.finish(lambda: not device.downloads.get(id(host)))

    def slots_when_all_is_done(table: RequestTable):
        device.finish()
        return slots(table)

    monkeypatch.setattr("specbackend.engine.graph_recorder", lambda _: record)
    for module in ("runner", "forward_graphs"):
        monkeypatch.setattr(f"specbackend.{module}.PROMPT_WIDTHS", PROMPT_WIDTHS[:1])
    monkeypatch.setattr("specbackend.forward_graphs.ForwardGraphs.record", lambda *_: None)  # not what this is about
    monkeypatch.setattr(StepBuffers, "send", lambda *call: device.tell(lambda: send(*call)))
    monkeypatch.setattr(StepBuffers, "download", late_download)
    monkeypatch.setattr(HostBuffers, "wait", wait)
    monkeypatch.setattr(RequestTable, "slots", property(slots_when_all_is_done))
    return device


@pytest.fixture(params=TREES, ids=str)
def tree(request):
    return TREES[request.param]


def assert_nothing_is_held(engine: Engine) -> None:
    stats = engine.stats()
    assert stats.free_slots + stats.evictable_slots == stats.total_slots
    assert engine.scheduler.table.num_free_rows == engine.config.max_running_requests


def test_requests_that_end_one_by_one_equal_hf_generate(tree, late, demo_prompts, expected):
    lengths = [60, 22, 60, 9, 35]
    engine = make_engine(tree, cuda_graph_max_bs=6, max_total_tokens=1 << 13)
    params = [GREEDY | {"max_new_tokens": length} for length in lengths]
    for _ in range(2):  # the second time from the prefix cache
        answers = engine.generate(input_ids=demo_prompts[: len(lengths)], sampling_params=params)
        assert output_ids(answers) == [expected[i][:length] for i, length in enumerate(lengths)]
        assert_nothing_is_held(engine)
    assert late.num_ahead > late.num_begun / 2


def test_answers_and_accept_lengths_are_as_without(tree, late, monkeypatch, demo_prompts):
    params = [each | {"max_new_tokens": 40 - 3 * index} for index, each in enumerate(SAMPLED)]
    prompts = demo_prompts[: len(params)]
    ahead = make_engine(tree).generate(input_ids=prompts, sampling_params=params)
    assert late.num_ahead > late.num_begun / 2
    count = late.num_ahead
    monkeypatch.setattr(Scheduler, "goes_on", lambda scheduler, batch: False)
    in_step = make_engine(tree).generate(input_ids=prompts, sampling_params=params)
    assert late.num_ahead == count
    assert output_ids(ahead) == output_ids(in_step)
    assert num_steps(ahead) == num_steps(in_step)


def test_mtp_heads_go_on_too(late, demo_prompts):
    shared = {"max_running_requests": 4, "max_total_tokens": 1 << 13}
    params = [GREEDY | {"max_new_tokens": length} for length in (50, 20, 33)]
    ahead = Engine(**NEXTN, **shared).generate(input_ids=demo_prompts[:3], sampling_params=params)
    plain = Engine(**NEXTN | {"speculative_algorithm": None}, **shared, disable_cuda_graph=True)
    assert late.num_ahead > late.num_begun / 2
    assert output_ids(ahead) == output_ids(plain.generate(input_ids=demo_prompts[:3], sampling_params=params))


@pytest.mark.parametrize("seed", range(4))
def test_steps_of_either_kind_go_on_until_the_kind_changes(seed, late, demo_prompts, expected):
    draft = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(DEMO_EAGLE3)}
    engine = Engine(model_path=str(DEMO_TARGET), **draft, max_running_requests=4, max_total_tokens=1 << 13)
    controller = engine.decoder.controller = coin(seed, chance=(0.1, 0.5, 0.9, 0.0)[seed])
    tokens = {str(number): [] for number in range(3)}
    for request_id, prompt in zip(tokens, demo_prompts, strict=False):
        engine.submit(Request(request_id, prompt, SamplingParams.from_dict(GREEDY)))
    while engine.has_work:
        for update in engine.step():
            tokens[update.request_id] += update.token_ids
        assert all(request.num_unfed <= MOST_UNFED for request in engine.scheduler.running)
    assert list(tokens.values()) == expected[:3]
    assert late.num_ahead > 5
    assert seed != 1 or {each == 1.0 for each in controller.noted} == {True, False}, "of one kind only"
    assert_nothing_is_held(engine)


def test_the_controller_is_asked_before_every_step(late, demo_prompts):
    """Three with trees, three without: the one begun ahead is a step late to change."""
    draft = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(DEMO_EAGLE3)}
    engine = Engine(model_path=str(DEMO_TARGET), **draft, max_running_requests=4, max_total_tokens=1 << 13)
    kinds, engine.decoder.controller = [], Says(lambda step: step % 6 < 3)
    note = engine.decoder._note

    def noted(requests: list[Request], is_drafted: bool, *others) -> None:
        kinds.append(is_drafted)
        note(requests, is_drafted, *others)

    engine.decoder._note = noted
    engine.generate(input_ids=demo_prompts[:2], sampling_params=GREEDY | {"ignore_eos": True})
    runs = [len(list(run)) for _, run in groupby(kinds)]
    assert late.num_ahead > 5 and len(runs) > 3 and max(runs) <= 4


@pytest.mark.parametrize("slots", [1 << 13, 640], ids=["room", "little room"])
@pytest.mark.parametrize("seed", range(3))
def test_requests_that_come_and_go_between_steps(tree, seed, slots, late, demo_prompts, expected):
    """They arrive at any time, or are cancelled, when often the same id comes again at once."""
    rng, tokens, asked = random.Random(seed), {}, {}
    engine = make_engine(tree, max_running_requests=4, max_total_tokens=slots, context_length=400, cuda_graph_max_bs=4)

    def submit(request_id: str) -> None:
        prompt, length = rng.randrange(12), rng.randint(1, 60)
        asked[request_id], tokens[request_id] = (prompt, length), []
        params = SamplingParams(temperature=0, max_new_tokens=length)
        engine.submit(Request(request_id, demo_prompts[prompt], params))

    unborn, open_ids, num_ended = [str(number) for number in range(14)], set(), 0
    while unborn or engine.has_work:
        if unborn and rng.random() < 0.15:
            open_ids.add(unborn[-1])
            submit(unborn.pop())
        if open_ids and rng.random() < 0.04:
            gone = rng.choice(sorted(open_ids))
            engine.cancel(gone)
            open_ids.remove(gone)
            if rng.random() < 0.7:
                open_ids.add(gone)
                submit(gone)
        for update in engine.step():
            assert update.request_id in open_ids
            tokens[update.request_id] += update.token_ids
            if update.finished:
                assert update.finish_reason is not FinishReason.ABORT
                open_ids.remove(update.request_id)
                num_ended += 1
                prompt, length = asked[update.request_id]
                assert tokens[update.request_id] == expected[prompt][:length]
    assert num_ended >= 8 and late.num_ahead > 10
    assert_nothing_is_held(engine)


def test_nobody_waits_for_a_second_step(late, demo_prompts):
    """A request that arrives while a step is under way and another in line has its prompt computed after these."""
    engine = make_engine((5, 4, 8), max_running_requests=4, max_total_tokens=1 << 13)
    engine.submit(Request("first", demo_prompts[0], SamplingParams(temperature=0, max_new_tokens=100)))
    for _ in range(4):
        engine.step()
    assert engine._ahead is not None
    engine.submit(Request("second", demo_prompts[1], SamplingParams(temperature=0, max_new_tokens=4)))
    assert {update.request_id for update in engine.step()} == {"first"}
    assert [update.request_id for update in engine.step()] == ["second"]


@pytest.mark.parametrize("params", [{"logprobs": 1}, {"repetition_penalty": 1.2}, {"speculative": False}], ids=str)
def test_what_is_not_recorded_or_takes_turns_does_not_go_ahead(params, late, demo_prompts):
    engine = make_engine((5, 4, 8), max_running_requests=4, max_total_tokens=1 << 13)
    for number, each in enumerate((params, {})):
        sampling = SamplingParams.from_dict(GREEDY | {"max_new_tokens": 12} | each)
        engine.submit(Request(str(number), demo_prompts[number], sampling))
    num_together = 0
    while engine.has_work:
        engine.step()
        if len(engine.scheduler.running) == 2:
            num_together += 1
            assert engine._ahead is None
    assert num_together > 3


def test_no_step_is_begun_for_requests_that_end_before_it(late, demo_prompts):
    params = GREEDY | {"max_new_tokens": 20, "ignore_eos": True}
    engine = make_engine(None, max_running_requests=4, max_total_tokens=1 << 13)
    engine.generate(input_ids=demo_prompts[:2], sampling_params=params)
    assert late.num_begun == 19 and late.num_ahead == 18


def test_rows_of_nobody_stay_empty(late, demo_prompts):
    """They would grow out of the table one day."""
    engine = make_engine((5, 4, 8), max_running_requests=4, max_total_tokens=1 << 13)
    engine.generate(input_ids=demo_prompts[:3], sampling_params=GREEDY)
    late.finish()
    lengths = engine.decoder._buffers[4].integer_5B[1].tolist()
    assert min(lengths[:3]) > 0 and lengths[3] == 0


def test_host_buffers_are_filled_again_when_they_are_free(monkeypatch):
    calls, table = [], RequestTable(2, 8, "cpu")
    monkeypatch.setattr(HostBuffers, "wait", lambda host: calls.append(("wait", id(host))))
    monkeypatch.setattr(HostBuffers, "fill_writes", lambda host, table: calls.append(("fill", id(host))))
    buffers = StepBuffers(1, 1, table.padding_row, torch.device("cpu"))
    one, other, again = (id(buffers.upload_writes(table)) for _ in range(3))
    assert one == again != other
    assert calls == [(what, host) for host in (one, other, again) for what in ("wait", "fill")]
