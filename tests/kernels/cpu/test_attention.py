"""The CPU's attention against torch's, over every kind of batch that decoders make."""

import pytest
import torch

from specbackend.attention.native import MOST_ROWS, NativeAttention, NativePlan
from specbackend.attention.registry import attention_backend
from specbackend.attention.torch_sdpa import TorchAttention, TorchPlan
from specbackend.batch import ForwardBatch
from specbackend.errors import ConfigError
from specbackend.kernels import cpu
from tests.attention.batches import NUM_SLOTS, chunks, draft_level, level_mask, trees

CPU = torch.device("cpu")
HEADS = [(4, 4, 64), (6, 2, 32), (8, 1, 128), (5, 5, 16), (4, 2, 80)]  # H, G, D


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def batches(generator):
    yield chunks([0], [5], generator)
    yield chunks([3, 17, 0], [4, 1, 7], generator)
    yield chunks([40], [1], generator)
    yield chunks([30], [150], generator)
    yield chunks([7, 0], [60, 41], generator)
    yield chunks([3, 17, 0], [1, 1, 1], generator)
    yield trees([9, 30], 13, generator)
    yield draft_level([5, 12], 4, 3, generator)


def tensors(batch, heads, dtype, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries that stand among other columns, as in the projection they come from, and a layer of a pool."""
    (B, Q), (H, G, D) = batch.token_BQ.shape, heads
    qkv = torch.randn(B * Q, (H + 2 * G) * D, generator=generator).to(dtype)
    kv_S2GD = torch.randn(NUM_SLOTS, 2, G, D, generator=generator).to(dtype)
    return qkv[:, : H * D].view(B, Q, H, D), kv_S2GD


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if actual.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_every_kind_of_batch(heads, dtype, generator):
    for batch in batches(generator):
        q_BQHD, kv_S2GD = tensors(batch, heads, dtype, generator)
        assert_equal(NativePlan(batch).run(q_BQHD, kv_S2GD), TorchPlan(batch, dtype).run(q_BQHD, kv_S2GD))


def test_levels_share_a_plan(dtype, generator):
    batch = draft_level([5, 12], 4, 3, generator)
    q_BQHD, kv_S2GD = tensors(batch, HEADS[0], dtype, generator)
    native, reference = NativePlan(batch), TorchPlan(batch, dtype)
    for level in (1, 2):
        mask_BQW = level_mask(2, 4, 3, level, generator)
        native.set_window_mask(mask_BQW)
        reference.set_window_mask(mask_BQW)
        assert_equal(native.run(q_BQHD, kv_S2GD), reference.run(q_BQHD, kv_S2GD))


def test_what_a_row_may_not_see_does_not_reach_it(generator):
    """Not even as 0 times infinity."""
    batch = trees([9, 30], 13, generator)
    q_BQHD, kv_S2GD = tensors(batch, HEADS[1], torch.float32, generator)
    expected = NativePlan(batch).run(q_BQHD, kv_S2GD)
    seen = {*batch.window_slot_BW.flatten().tolist()}
    for slots, length in zip(batch.prefix_slot_BL.tolist(), batch.prefix_len_B.tolist(), strict=True):
        seen |= {*slots[:length]}
    kv_S2GD[[slot for slot in range(NUM_SLOTS) if slot not in seen]] = torch.nan
    assert torch.equal(NativePlan(batch).run(q_BQHD, kv_S2GD), expected)


def test_scores_that_overflow_if_not_taken_from_the_largest(generator):
    batch = trees([9, 30], 13, generator)
    q_BQHD, kv_S2GD = tensors(batch, HEADS[0], torch.float32, generator)
    q_BQHD[..., 0], kv_S2GD[:, 0, :, 0] = 1024 * q_BQHD.shape[-1] ** 0.5, 1
    actual, expected = (plan.run(q_BQHD, kv_S2GD) for plan in (NativePlan(batch), TorchPlan(batch, torch.float32)))
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3)  # beside 1024 a score is rounded to 2**-14


def test_a_row_does_not_depend_on_other_sequences(generator):
    batch = trees([9, 30], 13, generator)
    q_BQHD, kv_S2GD = tensors(batch, HEADS[0], torch.float32, generator)
    both = NativePlan(batch).run(q_BQHD, kv_S2GD)
    parts = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    for b in range(2):
        alone = type(batch)(**{name: value[b : b + 1] for name, value in parts.items()})
        assert torch.equal(NativePlan(alone).run(q_BQHD[b : b + 1], kv_S2GD), both[b : b + 1])


@pytest.mark.parametrize("prefix_len", [1, 9, 16, 30])
def test_a_node_gets_what_its_token_gets_in_a_sequence(prefix_len, dtype, generator):
    """To the bit: the siblings that it is not shown do not even change how it is rounded."""
    batch = trees([prefix_len], 40, generator)
    q_BQHD, kv_S2GD = tensors(batch, HEADS[1], dtype, generator)
    nodes = NativePlan(batch).run(q_BQHD, kv_S2GD)
    for node, shown in enumerate(batch.window_mask_BQW[0]):
        *path, own = batch.window_slot_BW[0, shown].tolist()
        prefix = torch.cat([batch.prefix_slot_BL[0], torch.tensor(path, dtype=torch.int64)])
        sequence = ForwardBatch(
            token_BQ=batch.token_BQ[:, :1],
            position_BQ=batch.position_BQ[:, :1],
            slot_BQ=torch.tensor([[own]]),
            prefix_slot_BL=prefix[None],
            prefix_len_B=torch.tensor([len(prefix)]),
            window_slot_BW=torch.tensor([[own]]),
            window_mask_BQW=torch.ones(1, 1, 1, dtype=torch.bool),
        )
        assert torch.equal(NativePlan(sequence).run(q_BQHD[:, node : node + 1], kv_S2GD)[0, 0], nodes[0, node])


def test_long_prompts_are_left_to_torch(dtype, generator):
    backend, most = NativeAttention(), MOST_ROWS[dtype]
    assert isinstance(backend.plan(chunks([0], [most], generator), dtype), NativePlan)
    assert isinstance(backend.plan(chunks([0], [most + 1], generator), dtype), TorchPlan)


def test_where_it_serves(monkeypatch):
    assert isinstance(attention_backend("auto", CPU, torch.float32, {64, 128}), NativeAttention)
    assert isinstance(attention_backend("auto", CPU, torch.float32, {64, 24}), TorchAttention)
    assert isinstance(attention_backend("auto", CPU, torch.float16, {64}), TorchAttention)
    with pytest.raises(ConfigError, match=r"attention_backend: native .*\[24, 64\]"):
        attention_backend("native", CPU, torch.float32, {64, 24})
    monkeypatch.setattr(cpu, "compiled", lambda: None)
    assert isinstance(attention_backend("auto", CPU, torch.float32, {64}), TorchAttention)
