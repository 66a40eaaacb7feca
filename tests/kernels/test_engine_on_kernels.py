"""The whole engine on the kernels: what it decodes is what it decodes in plain torch."""

import pytest

from specbackend import Engine
from specbackend.attention.triton_tree import TritonAttention
from specbackend.config import TREE
from tests.checkpoints import write_head, write_target, write_tokenizer

PROMPTS = [[5, 9, 2, 33, 17, 60, 41], [8, 1, 12]]
PARAMS = [
    {"temperature": 0, "max_new_tokens": 7},
    {"temperature": 1.0, "seed": 3, "max_new_tokens": 5, "return_spec_trace": True},
]
LIMITED = [
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 8, "max_new_tokens": 6},
    {"temperature": 1.5, "min_p": 0.1, "seed": 9, "max_new_tokens": 5},
]


def traced_steps(answers: list[dict]) -> list[dict]:
    """Those with trees."""
    return [step for answer in answers for step in answer["meta_info"].get("spec_trace", []) if "tree" in step]


def assert_kernels_equal_torch(engine_params: dict, sampling_params: list[dict], request) -> None:
    """In what is said and in how many steps."""
    engine = Engine(**engine_params, attention_backend="torch")
    expected = engine.generate(input_ids=PROMPTS, sampling_params=sampling_params)
    request.getfixturevalue("on_kernels")
    engine = Engine(**engine_params)
    assert isinstance(engine.plain.runner._forward.attention, TritonAttention)
    answers = engine.generate(input_ids=PROMPTS, sampling_params=sampling_params)
    assert [a["output_ids"] for a in answers] == [a["output_ids"] for a in expected]
    steps = [[a["meta_info"]["spec_verify_ct"] for a in each] for each in (answers, expected)]
    assert steps[0] == steps[1]
    for step, other in zip(*(traced_steps(each) for each in (answers, expected)), strict=True):
        for name in ("parents", "token_ids"):
            assert step["tree"][name] == other["tree"][name]
        for name in ("draft_logprobs", "target_logprobs"):
            assert step["tree"][name] == pytest.approx(other["tree"][name], abs=1e-4)


@pytest.mark.parametrize("family", ["mimo", "qwen3"])  # an MTP layer and biases; norms of heads
def test_engine_on_kernels_equals_torch(family, tmp_path, request):
    write_target(tmp_path, family, head_dim=16)
    write_tokenizer(tmp_path)
    params = {"model_path": str(tmp_path), "chunked_prefill_size": 4}
    if family == "mimo":
        params |= {"speculative_adaptive": False, "speculative_algorithm": "NEXTN"} | dict(
            zip(TREE, (3, 2, 5), strict=True)
        )
    assert_kernels_equal_torch(params, PARAMS, request)


@pytest.mark.parametrize("sampling_params", [PARAMS, LIMITED], ids=["temperature", "limits"])
def test_sampled_drafts_of_another_vocabulary(sampling_params, tmp_path, request):
    """Of an EAGLE-3 head whose tokens have other ids than the target's: the noise goes by the target's."""
    config = write_target(tmp_path / "target", head_dim=16).config
    write_tokenizer(tmp_path / "target")
    last_hidden = {"options": {"num_features": 0}, "eagle_config": {"use_aux_hidden_state": False}}
    write_head(tmp_path / "head", "EAGLE3", config, draft_vocab_size=40, **last_hidden)
    paths = {"model_path": str(tmp_path / "target"), "speculative_draft_model_path": str(tmp_path / "head")}
    params = (
        {"speculative_adaptive": False, "speculative_algorithm": "EAGLE3"}
        | paths
        | dict(zip(TREE, (3, 2, 5), strict=True))
    )
    assert_kernels_equal_torch(params, sampling_params, request)
