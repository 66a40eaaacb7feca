"""A storm of retractions: 32 requests in a pool for 4 say what they say alone, and say it once."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from specbackend import Engine
from specbackend.request import Request, RequestStatus
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET
from tests.test_algorithms import make_engine, write_checkpoints

EAGLE3 = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(DEMO_EAGLE3)}
NUM_REQUESTS, NEW_TOKENS = 32, 56
KINDS = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"temperature": 0.9, "presence_penalty": 0.5, "min_new_tokens": 30},
    {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1},
    {"temperature": 0.7, "regex": r"([a-z]{1,8} ){8}[0-9]{3}[a-z ]{10,}"},
    {"temperature": 0.0, "stop": [" the", "$"], "min_new_tokens": 12},
    {"temperature": 1.0, "min_p": 0.1, "speculative": False},
    {"temperature": 0, "prompt_logprobs": 1},
]
MIXED = [
    {"max_new_tokens": NEW_TOKENS, "seed": index, "logprobs": index % 3, **KINDS[index % len(KINDS)]}
    for index in range(NUM_REQUESTS)
]
PROMPTS = [[index, index % 7, 5] for index in range(NUM_REQUESTS)]
PARAMS = [
    {"temperature": index % 2, "seed": index, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    for index in range(NUM_REQUESTS)
]


@dataclass
class Storm:
    """What the scheduler did to the requests of one engine."""

    retracted: list[Request]
    most_running: int = 0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mimo")
    write_checkpoints(folder, "mimo")
    return folder


@pytest.fixture
def watch(monkeypatch):
    def watched(engine: Engine) -> Storm:
        storm, scheduler = Storm([]), engine.scheduler
        retract, schedule = scheduler._retract, scheduler.schedule

        def counting_retract(request: Request) -> None:
            storm.retracted.append(request)
            retract(request)
            assert request.status == RequestStatus.WAITING

        def counting_schedule():
            batch = schedule()
            storm.most_running = max(storm.most_running, len(scheduler.running))
            return batch

        monkeypatch.setattr(scheduler, "_retract", counting_retract)
        monkeypatch.setattr(scheduler, "schedule", counting_schedule)
        return storm

    return watched


def check_storm(engine: Engine, storm: Storm) -> None:
    in_the_midst = {request for request in storm.retracted if request.output_ids}
    assert len(in_the_midst) > NUM_REQUESTS / 4 and storm.most_running > NUM_REQUESTS / 4, "that was no storm"
    stats = engine.stats()
    assert stats.free_slots + stats.evictable_slots == stats.total_slots


@pytest.fixture(scope="module")
def tiny_answers(checkpoints) -> list[dict]:
    """Plainly decoded, one by one."""
    engine = make_engine(checkpoints, "plain", max_running_requests=1, max_total_tokens=4000)
    return engine.generate(input_ids=PROMPTS, sampling_params=PARAMS)


@pytest.mark.parametrize("algorithm", ["plain", "EAGLE", "EAGLE3", "NGRAM", "STANDALONE", "NEXTN"])
def test_every_algorithm(algorithm, checkpoints, tiny_answers, watch):
    """Half of the requests are greedy, half are sampled with a seed."""
    engine = make_engine(checkpoints, algorithm, context_length=64, max_total_tokens=4 * 64)
    storm = watch(engine)
    answers = engine.generate(input_ids=PROMPTS, sampling_params=PARAMS)
    assert [answer["output_ids"] for answer in answers] == [answer["output_ids"] for answer in tiny_answers]
    check_storm(engine, storm)


@pytest.fixture(scope="module")
def demo_answers(demo_prompts) -> list[dict]:
    engine = Engine(model_path=str(DEMO_TARGET), max_running_requests=1, context_length=72)
    return engine.generate(input_ids=starts(demo_prompts), sampling_params=MIXED)


def starts(prompts: list[list[int]]) -> list[list[int]]:
    return [prompts[index][: 8 + index % 5] for index in range(NUM_REQUESTS)]


@pytest.mark.parametrize("server", [{}, EAGLE3], ids=["plain", "EAGLE3"])
def test_every_kind_of_state(server, demo_prompts, demo_answers, watch):
    """Penalties, grammars, seeds, logprobs and stop strings go on where they were."""
    engine = Engine(
        model_path=str(DEMO_TARGET), context_length=72, max_total_tokens=4 * 72, chunked_prefill_size=3, **server
    )
    storm = watch(engine)
    answers = engine.generate(input_ids=starts(demo_prompts), sampling_params=MIXED)
    for answer, other in zip(answers, demo_answers, strict=True):
        assert (answer["text"], answer["output_ids"]) == (other["text"], other["output_ids"])
        assert answer["meta_info"]["finish_reason"] == other["meta_info"]["finish_reason"]
        for name in ("output_token_logprobs", "output_top_logprobs", "input_token_logprobs", "input_top_logprobs"):
            assert flat(answer["meta_info"].get(name)) == pytest.approx(flat(other["meta_info"].get(name)), abs=1e-3)
    check_storm(engine, storm)


def flat(entries: list | tuple | float | None) -> list[float]:
    if isinstance(entries, (list, tuple)):
        return [number for entry in entries for number in flat(entry)]
    return [] if entries is None else [entries]
