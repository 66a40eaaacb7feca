"""One step is one step, however it is cut into batches, ranks and runs."""

import pytest
import torch
from draft_training import loop
from draft_training.errors import TrainingError
from draft_training.recipe import HeadTask
from draft_training.target import Target

from tests.training import heads

OPTIONS = loop.LoopOptions(lr=1e-3, warmup=2, save_every=2)
BATCHES = [[0, 1], [2, 3], [4, 5], [6, 7], [1, 2], [3, 4], [5, 6], [7, 0]]


class Interrupted(Exception):
    pass


class FailingTask(HeadTask):
    """Ends like a machine that is taken away."""

    def score(self, batch):
        if batch == BATCHES[5]:
            raise Interrupted
        return super().score(batch)


@pytest.fixture(scope="module")
def target(qwen2_folder) -> Target:
    return Target.load(qwen2_folder, torch.float32, torch.device("cpu"))


def make_task(target, samples, algorithm="eagle", kind=HeadTask) -> HeadTask:
    return kind(heads.build(algorithm, target), target, samples, 3, 0.8)


def weights(task) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in task.model.parameters()])


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path, target, samples):
    """With EAGLE, whose noise is random."""
    whole = make_task(target, samples)
    expected = loop.train(whole, BATCHES, OPTIONS)
    state = tmp_path / "state.pt"
    with pytest.raises(Interrupted):
        loop.train(make_task(target, samples, kind=FailingTask), BATCHES, OPTIONS, state, {"lr": 1e-3})
    torch.manual_seed(99)  # a new process
    resumed = make_task(target, samples)
    resumed.model.load_state_dict({k: torch.zeros_like(v) for k, v in resumed.model.state_dict().items()})
    history = loop.train(resumed, BATCHES, OPTIONS, state, {"lr": 1e-3})
    assert torch.equal(weights(resumed), weights(whole))
    assert history["loss"] == expected["loss"]
    assert history["accuracy"] == expected["accuracy"]
    finished = make_task(target, samples, kind=FailingTask)  # once more: there is nothing left to train
    assert loop.train(finished, BATCHES, OPTIONS, state, {"lr": 1e-3}) == history
    assert torch.equal(weights(finished), weights(whole))


def test_a_state_of_another_training_is_refused(tmp_path, target, samples):
    state = tmp_path / "state.pt"
    loop.train(make_task(target, samples), BATCHES[:2], OPTIONS, state, {"lr": 1e-3, "seed": 0})
    with pytest.raises(TrainingError, match="another lr"):
        loop.train(make_task(target, samples), BATCHES[:2], OPTIONS, state, {"lr": 2e-3, "seed": 0})


@pytest.mark.parametrize("algorithm", ["eagle3", "mtp"])  # EAGLE draws its noise batch by batch
def test_accumulated_batches_are_one_big_batch(target, samples, algorithm):
    big, small = (make_task(target, samples, algorithm) for _ in range(2))
    histories = [
        loop.train(big, [[0, 1, 2, 3], [4, 5, 6, 7]], OPTIONS),
        loop.train(small, BATCHES[:4], loop.LoopOptions(lr=1e-3, warmup=2, accumulate=2)),
    ]
    assert histories[0]["loss"] == pytest.approx(histories[1]["loss"], rel=1e-5)
    torch.testing.assert_close(weights(big), weights(small), rtol=0, atol=2e-6)


def test_warm_up_and_cosine():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=2.0)
    schedule = loop.cosine_schedule(optimizer, steps=10, warmup=4)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[7] == pytest.approx(2.0 * 0.51)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.04)


@pytest.mark.parametrize("algorithm", heads.HEADS)
def test_the_target_stays_as_it_is(qwen2_folder, samples, algorithm):
    """Also where the head starts as a part of it."""
    target, untouched = (Target.load(qwen2_folder, torch.float32, torch.device("cpu")) for _ in range(2))
    loop.train(make_task(target, samples, algorithm), BATCHES[:2], OPTIONS)
    for name, tensor in untouched.model.state_dict().items():
        assert torch.equal(target.model.state_dict()[name], tensor), name


def test_too_few_batches_for_a_step(target, samples):
    with pytest.raises(TrainingError, match="too few"):
        loop.train(make_task(target, samples), BATCHES[:1], loop.LoopOptions(lr=1e-3, warmup=2, accumulate=2))


def test_a_bfloat16_target_trains_a_float32_head(qwen2_folder, samples):
    target = Target.load(qwen2_folder, torch.bfloat16, torch.device("cpu"))
    for algorithm in heads.HEADS:
        task = make_task(target, samples, algorithm)
        before = weights(task)
        history = loop.train(task, BATCHES[:2], OPTIONS)
        assert all(torch.isfinite(torch.tensor(history["loss"])))
        assert not torch.equal(weights(task), before)
        assert weights(task).dtype == torch.float32
