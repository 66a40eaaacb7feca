"""What decoders say of their windows must be true: a backend that believes it reads no mask."""

import pytest
import torch

from specbackend.attention.torch_sdpa import TorchAttention
from specbackend.engine import Engine
from specbackend.runner import causal_mask
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET

EAGLE3 = {
    "speculative_adaptive": False,
    "speculative_algorithm": "EAGLE3",
    "speculative_draft_model_path": str(DEMO_EAGLE3),
}


@pytest.mark.parametrize("speculative", [{}, EAGLE3], ids=["plain", "EAGLE3"])
def test_windows_that_are_called_causal(monkeypatch, demo_prompts, speculative):
    planned, real_plan = [], TorchAttention.plan
    monkeypatch.setattr(
        TorchAttention, "plan", lambda self, batch, dtype: (planned.append(batch), real_plan(self, batch, dtype))[1]
    )
    engine = Engine(
        model_path=str(DEMO_TARGET), device="cpu", max_total_tokens=2048, attention_backend="torch", **speculative
    )
    engine.generate(
        input_ids=[prompt[:length] for prompt, length in zip(demo_prompts, (20, 33), strict=False)],
        sampling_params={"max_new_tokens": 6, "temperature": 0},
    )
    causal = [batch for batch in planned if batch.window_is_causal]
    for batch in causal:
        _, Q, W = batch.window_mask_BQW.shape
        assert Q == W and torch.equal(batch.window_mask_BQW, causal_mask(Q, "cpu").expand_as(batch.window_mask_BQW))
    if speculative:
        assert any(not batch.window_is_causal for batch in planned)
    else:
        assert causal == planned, "a prompt, or a row that sees itself: always causal"
