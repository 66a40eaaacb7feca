"""The objectives against slow references, and what each algorithm does that the loss alone would not show."""

import pytest
import torch
from draft_training.head import training_time_test
from draft_training.samples import collate
from draft_training.target import Target

from tests.training import heads, reference
from tests.training.conftest import write_target


@pytest.fixture(scope="module")
def target(qwen2_folder) -> Target:
    return Target.load(qwen2_folder, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(("algorithm", "length"), [("eagle3", 7), ("eagle", 1), ("eagle", 3), ("mtp", 1), ("mtp", 3)])
def test_loss_equals_reference(target, samples, algorithm, length):
    head = heads.build(algorithm, target).eval()  # eval: without EAGLE's noise
    weights = dict(head.named_parameters()) | dict(head.named_buffers())
    short = [samples[1], samples[5], samples[7]]
    score = training_time_test(head, target, *collate(short), length, reference.DECAY)
    loss, correct, rows = reference.objective(algorithm, weights, target.model, short, length)
    assert score.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert score.correct_L.tolist() == correct
    assert score.rows_L.tolist() == rows
    parameters = list(head.parameters())
    ours, theirs = (torch.autograd.grad(total, parameters) for total in (score.loss, loss))
    for name, our, their in zip(dict(head.named_parameters()), ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-3, atol=1e-4 * their.abs().max().item(), msg=name)


def test_every_step_of_the_unroll_counts_some_rows_right_and_some_wrong(target, samples):
    """Else the comparison of the counts above would say nothing: a head that copies the target's own tokens."""
    score = training_time_test(heads.build("mtp", target), target, *collate(samples), 3, 0.8)
    assert 0 < score.correct_L.sum() < score.rows_L.sum()


def test_rows_are_those_that_the_loss_is_divided_by(target, samples):
    score = training_time_test(heads.build("mtp", target), target, *collate(samples), 1, 0.8)
    assert score.rows_L.tolist() == [sum(sample.num_rows for sample in samples)]


def test_padding_does_not_matter(target, samples):
    head = heads.build("eagle3", target)
    together = training_time_test(head, target, *collate(samples), 7, 0.8)
    alone = [training_time_test(head, target, *collate([sample]), 7, 0.8) for sample in samples]
    assert together.loss.item() == pytest.approx(sum(score.loss.item() for score in alone), rel=1e-5)


def test_eagles_noise_is_uniform_of_the_published_width_and_for_training_only(target):
    head = heads.build("eagle", target)
    feature_BTD = torch.zeros(4, 128, 32)
    noise = head.train().enter(feature_BTD)
    limit = 0.2 / 2 * 512 / 128
    assert 0.95 * limit < noise.abs().max() <= limit
    assert noise.abs().mean().item() == pytest.approx(limit / 2, rel=0.05)
    assert torch.equal(head.eval().enter(feature_BTD), feature_BTD)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_kind_of_target(tmp_path, samples, model_type):
    folder = write_target(tmp_path / model_type, model_type, head_dim=16)
    target = Target.load(folder, torch.float32, torch.device("cpu"))
    for algorithm in ("eagle3", "eagle"):
        head = heads.build(algorithm, target)
        assert head.config.head_dim == 16
        loss = training_time_test(head, target, *collate(samples), 2, 0.8).loss
        loss.backward()
        assert loss.isfinite()
    assert all(p.grad is None for p in target.model.parameters())
