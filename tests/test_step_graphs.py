"""Recorded steps: batches of fixed size, padded, give what the decoders give; and steps leave the host alone."""

import weakref
from collections import Counter

import pytest

from specbackend import Engine
from specbackend.cuda_graphs import graph_batch_sizes
from specbackend.forward_graphs import Inputs
from specbackend.scheduler import Scheduler
from specbackend.speculative.native_growth import NativeGrower
from specbackend.speculative.native_step import NativeTreeDecoder
from specbackend.step_graphs import RecordedDecoder, RecordedStep, StepBuffers
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET, DEMOS
from tests.speculative.test_adaptive_decoder import Says
from tests.test_equivalence import GREEDY, make_engine

EAGLE3 = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(DEMO_EAGLE3)}

TREES = {"plain": None, "5-4-8": (5, 4, 8), "5-1-6": (5, 1, 6), "5-4-4": (5, 4, 4)}
SAMPLED = [
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0},
    {"temperature": 0.7, "top_p": 0.8, "seed": 2},
    {"temperature": 1.3, "top_k": 5, "seed": 3},
    {"temperature": 1.0, "min_p": 0.2, "seed": 2**63 + 5},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 5},
]
PROMPT_WIDTHS = (16, 48, 64)  # fewer and shorter: here they are computed to be recorded
LEFT_TO_THE_DECODER = [
    {"repetition_penalty": 1.3},
    {"logprobs": 2},
    {"return_spec_trace": True},
    {"logit_bias": {"5": 2.0}},
    {"speculative_num_steps": 2},
]


@pytest.fixture(params=TREES, ids=str)
def tree(request):
    return TREES[request.param]


@pytest.fixture
def replays(monkeypatch) -> list[int]:
    """What is recorded runs again, on the CPU, from and to the same buffers. The sizes of the steps that ran so."""
    sizes, replay = [], RecordedDecoder._replay

    def noted(decoder: RecordedDecoder, batch, B: int, *others) -> RecordedStep:
        sizes.append(B)
        return replay(decoder, batch, B, *others)

    def record(compute):
        compute()
        return compute

    for kind in (NativeGrower, NativeTreeDecoder):  # which no GPU has
        monkeypatch.setattr(kind, "serves", lambda *_: False)
    monkeypatch.setattr("specbackend.engine.graph_recorder", lambda device: record)
    monkeypatch.setattr(RecordedDecoder, "_replay", noted)
    for module in ("runner", "forward_graphs"):
        monkeypatch.setattr(f"specbackend.{module}.PROMPT_WIDTHS", PROMPT_WIDTHS)
    return sizes


@pytest.fixture
def forwards(monkeypatch) -> Counter:
    """How often forwards of Q rows over a window of W were replayed."""
    counts, take = Counter(), Inputs.take

    def noted(inputs: Inputs, batch, hidden_TD) -> None:
        counts[tuple(inputs.batch.window_mask_BQW.shape[1:])] += 1
        take(inputs, batch, hidden_TD)

    monkeypatch.setattr(Inputs, "take", noted)
    return counts


def output_ids(answers: list[dict]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


def num_steps(answers: list[dict]) -> list[int]:
    return [answer["meta_info"]["spec_verify_ct"] for answer in answers]


def test_recorded_steps_equal_hf_generate(tree, replays, demo_prompts, expected):
    """Nine requests are too many to be recorded; they end one by one."""
    lengths = range(16, 61, 5)
    engine = make_engine(tree, cuda_graph_max_bs=6, max_running_requests=9, max_total_tokens=1 << 13)
    params = [GREEDY | {"max_new_tokens": length} for length in lengths]
    answers = engine.generate(input_ids=demo_prompts[: len(lengths)], sampling_params=params)
    assert output_ids(answers) == [expected[i][:length] for i, length in enumerate(lengths)]
    assert {2, 4} <= set(replays)


@pytest.mark.usefixtures("no_garbage_collection")
def test_an_engine_that_is_let_go_is_freed_with_its_recordings(tree, replays, forwards, demo_prompts):
    engine = make_engine(tree)
    params = [GREEDY | each | {"max_new_tokens": 6} for each in ({}, {"repetition_penalty": 1.3})]
    engine.generate(input_ids=demo_prompts[:2], sampling_params=params[1])
    engine.generate(input_ids=demo_prompts[:2], sampling_params=params[0])
    assert replays and forwards
    decoder = weakref.ref(engine.decoder)
    del engine
    assert decoder() is None


def test_accept_length_is_that_of_unrecorded_steps(replays, demo_prompts):
    def steps(**params) -> list[int]:
        answers = make_engine((5, 4, 8), **params).generate(input_ids=demo_prompts[:3], sampling_params=GREEDY)
        return num_steps(answers)

    assert steps(cuda_graph_max_bs=4) == steps(disable_cuda_graph=True)
    assert replays


def test_sampled_requests_are_recorded_and_equal(tree, replays, demo_prompts):
    params = [each | {"max_new_tokens": 24} for each in SAMPLED]
    prompts = demo_prompts[: len(params)]
    recorded = make_engine(tree).generate(input_ids=prompts, sampling_params=params)
    assert 6 in replays or 8 in replays
    replays.clear()
    unrecorded = make_engine(tree, cuda_graph_max_bs=0).generate(input_ids=prompts, sampling_params=params)
    assert not replays
    assert output_ids(recorded) == output_ids(unrecorded)
    assert num_steps(recorded) == num_steps(unrecorded)


def test_limits_do_not_narrow_the_drafts_of_greedy_requests(replays, demo_prompts):
    """A recording that has room for limits holds them all the same."""
    params = [GREEDY | {"top_k": 1}] * 5 + [{"temperature": 1.0, "top_k": 5, "max_new_tokens": 60, "ignore_eos": True}]
    engine = make_engine((5, 4, 8))
    steps = num_steps(engine.generate(input_ids=demo_prompts[:6], sampling_params=params))
    assert replays
    assert steps[:5] == num_steps(engine.generate(input_ids=demo_prompts[:5], sampling_params=GREEDY))


@pytest.mark.parametrize("params", LEFT_TO_THE_DECODER, ids=str)
def test_what_no_step_records_has_its_forwards_recorded(params, replays, forwards, demo_prompts):
    """Beside two other requests, of which one ends first: three sequences in graphs of four, then two."""
    several = [GREEDY | params | {"max_new_tokens": count} for count in (20, 9, 20)]
    engine = make_engine((5, 4, 8), cuda_graph_max_bs=4)
    answers = engine.generate(input_ids=demo_prompts[:3], sampling_params=several)
    assert not replays
    if "speculative_num_steps" not in params:
        verified = forwards[8, 8]
        assert verified > 3
        assert forwards[6, 6] == verified  # what was accepted, fed to the draft
        assert forwards[4, 16] == 4 * verified  # the levels of a tree
    unrecorded = make_engine((5, 4, 8), disable_cuda_graph=True)
    again = unrecorded.generate(input_ids=demo_prompts[:3], sampling_params=several)
    assert output_ids(answers) == output_ids(again)
    steps = [[answer["meta_info"]["spec_verify_ct"] for answer in each] for each in (answers, again)]
    assert steps[0] == steps[1]


def test_plain_forwards_are_recorded(replays, forwards, demo_prompts):
    params = GREEDY | {"logprobs": 1, "max_new_tokens": 8}
    answers = make_engine(None).generate(input_ids=demo_prompts[:3], sampling_params=params)
    assert not replays and forwards == {(1, 1): 7}
    unrecorded = make_engine(None, disable_cuda_graph=True).generate(input_ids=demo_prompts[:3], sampling_params=params)
    assert output_ids(answers) == output_ids(unrecorded)


@pytest.mark.parametrize("kind", ["NGRAM", "STANDALONE"])
def test_drafters_that_need_the_host_have_their_forwards_recorded(kind, replays, forwards, demo_prompts, expected):
    draft = {"speculative_draft_model_path": str(DEMO_TARGET)} if kind == "STANDALONE" else {}
    engine = make_engine(None, speculative_algorithm=kind, **draft)
    answers = engine.generate(input_ids=demo_prompts[:2], sampling_params=GREEDY)
    assert output_ids(answers) == expected[:2]
    assert not replays
    assert set(forwards) == ({(12, 12)} if kind == "NGRAM" else {(4, 4), (1, 2)})  # verified and read alike; levels


@pytest.mark.parametrize(
    "kind, length, widths",
    [
        (None, 9, [16]),
        (None, 48, [48]),
        (None, 65, [64, 16]),
        ("EAGLE", 150, [64, 64, 48]),
        ("NGRAM", 40, [48]),
        ("STANDALONE", 100, [64, 48]),
    ],
)
def test_a_lone_prompt_is_padded_to_what_is_recorded(kind, length, widths, replays, forwards, demo_prompts):
    """In chunks of at most 64; the network that drafts reads as many rows as the target."""
    prompt = [token for each in demo_prompts for token in each][:length]
    draft = {"speculative_draft_model_path": str(DEMO_TARGET)} if kind == "STANDALONE" else {}
    tree = (5, 4, 8) if kind == "EAGLE" else None
    params = {"speculative_algorithm": kind} | draft if tree is None and kind else {}
    shared = {"chunked_prefill_size": 64, "disable_radix_cache": True, "cuda_graph_max_bs": 2}
    answers = []
    for graphs in ({}, {"disable_cuda_graph": True}):
        engine = make_engine(tree, **params, **shared, **graphs)
        answers.append(engine.generate(input_ids=prompt, sampling_params=GREEDY | {"max_new_tokens": 8})["output_ids"])
    assert answers[0] == answers[1]
    networks = 1 if kind in (None, "NGRAM") else 2
    for width in set(widths):
        assert forwards[width, width] == networks * widths.count(width)


def test_prompts_do_not_take_the_place_of_trees_of_their_width(replays, forwards, demo_prompts):
    params = GREEDY | {"logprobs": 1, "max_new_tokens": 8}
    make_engine((5, 4, 16), cuda_graph_max_bs=2).generate(input_ids=demo_prompts[:2], sampling_params=params)
    assert forwards[16, 16] > 1


def test_only_lone_prompts_are_padded(replays):
    runner = make_engine(None, cuda_graph_max_bs=2).plain._decoder.runner
    assert [runner.prompt_width([length]) for length in (1, 16, 17, 48, 64, 65)] == [16, 16, 48, 48, 64, 65]
    assert runner.prompt_width([17, 40]) == 40


def test_steps_of_an_adaptive_engine_are_recorded_with_trees_and_without(replays, monkeypatch, demo_prompts, expected):
    """A plain step's recording keeps what the draft reads later: the drafts are as without recordings.

    No step is begun ahead, as the controller would be asked about it too early for the kinds of steps to be the same.
    """
    monkeypatch.setattr(Scheduler, "goes_on", lambda scheduler, batch: False)

    def answers(**params) -> list[dict]:
        engine = Engine(model_path=str(DEMO_TARGET), **EAGLE3, max_running_requests=4, **params)
        engine.decoder.controller = Says(lambda step: step % 5 > 2)
        return engine.generate(input_ids=demo_prompts[:3], sampling_params=GREEDY)

    recorded = answers()
    assert len(replays) > max(num_steps(recorded)) - 2
    replays.clear()
    unrecorded = answers(disable_cuda_graph=True)
    assert not replays
    assert output_ids(recorded) == output_ids(unrecorded) == expected[:3]
    assert num_steps(recorded) == num_steps(unrecorded)


def test_batch_sizes():
    assert graph_batch_sizes(1) == [1]
    assert graph_batch_sizes(3) == [1, 2, 3]
    assert graph_batch_sizes(32) == [1, 2, 4, 8, 16, 24, 32]
    assert graph_batch_sizes(20) == [1, 2, 4, 8, 16, 20]


@pytest.mark.parametrize("kind", [None, "EAGLE", "NEXTN"])
def test_steps_leave_the_host_alone(kind, monkeypatch):
    """The meta device has no values: whatever a step would read on the host, or bring from it, is an error there."""
    accepted = []

    def record(compute):
        compute()

    monkeypatch.setattr("specbackend.engine.graph_recorder", lambda device: record)
    monkeypatch.setattr(StepBuffers, "keep", lambda buffers, found: accepted.append(found))
    paths = {"model_path": str(DEMOS / ("mimo-gsm8k" if kind == "NEXTN" else "llama-gsm8k"))}
    if kind == "EAGLE":
        paths["speculative_draft_model_path"] = str(DEMOS / "llama-gsm8k-eagle")
    Engine(**paths, speculative_algorithm=kind, device="meta", cuda_graph_max_bs=2, max_total_tokens=2048)
    assert len(accepted) == 3 * 2 * (2 if kind else 1)  # kinds of sampling, batch sizes, decoders
    assert all(found.token_BP.is_meta for found in accepted)
