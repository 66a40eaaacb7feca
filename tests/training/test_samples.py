"""Prompts in, responses out; an interrupted regeneration goes on."""

import json
from types import SimpleNamespace

import pytest
import torch
from draft_training import samples
from draft_training.errors import TrainingError
from draft_training.samples import Sample

from tests.conftest import DEMO_TARGET

PROMPTS = [[1] * length for length in (3, 3, 5, 7, 8, 9)]


class FakeEngine:
    """Answers a prompt by its length; breaks down on request."""

    config = SimpleNamespace(max_running_requests=1)
    context_length = 12

    def __init__(self, fail_at: int | None = None):
        self.asked, self.sampling, self.fail_at = [], [], fail_at

    def generate(self, input_ids, sampling_params):
        if self.fail_at is not None and len(self.asked) >= self.fail_at:
            raise RuntimeError
        self.asked += input_ids
        self.sampling += sampling_params
        return [{"output_ids": [len(prompt), 0]} for prompt in input_ids]


def regenerate(engine, path, prompts=PROMPTS):
    samples.regenerate(engine, prompts, path, max_new_tokens=5, temperature=0.5, seed=7)


def test_in_their_order_and_each_with_its_own_seed(tmp_path):
    engine, path = FakeEngine(), tmp_path / "responses.jsonl"
    regenerate(engine, path)
    assert engine.asked == PROMPTS
    assert [each["seed"] for each in engine.sampling] == list(range(7, 13))
    assert [each["max_new_tokens"] for each in engine.sampling] == [5, 5, 5, 5, 4, 3]  # what the context has room for
    assert samples.read_responses(path) == [Sample(prompt, [len(prompt), 0]) for prompt in engine.asked]


def test_goes_on_after_a_line_that_was_cut_off(tmp_path):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "responses.jsonl"
    regenerate(FakeEngine(), whole)
    with pytest.raises(RuntimeError):
        regenerate(FakeEngine(fail_at=4), path)
    path.write_text(path.read_text()[:-9])
    engine = FakeEngine()
    regenerate(engine, path)
    assert path.read_text() == whole.read_text()
    assert engine.asked == PROMPTS[3:]


def test_answers_to_other_prompts_are_refused(tmp_path):
    path = tmp_path / "responses.jsonl"
    regenerate(FakeEngine(), path)
    with pytest.raises(TrainingError, match="other prompts"):
        regenerate(FakeEngine(), path, prompts=[[2, 2]])


def test_prompts_of_all_three_kinds(tmp_path):
    path = tmp_path / "data.jsonl"
    entries = [{"prompt": "How many?"}, {"question": "How many?"}, {"turns": ["How many?", "And now?"]}]
    path.write_text("\n".join(map(json.dumps, entries)))
    first, second, third = samples.read_prompts(path, DEMO_TARGET)
    assert first == second == third
    assert first[:2] == [0, 1]  # <|begin|><|user|>: the chat template
    path.write_text('{"text": "How many?"}')
    with pytest.raises(TrainingError, match="line 1 of"):
        samples.read_prompts(path, DEMO_TARGET)


def test_mask_marks_rows_whose_token_and_prediction_are_response():
    tokens_BT, mask_BT = samples.collate([Sample([1, 2, 3], [4, 5, 6]), Sample([1], [2, 3])])
    assert tokens_BT.tolist() == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 0, 0, 0]]
    assert mask_BT.tolist() == [[False, False, True, True, False, False], [True] + [False] * 5]


def test_split_holds_out_a_share_and_loses_nothing():
    everything = [Sample([i], [i, i]) for i in range(40)]
    training, held_out = samples.split(everything, 0.1, seed=0)
    assert len(held_out) == 4
    assert sorted(training + held_out) == everything
    assert samples.split(everything, 0.1, seed=0) == (training, held_out)


def test_an_epoch_is_every_sample_once_in_batches_that_fit():
    lengths = [5, 9, 4, 30, 7, 12, 9, 6]
    batches = list(samples.epochs(lengths, 24, 2 * sum(lengths), seed=0))
    assert sorted(i for batch in batches for i in batch) == sorted([*range(8), *range(8)])
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 24 for batch in batches)


def test_token_counts_are_of_the_responses():
    counts_V = samples.token_counts([Sample([5, 5], [1, 2]), Sample([5], [2])], 6)
    assert torch.equal(counts_V, torch.tensor([0, 1, 2, 0, 0, 0]))
