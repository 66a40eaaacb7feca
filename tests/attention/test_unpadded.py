"""Prompts side by side: networks compute the rows that are no padding, and nothing changes for these."""

from types import SimpleNamespace

import pytest
import torch

from specbackend import Engine
from specbackend.attention.native import NativeAttention
from specbackend.attention.torch_sdpa import TorchAttention
from specbackend.attention.unpadded import run_unpadded
from specbackend.models.native import NativeLlama
from specbackend.runner import text_forward_batch
from tests.attention.batches import NUM_SLOTS, chunks
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET

GREEDY = {"temperature": 0, "max_new_tokens": 8}
EAGLE3 = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(DEMO_EAGLE3)}


@pytest.mark.parametrize("backend", [TorchAttention(), NativeAttention()], ids=["torch", "native"])
def test_rows_are_what_they_are_in_the_padded_batch(backend):
    generator, lengths = torch.Generator().manual_seed(0), [4, 1, 7]
    batch = chunks([3, 17, 0], lengths, generator)
    Q = batch.token_BQ.shape[1]
    row_T = torch.tensor([b * Q + i for b, length in enumerate(lengths) for i in range(length)])
    batch = type(batch)(**{**vars(batch), "row_T": row_T, "token_BQ": torch.arange(3 * Q).view(3, Q)})
    qkv_TE = torch.randn(3 * Q, 6 * 32, generator=generator)
    kv_S2GD = torch.randn(NUM_SLOTS, 2, 1, 32, generator=generator)
    plan, seen = backend.plan(batch, torch.float32), []

    def forward(rows, hidden_TD, plan):
        seen.append(rows)
        q_1THD = qkv_TE[rows.token_BQ[0]][:, : 4 * 32].view(*rows.token_BQ.shape, 4, 32)
        return (plan.run(q_1THD, kv_S2GD)[0],)

    (unpadded,) = run_unpadded(forward, batch, None, plan)
    padded = plan.run(qkv_TE[:, : 4 * 32].view(3, Q, 4, 32), kv_S2GD).flatten(0, 1)
    torch.testing.assert_close(unpadded[row_T], padded[row_T])
    others = [row for row in range(3 * Q) if row not in row_T.tolist()]
    assert not unpadded[others].any()
    (rows,) = seen
    assert torch.equal(rows.slot_BQ[0], batch.slot_BQ.flatten()[row_T]) and rows.position_BQ.shape == (1, sum(lengths))


@pytest.mark.parametrize("speculative", [{}, EAGLE3], ids=["plain", "EAGLE3"])
def test_no_network_sees_padding(speculative, demo_prompts, monkeypatch):
    prompts = [prompt[:length] for prompt, length in zip(demo_prompts, (40, 10, 25), strict=False)]
    engine = Engine(model_path=str(DEMO_TARGET), max_total_tokens=4096, disable_radix_cache=True, **speculative)
    alone = [engine.generate(input_ids=prompt, sampling_params=GREEDY)["output_ids"] for prompt in prompts]
    widths, forward = [], NativeLlama.forward
    monkeypatch.setattr(
        NativeLlama,
        "forward",
        lambda self, batch, *rest: (widths.append(batch.token_BQ.shape), forward(self, batch, *rest))[1],
    )
    together = engine.generate(input_ids=prompts, sampling_params=GREEDY)
    assert [answer["output_ids"] for answer in together] == alone
    assert widths[0] == (1, 75)


@pytest.mark.parametrize("lengths, unpadded", [([20], False), ([20, 20, 19], False), ([20, 15], True), ([20, 1], True)])
def test_when_it_is_worth_it(lengths, unpadded, demo_prompts):
    engine = Engine(model_path=str(DEMO_TARGET), max_total_tokens=4096)
    requests = [SimpleNamespace(row=b, all_ids=demo_prompts[b], num_computed=0) for b in range(len(lengths))]
    batch = text_forward_batch(engine.plain.runner, requests, [0] * len(lengths), lengths)
    assert (batch.row_T is not None) == unpadded
    if unpadded:
        assert batch.row_T.tolist() == [b * 20 + i for b, length in enumerate(lengths) for i in range(length)]
