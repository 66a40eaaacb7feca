"""A draft head is the same network however it was published: drafts equal those of the reference on the official file.

The numbers in brackets are those of the checklist of what published heads do (names, biases, RoPE, vocabulary, ...).
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specbackend import Engine
from specbackend.errors import ConfigError
from specbackend.models.layers import rope_table
from specbackend.models.model_config import ModelConfig
from tests.checkpoints import convert_to_bin, edit_config, edit_tensors, rename_tensors, write_head, write_target
from tests.models.forward import CPU, load_llama
from tests.models.heads import TOKENS, Target, assert_drafts_as, drafts, load_head

AUX = "eagle_aux_hidden_state_layer_ids"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
both_kinds = pytest.mark.parametrize("kind", ["EAGLE", "EAGLE3"])


def write_twice(folder: Path, target: Target, kind: str, **head) -> tuple[Path, Path]:
    """A head in the official format, and a copy to be written in another one."""
    for name in ("official", "other"):
        write_head(folder / name, kind, target.hf.config, **head)
    return folder / "official", folder / "other"


# ---- (2) names ----

LAYER_NAMES = {
    "layers.0": lambda name: name.replace("midlayer.", "layers.0."),
    "midlayer.0": lambda name: name.replace("midlayer.", "midlayer.0."),
    "model": lambda name: f"model.{name}",
    "model.layers.0": lambda name: f"model.{name.replace('midlayer.', 'layers.0.')}",
    "model but not its heads": lambda name: name if name.startswith(("lm_head", "d2t", "t2d")) else f"model.{name}",
}


@pytest.mark.parametrize("rename", LAYER_NAMES.values(), ids=LAYER_NAMES)
@both_kinds
def test_prefixes(kind, rename, target, tmp_path):
    vocabulary = {"draft_vocab_size": 40} if kind == "EAGLE3" else {}
    official, other = write_twice(tmp_path, target, kind, options={"own_embedding": True}, **vocabulary)
    rename_tensors(other, rename)
    assert_drafts_as(target, kind, other, official)


# ---- (3, 8) biases ----


@pytest.mark.parametrize("says", [None, True, False], ids="config={}".format)
@pytest.mark.parametrize("stored", [True, False], ids="file={}".format)
@both_kinds
def test_fc_bias_is_there_if_the_file_has_it(kind, stored, says, target, tmp_path):
    write_head(tmp_path, kind, target.hf.config, bias=says)
    edit_tensors(tmp_path, fc__bias=torch.linspace(-1, 1, 32) if stored else None)
    assert (load_head(target, kind, tmp_path).fc.bias_E is not None) == stored
    assert_drafts_as(target, kind, tmp_path)


@pytest.mark.parametrize("says", [None, True, False], ids="config={}".format)
@pytest.mark.parametrize("stored", [(), ("qkv",), ("output",), ("mlp",), ("qkv", "output", "mlp")], ids="+".join)
@both_kinds
def test_biases_of_the_layer_are_those_in_the_file(kind, stored, says, target, tmp_path):
    biases = {f"{name}_bias": True for name in stored}
    write_head(tmp_path, kind, target.hf.config, options=biases, attention_bias=says, qkv_bias=says, mlp_bias=says)
    assert_drafts_as(target, kind, tmp_path)


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen2ForCausalLMEagle", "Qwen3ForCausalLM"])
def test_architecture_of_the_head_implies_no_bias_and_no_norm(architecture, target, tmp_path):
    write_head(tmp_path, "EAGLE", target.hf.config, architectures=[architecture])
    assert_drafts_as(target, "EAGLE", tmp_path)


def test_norms_over_query_and_key_are_those_in_the_file(target, tmp_path, caplog):
    """As in a head made of a Qwen3 layer. What they compute is compared for Qwen3 targets."""
    write_head(tmp_path, "EAGLE3", target.hf.config)
    norms = {f"midlayer__self_attn__{name}_norm__weight": torch.full((8,), 2.0) for name in "qk"}
    plain = drafts(target, load_head(target, "EAGLE3", tmp_path))
    edit_tensors(tmp_path, **norms)
    normed = drafts(target, load_head(target, "EAGLE3", tmp_path))
    assert not torch.allclose(plain[0], normed[0], atol=0.1)
    assert not caplog.records


# ---- (4) RoPE ----

LLAMA3_SPELLINGS = {
    "rope_type": {"rope_theta": 700.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "type": {"rope_theta": 700.0, "rope_scaling": {"type": "llama3", **LLAMA3}},
    "rope_parameters": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 700.0, **LLAMA3}},
    "both": {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 700.0, **LLAMA3},
        "rope_theta": 700.0,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
    },
}


@pytest.mark.parametrize("config, theta", [({}, 10000.0), ({"rope_theta": 700.0}, 700.0)], ids=["default", "own"])
@both_kinds
def test_rope_theta_is_the_heads(kind, config, theta, target, tmp_path):
    """Not the target's, which is another here: official configs are silent and mean the default."""
    assert target.model.config.rope_theta not in (theta, 10000.0)
    write_head(tmp_path, kind, target.hf.config, **config)
    assert load_head(target, kind, tmp_path).config.rope_theta == theta
    assert_drafts_as(target, kind, tmp_path)


@pytest.mark.parametrize("config", LLAMA3_SPELLINGS.values(), ids=LLAMA3_SPELLINGS)
@both_kinds
def test_rope_scaling_in_every_spelling(kind, config, target, tmp_path):
    """`rope_table` itself is compared with Hugging Face's on targets."""
    write_target(tmp_path / "llama3", rope_parameters={"rope_type": "llama3", "rope_theta": 700.0, **LLAMA3})
    expected = rope_table(ModelConfig.read(tmp_path / "llama3"), 128, CPU)
    write_head(tmp_path / "head", kind, target.hf.config, **config)
    torch.testing.assert_close(load_head(target, kind, tmp_path / "head").rope, expected)


@pytest.mark.parametrize("name", sorted(LLAMA3))
def test_incomplete_rope_scaling_is_named(name, target, tmp_path):
    scaling = {"rope_type": "llama3", **LLAMA3}
    del scaling[name]
    write_head(tmp_path, "EAGLE3", target.hf.config, rope_scaling=scaling)
    with pytest.raises(ConfigError, match=rf"config.json: rope scaling 'llama3' without {name}"):
        load_head(target, "EAGLE3", tmp_path)


@both_kinds
def test_rope_table_is_as_long_as_the_target_needs(kind, target, tmp_path):
    """Whatever max_position_embeddings the head was trained with: the rows after it would be read out of range."""
    write_head(tmp_path, kind, target.hf.config, max_position_embeddings=16)
    head = load_head(target, kind, tmp_path, num_positions=135)
    assert len(head.rope) == 135
    assert len(TOKENS) > 16
    assert_drafts_as(target, kind, tmp_path)


# ---- (5) the head's own vocabulary ----


@pytest.mark.parametrize("config", [{}, {"draft_vocab_size": None}, {"draft_vocab_size": 64}], ids=str)
@pytest.mark.parametrize("maps", [(), ("d2t",), ("d2t", "t2d"), ("t2d",)], ids="+".join)
def test_full_vocabulary(maps, config, target, tmp_path):
    write_head(tmp_path, "EAGLE3", target.hf.config, **config)
    all_maps = {"d2t": torch.zeros(64, dtype=torch.int64), "t2d": torch.ones(64, dtype=torch.bool)}
    edit_tensors(tmp_path, **{name: all_maps[name] for name in maps})
    assert load_head(target, "EAGLE3", tmp_path).vocabulary.target_id_W.tolist() == list(range(64))
    assert_drafts_as(target, "EAGLE3", tmp_path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("with_t2d", [True, False])
def test_d2t_holds_offsets(with_t2d, dtype, target, tmp_path):
    tensors = write_head(tmp_path, "EAGLE3", target.hf.config, draft_vocab_size=40)
    edit_tensors(tmp_path, d2t=tensors["d2t"].to(dtype), t2d=tensors["t2d"] if with_t2d else None)
    vocabulary = load_head(target, "EAGLE3", tmp_path).vocabulary
    assert vocabulary.target_id_W.tolist() == tensors["t2d"].nonzero().flatten().tolist()
    assert vocabulary.target_id_W.dtype == torch.int64
    assert_drafts_as(target, "EAGLE3", tmp_path)


BAD_D2T = {
    "too high": torch.arange(40) * 0 + 25,
    "negative": torch.arange(40) * 0 - 1,
    "repeats": torch.arange(40).flip(0) - torch.arange(40) // 2,
    "wrong length": torch.arange(39),
    "floats": torch.zeros(40),
}


@pytest.mark.parametrize("d2t", BAD_D2T.values(), ids=BAD_D2T)
def test_bad_d2t(d2t, target, tmp_path):
    write_head(tmp_path, "EAGLE3", target.hf.config, draft_vocab_size=40)
    edit_tensors(tmp_path, d2t=d2t)
    with pytest.raises(ConfigError, match=r"d2t is \[39\].* \[40\]|d2t maps to .* not 40 distinct ids .* 64$"):
        load_head(target, "EAGLE3", tmp_path)


def test_full_vocabulary_in_another_order(target, tmp_path):
    """The target's LM head would not fit then."""
    write_head(tmp_path, "EAGLE3", target.hf.config)
    edit_tensors(tmp_path, d2t=63 - 2 * torch.arange(64))
    assert_drafts_as(target, "EAGLE3", tmp_path)
    edit_tensors(tmp_path, lm_head__weight=None)
    with pytest.raises(ConfigError, match=r"missing tensors: lm_head.weight$"):
        load_head(target, "EAGLE3", tmp_path)


def test_reduced_vocabulary_without_d2t(target, tmp_path):
    write_head(tmp_path, "EAGLE3", target.hf.config, draft_vocab_size=40)
    edit_tensors(tmp_path, d2t=None)
    with pytest.raises(ConfigError, match="draft_vocab_size is 40, the target has 64, and d2t is missing"):
        load_head(target, "EAGLE3", tmp_path)


# ---- (6) what a head shares with its target ----


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("maps", [{}, {"d2t": torch.zeros(64, dtype=torch.int64)}], ids=["", "d2t"])
def test_head_without_lm_head_has_the_targets(maps, tied, tmp_path):
    """A tied target has no lm_head.weight in its own file either."""
    hf = write_target(tmp_path / "target", num_hidden_layers=7, tie_word_embeddings=tied)
    assert ("lm_head.weight" in load_file(tmp_path / "target" / "model.safetensors")) != tied
    official, other = tmp_path / "official", tmp_path / "other"
    write_head(official, "EAGLE3", hf.config)
    write_head(other, "EAGLE3", hf.config)
    edit_tensors(official, lm_head__weight=hf.lm_head.weight.detach().clone())
    edit_tensors(other, lm_head__weight=None, **maps)
    target = Target(tmp_path / "target", hf, load_llama(tmp_path / "target"))
    assert load_head(target, "EAGLE3", other).vocabulary.lm_head is target.model.lm_head
    assert_drafts_as(target, "EAGLE3", other, official)


@pytest.mark.parametrize(
    "config, options",
    [({"draft_vocab_size": 40}, {}), ({"hidden_size": 16, "target_hidden_size": 32}, {"own_embedding": True})],
    ids=["vocabulary", "width"],
)
def test_head_without_lm_head_that_the_targets_does_not_fit(config, options, target, tmp_path):
    write_head(tmp_path, "EAGLE3", target.hf.config, options=options, **config)
    edit_tensors(tmp_path, lm_head__weight=None)
    with pytest.raises(ConfigError, match=r"missing tensors: lm_head.weight$"):
        load_head(target, "EAGLE3", tmp_path)


def test_eagle_head_drafts_with_the_targets_lm_head_even_if_it_brings_one(target, tmp_path, caplog):
    official, other = write_twice(tmp_path, target, "EAGLE")
    edit_tensors(other, lm_head__weight=torch.randn(64, 32))
    assert load_head(target, "EAGLE", other).vocabulary.lm_head is target.model.lm_head
    assert_drafts_as(target, "EAGLE", other, official)
    assert not caplog.records


@pytest.mark.parametrize("own", [True, False], ids=["own", "target's"])
@both_kinds
def test_embedding(kind, own, target, tmp_path):
    write_head(tmp_path, kind, target.hf.config, options={"own_embedding": own})
    assert (load_head(target, kind, tmp_path).embed_tokens is target.model.embed_tokens) != own
    assert_drafts_as(target, kind, tmp_path)


# ---- (7, 8, 9) options of EAGLE-3 ----

OPTIONS = {  # what the file has, what the config says
    "top-level aux layers": ({}, {AUX: [1, 4, 6]}),
    "nested aux layers": ({}, {"eagle_config": {AUX: [0, 3, 5]}}),
    "aux layers from the embedding on": ({}, {AUX: [0, 1, 2]}),
    "two aux layers": ({"num_features": 2}, {AUX: [1, 6]}),
    "four aux layers": ({"num_features": 4}, {"eagle_config": {AUX: [0, 1, 3, 5]}}),
    "one aux layer, as wide as the head": ({"num_features": 1}, {AUX: [3]}),
    "head_dim": ({}, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12}),
    "narrow": ({"own_embedding": True}, {"hidden_size": 24, "target_hidden_size": 32}),
    "wide": ({"own_embedding": True}, {"hidden_size": 48, "target_hidden_size": 32}),
    "target_hidden_size of the same width": ({}, {"target_hidden_size": 32}),
    "norm_before_residual": ({}, {"norm_before_residual": True}),
    "fc_norm": ({"fc_norm": True}, {"fc_norm": True}),
    "fc_norm, which the config forgot": ({"fc_norm": True}, {}),
    "fc_norm of four": ({"fc_norm": True, "num_features": 4}, {AUX: [0, 2, 3, 6]}),
    "norm_before_fc": ({"norm_before_fc": True}, {"norm_before_fc": True}),
    "norm_before_fc, which the config forgot": ({"norm_before_fc": True}, {}),
    "norm_output": ({}, {"norm_output": True}),
    "3.1": ({"fc_norm": True}, {"fc_norm": True, "norm_output": True}),
    "final hidden state": ({"num_features": 0}, {"use_aux_hidden_state": False}),
    "final hidden state, nested": ({"num_features": 0}, {"eagle_config": {"use_aux_hidden_state": False}}),
    "num_hidden_layers is wrong": ({}, {"num_hidden_layers": 36}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, target, tmp_path, caplog):
    options, config = OPTIONS[name]
    write_head(tmp_path, "EAGLE3", target.hf.config, options=options, draft_vocab_size=40, **config)
    assert_drafts_as(target, "EAGLE3", tmp_path)
    assert not caplog.records


def test_both_conventions_name_the_same_layers(target, tmp_path):
    official, other = write_twice(tmp_path, target, "EAGLE3")
    edit_config(official, **{AUX: [1, 3, 6]})
    edit_config(other, eagle_config={AUX: [0, 2, 5]})
    assert_drafts_as(target, "EAGLE3", other, official)


@pytest.mark.parametrize("config", [{}, {"fc_norm": True}, {"use_aux_norm": True}], ids=str)
def test_names_of_the_norms_before_fc_in_sglang(config, target, tmp_path):
    official, other = write_twice(tmp_path, target, "EAGLE3", options={"fc_norm": True}, **config)
    sglang = {"fc_norm.0": "aux_norm_low", "fc_norm.1": "aux_norm_mid", "fc_norm.2": "aux_norm_high"}
    rename_tensors(other, lambda name: name.replace(key := name.rpartition(".")[0], sglang.get(key, key)))
    assert "aux_norm_mid.weight" in load_file(other / "model.safetensors")
    assert_drafts_as(target, "EAGLE3", other, official)


NORMS = {  # what the config says, what the file has lost, what is said to be missing
    "fc_norm": ({"fc_norm": True}, {}, "fc_norm.0.weight, fc_norm.1.weight, fc_norm.2.weight"),
    "use_aux_norm": ({"use_aux_norm": True}, {}, "fc_norm.0.weight, fc_norm.1.weight, fc_norm.2.weight"),
    "norm_before_fc": ({"norm_before_fc": True}, {}, "input_norm.weight"),
    "the first of three": ({}, {"fc_norm": True}, "fc_norm.0.weight"),
}


@pytest.mark.parametrize("name", NORMS)
def test_missing_norms_before_fc(name, target, tmp_path):
    """Without one that it was trained with, a head would draft, and nothing would be accepted."""
    config, options, missing = NORMS[name]
    write_head(tmp_path, "EAGLE3", target.hf.config, options=options, **config)
    edit_tensors(tmp_path, fc_norm__0__weight=None)
    with pytest.raises(ConfigError, match=f"missing tensors: {missing}$"):
        load_head(target, "EAGLE3", tmp_path)


def test_fc_where_the_config_says_that_there_is_none(target, tmp_path, caplog):
    """It cannot be meant: the final hidden state is one feature, and as wide as the head."""
    official, other = write_twice(
        tmp_path, target, "EAGLE3", options={"num_features": 0}, eagle_config={"use_aux_hidden_state": False}
    )
    edit_tensors(other, fc__weight=torch.randn(32, 96))
    assert_drafts_as(target, "EAGLE3", other, official)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "tensors of an unknown kind are ignored: fc.weight"
    ]


# ---- whole formats ----


def as_bin(folder: Path) -> None:
    convert_to_bin(folder)


def as_sglang(folder: Path) -> None:
    """Its re-uploads say which class is to be used; it drops the LM head of an EAGLE-1/2 head."""
    is_eagle3 = "norm.weight" in load_file(folder / "model.safetensors")
    edit_config(folder, architectures=["LlamaForCausalLMEagle3" if is_eagle3 else "LlamaForCausalLMEagle"])


def as_specforge(folder: Path) -> None:
    """Both spellings of RoPE, bfloat16, both maps even where they say nothing."""
    raw = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_theta": 10000.0}
    edit_config(folder, architectures=["LlamaForCausalLMEagle3"], torch_dtype="bfloat16", **raw)
    maps = {"d2t": torch.zeros(64, dtype=torch.int64), "t2d": torch.ones(64, dtype=torch.bool)}
    tensors = {**maps, **load_file(folder / "model.safetensors")}
    in_bfloat16 = {name: x.bfloat16() if x.is_floating_point() else x for name, x in tensors.items()}
    save_file(in_bfloat16, folder / "model.safetensors")


def as_modelopt(folder: Path) -> None:
    edit_config(
        folder,
        architectures=["LlamaForCausalLMEagle3"],
        eagle_config={
            AUX: [1, 2, 3],  # layers 2, 3 and 4 by another name: the default
            "use_aux_hidden_state": True,
            "use_input_layernorm_in_first_layer": True,
            "use_last_layernorm": True,
            "use_mtp_layernorm": False,
            "next_layer_regular": True,
            "parallel_draft_step": 1,
            "parallel_draft_heads_num_layers": 1,
        },
    )
    edit_tensors(folder, t2d=None)


def as_speculators(folder: Path) -> None:
    """The layer's shape in a block of its own. norm_before_residual is true where the config is silent."""
    raw = json.loads((folder / "config.json").read_text())
    top = {name: raw.pop(name, None) for name in ("draft_vocab_size", AUX)}
    del raw["architectures"], raw["norm_before_residual"]
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.2.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": "somebody/target", "architectures": ["LlamaForCausalLM"]},
        },
        "transformer_layer_config": {"model_type": "llama", "tie_word_embeddings": False, **raw},
        "target_hidden_size": None,
        "norm_before_fc": False,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        **top,
    }
    (folder / "config.json").write_text(json.dumps(config))
    rename_tensors(folder, lambda name: name.replace("midlayer.", "layers.0."))


REDUCED = {"draft_vocab_size": 40}
FORMATS = {  # kind, what write_head writes, what the publisher makes of it
    "SafeAILab EAGLE": ("EAGLE", {}, as_bin),
    "SafeAILab EAGLE for Llama 3": ("EAGLE", {"options": {"fc_bias": False}, "bias": False}, as_bin),
    "SafeAILab EAGLE for Qwen2": ("EAGLE", {"options": {"qkv_bias": True}, "qkv_bias": True}, as_bin),
    "SGLang EAGLE": ("EAGLE", {}, as_sglang),
    "SafeAILab EAGLE3": ("EAGLE3", REDUCED, as_bin),
    "SafeAILab EAGLE3, full vocabulary": ("EAGLE3", {"draft_vocab_size": 64}, as_bin),
    "SGLang EAGLE3": ("EAGLE3", REDUCED, as_sglang),
    "SpecForge": ("EAGLE3", {**REDUCED, "rope_scaling": None}, as_specforge),
    "SpecForge, full vocabulary": ("EAGLE3", {"draft_vocab_size": 64, "rope_scaling": None}, as_specforge),
    "SpecForge 3.1": ("EAGLE3", {"options": {"fc_norm": True}, "fc_norm": True, "norm_output": True}, as_specforge),
    "ModelOpt": ("EAGLE3", REDUCED, as_modelopt),
    "ModelOpt without maps": ("EAGLE3", {}, as_modelopt),
    "speculators": ("EAGLE3", {**REDUCED, "norm_before_residual": True, AUX: [1, 3, 5]}, as_speculators),
    "speculators with embedding": (
        "EAGLE3",
        {**REDUCED, "norm_before_residual": True, "options": {"own_embedding": True}, "rope_theta": 700.0},
        as_speculators,
    ),
}


@pytest.fixture(scope="module")
def plain_answers(target) -> list[list[int]]:
    return generate(Engine(model_path=str(target.folder)))


def generate(engine: Engine) -> list[list[int]]:
    params = {"temperature": 0, "max_new_tokens": 12}
    return [answer["output_ids"] for answer in engine.generate(input_ids=[TOKENS, TOKENS[:1]], sampling_params=params)]


@pytest.mark.parametrize("name", FORMATS)
def test_published_format(name, target, plain_answers, tmp_path, caplog):
    kind, head, publish = FORMATS[name]
    official, published = write_twice(tmp_path, target, kind, **head)
    publish(published)
    if publish is as_specforge:
        tensors = load_file(official / "model.safetensors")
        save_file({name: x.bfloat16().to(x.dtype) for name, x in tensors.items()}, official / "model.safetensors")
    assert_drafts_as(target, kind, published, official)
    assert not caplog.records, "everything in the file has a use"
    paths = {"model_path": str(target.folder), "speculative_draft_model_path": str(published)}
    engine = Engine(**paths, speculative_algorithm=kind, speculative_adaptive=False)
    assert generate(engine) == plain_answers
    assert engine.stats().verify_steps > 0


NULLS = ("rms_norm_eps", "head_dim", "rope_theta", "rope_scaling", "use_aux_hidden_state", "norm_before_residual", AUX)


@pytest.mark.parametrize("publish", [as_sglang, as_speculators], ids=["official", "speculators"])
@pytest.mark.parametrize("name", [*NULLS, "max_position_embeddings", "target_hidden_size"])
def test_null_in_the_config_is_silence(name, publish, target, tmp_path):
    official, other = write_twice(tmp_path, target, "EAGLE3", norm_before_residual=publish is as_speculators)
    publish(other)
    raw = json.loads((other / "config.json").read_text())
    raw = {**raw, name: None, "eagle_config": {name: None}}
    raw.get("transformer_layer_config", {}).pop(name, None)
    (other / "config.json").write_text(json.dumps(raw))
    assert_drafts_as(target, "EAGLE3", other, official)


def test_speculators_that_keeps_the_official_residual(target, tmp_path):
    """As a converted official head says it: false, against the format's default."""
    official, other = write_twice(tmp_path, target, "EAGLE3", norm_before_residual=True)
    as_speculators(other)
    edit_config(other, norm_before_residual=False)
    edit_config(official, norm_before_residual=False)
    assert_drafts_as(target, "EAGLE3", other, official)


# ---- other networks under similar names ----


def make_parallel(folder: Path) -> None:
    edit_tensors(folder, mask_hidden=torch.zeros(1, 96))


def make_deep(folder: Path) -> None:
    edit_config(folder, architectures=["LlamaForCausalLMEagle3Deep"], num_hidden_layers=2)
    rename_tensors(folder, lambda name: name.replace("midlayer.", "midlayer.0."))
    tensors = load_file(folder / "model.safetensors")
    layer = {
        name.replace("midlayer.0.", "midlayer.1."): x.clone() for name, x in tensors.items() if "midlayer." in name
    }
    save_file({**tensors, **layer}, folder / "model.safetensors")


def make_dflash(folder: Path) -> None:
    """Its layers have norms as a decoder's; the norm of the features is outside of them."""
    edit_config(folder, speculators_model_type="dflash")
    top = {"midlayer.hidden_norm.weight": "hidden_norm.weight"}
    rename_tensors(folder, lambda name: top.get(name, name).replace("midlayer.", "layers.0."))


def make_two_layers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    layer = {name.replace("layers.0.", "layers.1."): x.clone() for name, x in tensors.items() if "layers." in name}
    save_file({**tensors, **layer}, folder / "model.safetensors")


def configured(**config):
    return lambda folder: edit_config(folder, **config)


OTHER_NETWORKS = {
    "P-EAGLE": ("EAGLE3", make_parallel, "drafts in parallel (mask_hidden) is not served"),
    "P-EAGLE by its config": ("EAGLE3", configured(speculators_model_type="peagle"), "'peagle' is not eagle3"),
    "Eagle3Deep": ("EAGLE3", make_deep, "the head has 2 layers, heads of 1 are served"),
    "EAGLE of two layers": ("EAGLE", make_two_layers, "the head has 2 layers, heads of 1 are served"),
    "DFlash": ("EAGLE3", make_dflash, "this is no kind of draft known here"),
    "DFlash by its config": ("EAGLE3", configured(speculators_model_type="dflash"), "'dflash' is not eagle3"),
    "parallel_draft_step": (
        "EAGLE3",
        configured(eagle_config={"parallel_draft_step": 2}),
        "eagle_config.parallel_draft_step=2 is not served, only 1 is",
    ),
    "no norm of the embedding": (
        "EAGLE3",
        configured(eagle_config={"use_input_layernorm_in_first_layer": False}),
        "use_input_layernorm_in_first_layer=False is not served, only True is",
    ),
    "no last norm": (
        "EAGLE3",
        configured(eagle_config={"use_last_layernorm": False}),
        "use_last_layernorm=False is not served, only True is",
    ),
    "MTP norm": (
        "EAGLE3",
        configured(eagle_config={"use_mtp_layernorm": True}),
        "use_mtp_layernorm=True is not served, only False is",
    ),
    "other activation": ("EAGLE3", configured(hidden_act="gelu"), "hidden_act='gelu' is not served"),
    "other activation in EAGLE": ("EAGLE", configured(hidden_act="gelu"), "hidden_act='gelu' is not served"),
    "other RoPE scaling": (
        "EAGLE",
        configured(rope_scaling={"type": "yarn", "factor": 2.0}),
        "rope scaling 'yarn' is not served",
    ),
}


@pytest.mark.parametrize("name", OTHER_NETWORKS)
def test_other_networks_are_refused(name, target, tmp_path):
    kind, make, reason = OTHER_NETWORKS[name]
    write_head(tmp_path, kind, target.hf.config)
    make(tmp_path)
    with pytest.raises(ConfigError) as refusal:
        load_head(target, kind, tmp_path)
    assert reason in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)
