"""The whole engine on the kernels: what it decodes is what it decodes in plain torch."""

import pytest

from specbackend import Engine, kernels
from specbackend.attention.triton_tree import TritonAttention
from specbackend.models.operators import operators
from tests.checkpoints import write_target, write_tokenizer

TREE = ("speculative_num_steps", "speculative_eagle_topk", "speculative_num_draft_tokens")
PROMPTS = [[5, 9, 2, 33, 17, 60, 41], [8, 1, 12]]
PARAMS = [{"temperature": 0, "max_new_tokens": 7}, {"temperature": 1.0, "seed": 3, "max_new_tokens": 5}]


@pytest.fixture
def on_kernels(monkeypatch):
    """Here they run in the interpreter."""
    monkeypatch.setattr(kernels, "run_on", lambda device: True)
    operators.cache_clear()
    yield
    operators.cache_clear()


@pytest.mark.parametrize("family", ["mimo", "qwen3"])  # an MTP layer and biases; norms of heads
def test_engine_on_kernels_equals_torch(family, tmp_path, request):
    write_target(tmp_path, family, head_dim=16)
    write_tokenizer(tmp_path)
    params = {"model_path": str(tmp_path), "chunked_prefill_size": 4}
    if family == "mimo":
        params |= {"speculative_algorithm": "NEXTN"} | dict(zip(TREE, (3, 2, 5), strict=True))
    torch_engine = Engine(**params, attention_backend="torch")
    expected = torch_engine.generate(input_ids=PROMPTS, sampling_params=PARAMS)
    request.getfixturevalue("on_kernels")
    engine = Engine(**params)
    assert isinstance(engine.plain.runner.attention, TritonAttention)
    answers = engine.generate(input_ids=PROMPTS, sampling_params=PARAMS)
    assert [a["output_ids"] for a in answers] == [a["output_ids"] for a in expected]
    steps = [[a["meta_info"]["spec_verify_ct"] for a in each] for each in (answers, expected)]
    assert steps[0] == steps[1]
