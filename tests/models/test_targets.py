"""Logits equal Hugging Face's on random checkpoints of every supported shape, written in every supported format."""

import pytest
import torch

from specbackend import Engine
from specbackend.errors import ConfigError
from specbackend.models.model_config import ModelConfig
from specbackend.request import Request, SamplingParams
from tests.checkpoints import convert_to_bin, edit_config, edit_tensors, write_eagle3_head, write_llama
from tests.models.forward import load_llama, prompt_logits

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
}


def assert_equals_hf(folder, model) -> None:
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(prompt_logits(folder, TOKENS), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_equal_hf(shape, tmp_path):
    assert_equals_hf(tmp_path, write_llama(tmp_path, **shape))


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_rope_scaling_as_transformers_4_wrote_it(kind, tmp_path):
    model = write_llama(tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3})
    edit_config(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling={kind: "llama3", **LLAMA3})
    assert_equals_hf(tmp_path, model)


def test_rope_scaling_changes_these_logits(tmp_path):
    """Else the tests above would pass without it."""
    model = write_llama(tmp_path, **SHAPES["llama3"])
    edit_config(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    with pytest.raises(AssertionError, match="not close"):
        assert_equals_hf(tmp_path, model)


def test_sharded_safetensors(tmp_path):
    model = write_llama(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_equals_hf(tmp_path, model)


@pytest.mark.parametrize("num_files", [1, 3])
def test_bin(num_files, tmp_path):
    model = write_llama(tmp_path)
    convert_to_bin(tmp_path, num_files)
    assert_equals_hf(tmp_path, model)


def test_tied_checkpoint_that_stores_the_head_anyway(tmp_path):
    model = write_llama(tmp_path, tie_word_embeddings=True)
    edit_tensors(tmp_path, lm_head__weight=model.lm_head.weight.detach().clone())
    assert_equals_hf(tmp_path, model)


def test_old_exports_with_inv_freq(tmp_path):
    model = write_llama(tmp_path)
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


@pytest.mark.parametrize(
    "shape", [SHAPES["GQA"], SHAPES["wide-heads"], SHAPES["llama3"]], ids=["GQA", "wide", "llama3"]
)
def test_engine_decodes_as_hf(shape, tmp_path):
    model = write_llama(tmp_path, **shape)
    engine = Engine(model_path=str(tmp_path), chunked_prefill_size=7, max_total_tokens=400)
    for prompt in (TOKENS[:50], TOKENS[:60], TOKENS[:1]):  # the second reuses what the first computed
        assert greedy(engine, prompt, 40) == hf_greedy(model, prompt, 40)


HEADS = {
    "full-vocabulary": {},
    "d2t": {"draft_vocab_size": 40},
    "other-heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12, "intermediate_size": 20},
    "theta": {"rope_theta": 500.0},
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_engine_decodes_as_hf_with_a_random_draft(head, tmp_path):
    model = write_llama(tmp_path / "target", num_hidden_layers=7)
    write_eagle3_head(tmp_path / "draft", model.config, **head)
    engine = Engine(
        model_path=str(tmp_path / "target"),
        speculative_algorithm="EAGLE3",
        speculative_draft_model_path=str(tmp_path / "draft"),
        max_total_tokens=400,
    )
    for prompt in (TOKENS[:50], TOKENS[:60], TOKENS[:1]):
        assert greedy(engine, prompt, 40) == hf_greedy(model, prompt, 40)


UNSUPPORTED = [
    ("architectures", ["GPT2LMHeadModel"], "architecture GPT2LMHeadModel is not served; served are Llama"),
    ("hidden_act", "gelu", "hidden_act='gelu'"),
    ("rope_parameters", {"rope_type": "yarn", "factor": 2.0}, "rope scaling 'yarn'"),
    ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope scaling 'linear'"),
]


@pytest.mark.parametrize("name, value, complaint", UNSUPPORTED, ids=[name for name, _, _ in UNSUPPORTED])
def test_unsupported_configs_are_refused(name, value, complaint, tmp_path):
    write_llama(tmp_path)
    edit_config(tmp_path, **{name: value})
    with pytest.raises(ConfigError, match=complaint) as refusal:
        load_llama(tmp_path)
    assert str(tmp_path) in str(refusal.value)


def test_no_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match=r"config.json is missing"):
        ModelConfig.read(tmp_path / "nothing")


def test_incomplete_config_lists_all_that_is_missing(tmp_path):
    write_llama(tmp_path)
    edit_config(tmp_path, hidden_size=None, num_hidden_layers=None)
    with pytest.raises(ConfigError, match="hidden_size, num_hidden_layers missing"):
        ModelConfig.read(tmp_path)


@pytest.mark.parametrize("config, generation, expected", [(5, None, (5,)), ([5, 6], None, (5, 6)), (5, [7, 8], (7, 8))])
def test_eos_ids_as_generate_reads_them(config, generation, expected, tmp_path):
    write_llama(tmp_path)
    edit_config(tmp_path, eos_token_id=config)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": %s}' % (generation or "null"))
    assert ModelConfig.read(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize(
    "name, value", [("torch_dtype", "bfloat16"), ("dtype", "bfloat16"), ("dtype", "torch.bfloat16")]
)
def test_dtype_under_its_old_and_new_name(name, value, tmp_path):
    write_llama(tmp_path)
    edit_config(tmp_path, **{"torch_dtype": None, "dtype": None, name: value})
    assert ModelConfig.read(tmp_path).torch_dtype == "bfloat16"
