"""The FlashInfer backend against the torch backend: over a fake that checks every argument, and on a GPU itself."""

import importlib.util
import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specbackend.attention.flashinfer import FlashInferAttention, FlashInferPlan, flashinfer_attention
from specbackend.attention.torch_sdpa import TorchAttention
from specbackend.batch import ForwardBatch
from specbackend.errors import ConfigError
from tests.attention import batches, fake_flashinfer

IS_INSTALLED = importlib.util.find_spec("flashinfer") is not None
SIGNATURES = json.loads((Path(__file__).parent / "flashinfer_0_6_3.json").read_text())
DTYPE, TOLERANCE = torch.bfloat16, 2e-2  # outputs lie between -4 and 4, where bfloat16 has steps of up to 2^-6
H, G, D = 4, 2, 128


@pytest.fixture(params=["fake", "real"])
def device(request, monkeypatch) -> torch.device:
    if request.param == "fake":
        monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer.module())
        return torch.device("cpu")
    if not (IS_INSTALLED and torch.cuda.is_available()):
        pytest.skip("needs flashinfer-python and a GPU")
    return torch.device("cuda")


@pytest.fixture
def backend(device) -> FlashInferAttention:
    return FlashInferAttention(device)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def plan_on(device: torch.device, backend: FlashInferAttention, batch: ForwardBatch) -> FlashInferPlan:
    return backend.plan(batches.to(device, batch), DTYPE)


def assert_agrees(device: torch.device, plan: FlashInferPlan, batch: ForwardBatch, generator) -> None:
    """One layer of random q, K and V."""
    q_BQHD = torch.randn(*batch.token_BQ.shape, H, D, generator=generator).to(DTYPE)
    kv_S2GD = torch.randn(batches.NUM_SLOTS, 2, G, D, generator=generator).to(DTYPE)
    expected = TorchAttention().plan(batch, torch.float32).run(q_BQHD.float(), kv_S2GD.float())
    got = plan.run(q_BQHD.to(device), kv_S2GD.to(device))
    assert got.shape == expected.shape and got.dtype == DTYPE
    torch.testing.assert_close(got.cpu().float(), expected, atol=TOLERANCE, rtol=0)


CASES = {
    "chunks": lambda g: batches.chunks([5, 0, 17], [6, 4, 1], g),
    "first chunk": lambda g: batches.chunks([0], [9], g),
    "decode": lambda g: batches.chunks([1, 30, 12, 7], [1, 1, 1, 1], g),
    "trees": lambda g: batches.trees([3, 21, 8], 8, g),
    "one large tree": lambda g: batches.trees([11], 70, g),
    "tree without prefix": lambda g: batches.trees([0, 0], 5, g),
    "draft level": lambda g: batches.draft_level([6, 2, 19], 4, 3, g),
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_torch(device, backend, generator, case):
    batch = CASES[case](generator)
    plan = plan_on(device, backend, batch)
    for _layer in range(2):
        assert_agrees(device, plan, batch, generator)


def test_window_masks_of_further_levels(device, backend, generator):
    prefix_lens, K, num_levels = [6, 0, 19], 4, 3
    batch = batches.draft_level(prefix_lens, K, num_levels, generator)
    plan = plan_on(device, backend, batch)
    for level in range(num_levels):
        mask_BKW = batches.level_mask(len(prefix_lens), K, num_levels, level, generator)
        plan.set_window_mask(mask_BKW.to(device))
        assert_agrees(device, plan, replace(batch, window_mask_BQW=mask_BKW), generator)


def test_a_causal_window_may_be_shown_otherwise_later(device, backend, generator):
    batch = batches.chunks([5, 2], [3, 3], generator)
    plan = plan_on(device, backend, batch)
    assert_agrees(device, plan, batch, generator)
    own_BQQ = torch.eye(3, dtype=torch.bool).expand(2, 3, 3)
    plan.set_window_mask(own_BQQ.to(device))
    assert_agrees(device, plan, replace(batch, window_mask_BQW=own_BQQ), generator)


def test_an_older_plan_stays_good(device, backend, generator):
    older, newer = batches.trees([3, 21], 8, generator), batches.chunks([9], [4], generator)
    older_plan, newer_plan = (plan_on(device, backend, batch) for batch in (older, newer))
    for plan, batch in ((newer_plan, newer), (older_plan, older), (newer_plan, newer)):
        assert_agrees(device, plan, batch, generator)


@pytest.mark.parametrize("device", ["fake"], indirect=True)
def test_a_causal_window_sends_no_bits(device, backend, generator, monkeypatch):
    planned = []
    real_plan = fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper.plan
    monkeypatch.setattr(
        fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper,
        "plan",
        lambda self, **arguments: (planned.append(arguments), real_plan(self, **arguments)),
    )
    batch = batches.chunks([5, 2], [3, 3], generator)
    plan = plan_on(device, backend, batch)
    for _layer in range(3):
        assert_agrees(device, plan, batch, generator)
    assert [(arguments["causal"], arguments["custom_mask"]) for arguments in planned] == [(True, None)]


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ConfigError, match=r"specbackend\[flashinfer\]"):
        FlashInferAttention(torch.device("cpu"))


@pytest.mark.parametrize(
    ("device", "dtype", "head_dims", "named"),
    [
        ("cpu", torch.float16, [64], "cpu"),
        ("cuda", torch.float32, [64], "float32"),
        ("cuda", torch.float16, [64, 80], "80"),
    ],
)
def test_what_flashinfer_cannot_compute_is_refused(device, dtype, head_dims, named):
    with pytest.raises(ConfigError, match=f"attention_backend: flashinfer .*{named}"):
        flashinfer_attention(torch.device(device), dtype, head_dims)


@pytest.mark.parametrize("method", SIGNATURES)
def test_the_fake_knows_no_other_parameters(method):
    function = getattr(fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper, method)
    assert set(parameters(function)) <= set(SIGNATURES[method])


@pytest.mark.skipif(not IS_INSTALLED, reason="needs flashinfer-python")
@pytest.mark.parametrize("method", SIGNATURES)
def test_the_record_is_true(method):
    import flashinfer

    real = parameters(getattr(flashinfer.BatchPrefillWithPagedKVCacheWrapper, method))
    assert set(SIGNATURES[method]) <= set(real)


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)[1:]
