"""Logits equal Hugging Face's on random checkpoints of every supported shape, written in every supported format."""

import pytest
import torch

from specbackend import Engine
from specbackend.errors import ConfigError
from specbackend.models.model_config import ModelConfig
from specbackend.request import Request
from specbackend.sampling_params import SamplingParams
from tests.checkpoints import FAMILIES, convert_to_bin, edit_config, edit_tensors, write_target
from tests.models.forward import load_llama, prompt_logits, prompt_output

TOKENS = torch.randint(64, (100,), generator=torch.Generator().manual_seed(0)).tolist()
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}

SHAPES = {
    "GQA": {},
    "MQA": {"num_key_value_heads": 1},
    "MHA": {"num_key_value_heads": 4},
    "wide-heads": {"head_dim": 24},
    "narrow-heads": {"head_dim": 2},
    "tied": {"tie_word_embeddings": True},
    "eps": {"rms_norm_eps": 0.1},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, **LLAMA3}},
    "one-layer": {"num_hidden_layers": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
}
OTHER_SHAPES = [
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 128}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": 4}),
    ("qwen3", {"head_dim": 24}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("mimo", {}),
]


def assert_equals_hf(folder, model) -> None:
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(prompt_logits(folder, TOKENS), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_equal_hf(shape, tmp_path):
    assert_equals_hf(tmp_path, write_target(tmp_path, **shape))


@pytest.mark.parametrize("family, shape", OTHER_SHAPES, ids=lambda value: str(value))
def test_logits_of_other_families_equal_hf(family, shape, tmp_path):
    assert_equals_hf(tmp_path, write_target(tmp_path, family, **shape))


def test_qwen3_heads_are_128_wide_where_the_config_is_silent(tmp_path):
    model = write_target(tmp_path, "qwen3", head_dim=128)
    edit_config(tmp_path, head_dim=None)
    assert_equals_hf(tmp_path, model)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_are_the_inputs_of_the_captured_layers(family, tmp_path):
    model = write_target(tmp_path, family, num_hidden_layers=7)
    hidden_states = model(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states
    expected = torch.cat([hidden_states[k][0] for k in (2, 3, 4)], dim=-1)
    output = prompt_output(tmp_path, TOKENS, captured_layers=(2, 3, 4))
    torch.testing.assert_close(output.feature_TF, expected, atol=1e-4, rtol=1e-4)
    assert prompt_output(tmp_path, TOKENS).feature_TF.shape == output.hidden_TD.shape


WINDOWS = [
    ("mistral", {"sliding_window": 64}, 64),
    ("mistral", {"sliding_window": None}, 128),
    ("mistral", {"sliding_window": 4096}, 128),
    ("qwen2", {"sliding_window": 64, "use_sliding_window": True}, 64),
    ("qwen2", {"sliding_window": 64, "use_sliding_window": False}, 128),
]


@pytest.mark.parametrize("family, window, longest", WINDOWS, ids=str)
def test_context_ends_where_a_sliding_window_would_begin_to_matter(family, window, longest, tmp_path):
    write_target(tmp_path, family)
    edit_config(tmp_path, **window)
    assert Engine(model_path=str(tmp_path), max_total_tokens=200).context_length == longest
    with pytest.raises(ConfigError, match=f"context_length: {longest + 1} is more than the model's {longest}"):
        Engine(model_path=str(tmp_path), context_length=longest + 1)


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_rope_scaling_as_transformers_4_wrote_it(kind, tmp_path):
    model = write_target(tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3})
    edit_config(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling={kind: "llama3", **LLAMA3})
    assert_equals_hf(tmp_path, model)


def test_rope_scaling_changes_these_logits(tmp_path):
    """Else the tests above would pass without it."""
    model = write_target(tmp_path, **SHAPES["llama3"])
    edit_config(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    with pytest.raises(AssertionError, match="not close"):
        assert_equals_hf(tmp_path, model)


def test_sharded_safetensors(tmp_path):
    model = write_target(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_equals_hf(tmp_path, model)


@pytest.mark.parametrize("num_files", [1, 3])
def test_bin(num_files, tmp_path):
    model = write_target(tmp_path)
    convert_to_bin(tmp_path, num_files)
    assert_equals_hf(tmp_path, model)


def test_tied_checkpoint_that_stores_the_head_anyway(tmp_path):
    model = write_target(tmp_path, tie_word_embeddings=True)
    edit_tensors(tmp_path, lm_head__weight=model.lm_head.weight.detach().clone())
    assert_equals_hf(tmp_path, model)


def test_old_exports_with_inv_freq(tmp_path):
    model = write_target(tmp_path)
    edit_tensors(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    assert_equals_hf(tmp_path, model)


def greedy(engine: Engine, prompt: list[int], count: int) -> list[int]:
    engine.submit(Request("a", prompt, SamplingParams(temperature=0, max_new_tokens=count)))
    tokens = []
    while engine.has_work:
        for update in engine.step():
            tokens += update.token_ids
    return tokens


def hf_greedy(model, prompt: list[int], count: int) -> list[int]:
    everything = torch.ones(1, len(prompt), dtype=torch.int64)  # else generate hides tokens that equal the padding
    output = model.generate(
        torch.tensor([prompt]), attention_mask=everything, do_sample=False, max_new_tokens=count, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("shape", ["GQA", "wide-heads", "llama3", "biases"])
def test_engine_decodes_as_hf(shape, tmp_path):
    model = write_target(tmp_path, **SHAPES[shape])
    engine = Engine(model_path=str(tmp_path), chunked_prefill_size=7, max_total_tokens=400)
    for prompt in (TOKENS[:50], TOKENS[:60], TOKENS[:1]):  # the second reuses what the first computed
        assert greedy(engine, prompt, 40) == hf_greedy(model, prompt, 40)


UNSUPPORTED = [
    ("architectures", ["GPT2LMHeadModel"], "architecture GPT2LMHeadModel is not served; served are Llama"),
    ("hidden_act", "gelu", "hidden_act='gelu'"),
    ("rope_parameters", {"rope_type": "yarn", "factor": 2.0}, "rope scaling 'yarn'"),
    ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope scaling 'linear'"),
]


@pytest.mark.parametrize("name, value, complaint", UNSUPPORTED, ids=[name for name, _, _ in UNSUPPORTED])
def test_unsupported_configs_are_refused(name, value, complaint, tmp_path):
    write_target(tmp_path)
    edit_config(tmp_path, **{name: value})
    with pytest.raises(ConfigError, match=complaint) as refusal:
        load_llama(tmp_path)
    assert str(tmp_path) in str(refusal.value)


def test_no_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match=r"config.json is missing"):
        ModelConfig.read(tmp_path / "nothing")


def test_incomplete_config_lists_all_that_is_missing(tmp_path):
    write_target(tmp_path)
    edit_config(tmp_path, hidden_size=None, num_hidden_layers=None)
    with pytest.raises(ConfigError, match="hidden_size, num_hidden_layers missing"):
        ModelConfig.read(tmp_path)


@pytest.mark.parametrize("config, generation, expected", [(5, None, (5,)), ([5, 6], None, (5, 6)), (5, [7, 8], (7, 8))])
def test_eos_ids_as_generate_reads_them(config, generation, expected, tmp_path):
    write_target(tmp_path)
    edit_config(tmp_path, eos_token_id=config)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": %s}' % (generation or "null"))
    assert ModelConfig.read(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize(
    "name, value", [("torch_dtype", "bfloat16"), ("dtype", "bfloat16"), ("dtype", "torch.bfloat16")]
)
def test_dtype_under_its_old_and_new_name(name, value, tmp_path):
    write_target(tmp_path)
    edit_config(tmp_path, **{"torch_dtype": None, "dtype": None, name: value})
    assert ModelConfig.read(tmp_path).torch_dtype == "bfloat16"
