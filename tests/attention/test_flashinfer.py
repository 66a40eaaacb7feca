"""The FlashInfer backend against the torch backend, over a fake that checks every argument."""

import importlib.util
import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specbackend.attention.flashinfer import FlashInferAttention, flashinfer_attention
from specbackend.attention.torch_sdpa import TorchAttention
from specbackend.batch import ForwardBatch
from specbackend.errors import ConfigError
from tests.attention import batches, fake_flashinfer

SIGNATURES = json.loads((Path(__file__).parent / "flashinfer_0_6_3.json").read_text())
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # two units in the last place of numbers near 1
H, G, D = 4, 2, 64


@pytest.fixture
def backend(monkeypatch) -> FlashInferAttention:
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer.module())
    return FlashInferAttention(torch.device("cpu"))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random_tensors(batch: ForwardBatch, generator, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """q_BQHD, and kv_S2GD with junk in every slot that the batch does not name."""
    q_BQHD = torch.randn(*batch.token_BQ.shape, H, D, generator=generator).to(dtype)
    kv_S2GD = torch.randn(batches.NUM_SLOTS, 2, G, D, generator=generator).to(dtype)
    return q_BQHD, kv_S2GD


def assert_agrees(plan, batch: ForwardBatch, q_BQHD, kv_S2GD) -> None:
    expected = TorchAttention().plan(batch, torch.float32).run(q_BQHD.float(), kv_S2GD.float())
    got = plan.run(q_BQHD, kv_S2GD)
    assert got.shape == expected.shape and got.dtype == q_BQHD.dtype
    torch.testing.assert_close(got.float(), expected, atol=TOLERANCE[q_BQHD.dtype], rtol=0)


CASES = {
    "chunks": lambda g: batches.chunks([5, 0, 17], [6, 4, 1], g),
    "first chunk": lambda g: batches.chunks([0], [9], g),
    "decode": lambda g: batches.chunks([1, 30, 12, 7], [1, 1, 1, 1], g),
    "trees": lambda g: batches.trees([3, 21, 8], 8, g),
    "one large tree": lambda g: batches.trees([11], 70, g),
    "tree without prefix": lambda g: batches.trees([0, 0], 5, g),
    "draft level": lambda g: batches.draft_level([6, 2, 19], 4, 3, g),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_torch(backend, generator, case, dtype):
    batch = CASES[case](generator)
    plan = backend.plan(batch, dtype)
    for _layer in range(2):
        assert_agrees(plan, batch, *random_tensors(batch, generator, dtype))


def test_window_masks_of_further_levels(backend, generator):
    prefix_lens, K, num_levels = [6, 0, 19], 4, 3
    batch = batches.draft_level(prefix_lens, K, num_levels, generator)
    plan = backend.plan(batch, torch.float16)
    for level in range(num_levels):
        mask_BKW = batches.level_mask(len(prefix_lens), K, num_levels, level, generator)
        plan.set_window_mask(mask_BKW)
        level_batch = replace(batch, window_mask_BQW=mask_BKW)
        assert_agrees(plan, level_batch, *random_tensors(batch, generator, torch.float16))


def test_a_causal_window_may_be_shown_otherwise_later(backend, generator):
    batch = batches.chunks([5, 2], [3, 3], generator)
    plan = backend.plan(batch, torch.float16)
    assert_agrees(plan, batch, *random_tensors(batch, generator, torch.float16))
    own = replace(batch, window_mask_BQW=torch.eye(3, dtype=torch.bool).expand(2, 3, 3))
    plan.set_window_mask(own.window_mask_BQW)
    assert_agrees(plan, own, *random_tensors(batch, generator, torch.float16))


def test_a_causal_window_sends_no_bits(backend, generator, monkeypatch):
    planned = []
    real_plan = fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper.plan
    monkeypatch.setattr(
        fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper,
        "plan",
        lambda self, **arguments: (planned.append(arguments), real_plan(self, **arguments)),
    )
    batch = batches.chunks([5, 2], [3, 3], generator)
    plan = backend.plan(batch, torch.float16)
    for _layer in range(3):
        plan.run(*random_tensors(batch, generator, torch.float16))
    assert [(arguments["causal"], arguments["custom_mask"]) for arguments in planned] == [(True, None)]


def test_an_older_plan_stays_good(backend, generator):
    older, newer = batches.trees([3, 21], 8, generator), batches.chunks([9], [4], generator)
    older_plan, newer_plan = (backend.plan(batch, torch.float16) for batch in (older, newer))
    for plan, batch in ((newer_plan, newer), (older_plan, older), (newer_plan, newer)):
        assert_agrees(plan, batch, *random_tensors(batch, generator, torch.float16))


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


@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs flashinfer-python")
@pytest.mark.parametrize("method", SIGNATURES)
def test_the_record_is_true(method):
    import flashinfer

    real = parameters(getattr(flashinfer.BatchPrefillWithPagedKVCacheWrapper, method))
    assert set(SIGNATURES[method]) <= set(real)


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)[1:]
