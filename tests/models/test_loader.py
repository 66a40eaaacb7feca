"""What is wrong with a checkpoint is said at load, by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specbackend.errors import ConfigError
from specbackend.models.loader import Weights
from tests.checkpoints import Payload, convert_to_bin, edit_tensors, write_head, write_target
from tests.models.forward import CPU, load_llama
from tests.models.heads import assert_drafts_as, load_head

BIN = "pytorch_model.bin"


def test_missing_tensors_are_all_named(tmp_path):
    write_target(tmp_path)
    edit_tensors(tmp_path, model__norm__weight=None, lm_head__weight=None, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(ConfigError) as refusal:
        load_llama(tmp_path)
    missing = "missing tensors: model.layers.1.mlp.up_proj.weight, model.norm.weight, lm_head.weight"
    assert str(refusal.value) == f"{tmp_path}: {missing}"


def test_unknown_tensors_are_all_named(tmp_path):
    write_target(tmp_path)
    edit_tensors(tmp_path, model__layers__0__self_attn__q_proj__bias=torch.ones(32), adapter=torch.ones(1))
    with pytest.raises(ConfigError, match=r"unknown kind: adapter, model.layers.0.self_attn.q_proj.bias$"):
        load_llama(tmp_path)


def test_wrong_shape_is_named_with_both_shapes(tmp_path):
    write_target(tmp_path)
    edit_tensors(tmp_path, model__norm__weight=torch.ones(31))
    with pytest.raises(ConfigError, match=r"model.norm.weight is \[31\], the config asks for \[32\]"):
        load_llama(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_missing_shard_is_named(suffix, tmp_path):
    write_target(tmp_path, max_shard_size="20KB" if suffix == "safetensors" else "1GB")
    if suffix == "bin":
        convert_to_bin(tmp_path, num_files=3)
    shard = sorted(tmp_path.glob(f"*-of-*.{suffix}"))[1]
    shard.unlink()
    with pytest.raises(ConfigError, match=f"index.json names {shard.name}, which is not there"):
        load_llama(tmp_path)


def test_no_weights(tmp_path):
    write_target(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"neither model.safetensors nor pytorch_model.bin"):
        load_llama(tmp_path)


def test_malicious_bin_is_refused_and_not_run(tmp_path):
    write_target(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(tmp_path / "marker")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model.bin: cannot be read"):
        load_llama(tmp_path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("size", [0, 5, 10_000])
def test_truncated_file_is_named(name, size, tmp_path):
    write_target(tmp_path)
    if name == "pytorch_model.bin":
        convert_to_bin(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:size])
    with pytest.raises(ConfigError, match=f"{name}: cannot be read"):
        load_llama(tmp_path)


def test_floats_take_the_engines_dtype_and_integers_keep_theirs(tmp_path):
    write_target(tmp_path)
    edit_tensors(tmp_path, d2t=torch.tensor([3, 4]))
    weights = Weights(tmp_path, torch.bfloat16, CPU)
    assert weights.take("model.norm.weight", 32).dtype == torch.bfloat16
    assert weights.take("d2t", 2).dtype == torch.int64
    assert "d2t" not in weights


# ---- heads ----

OTHER_FILES = {  # the same tensors, stored in other ways
    "safetensors": lambda folder: None,
    "sharded safetensors": lambda folder: shard(folder, 3),
    "bin": convert_to_bin,
    "sharded bin": lambda folder: convert_to_bin(folder, num_files=3),
    "bin of torch before 1.6": lambda folder: save_as_bin(folder, _use_new_zipfile_serialization=False),
    "bin of parameters": lambda folder: save_as_bin(folder, wrap=torch.nn.Parameter),
}


def shard(folder: Path, num_files: int) -> None:
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for index in range(num_files):
        name = f"model-{index + 1:05}-of-{num_files:05}.safetensors"
        part = dict(tensors[index::num_files])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def save_as_bin(folder: Path, wrap=lambda tensor: tensor, **options) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({name: wrap(x) if x.is_floating_point() else x for name, x in tensors.items()}, folder / BIN, **options)


@pytest.mark.parametrize("store", OTHER_FILES.values(), ids=OTHER_FILES)
@pytest.mark.parametrize("kind", ["EAGLE", "EAGLE3"])
def test_head_in_every_kind_of_file(kind, store, target, tmp_path):
    vocabulary = {"draft_vocab_size": 40} if kind == "EAGLE3" else {}
    for name in ("official", "other"):
        write_head(tmp_path / name, kind, target.hf.config, **vocabulary)
    store(tmp_path / "other")
    assert_drafts_as(target, kind, tmp_path / "other", tmp_path / "official")


def test_bin_that_was_saved_on_a_gpu(target, tmp_path, monkeypatch):
    for name in ("official", "other"):
        write_head(tmp_path / name, "EAGLE", target.hf.config)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        convert_to_bin(tmp_path / "other")
    assert b"cuda:0" in (tmp_path / "other" / BIN).read_bytes()
    assert_drafts_as(target, "EAGLE", tmp_path / "other", tmp_path / "official")


def test_every_missing_tensor_of_a_head_is_named(target, tmp_path):
    """In one error: a head with random weights in place of one would load, and be accepted never."""
    gone = ["fc.weight", "midlayer.input_layernorm.weight", "midlayer.mlp.up_proj.weight", "norm.weight"]
    write_head(tmp_path, "EAGLE3", target.hf.config, draft_vocab_size=40)
    edit_tensors(tmp_path, **dict.fromkeys([*gone, "lm_head.weight"]))
    with pytest.raises(ConfigError) as refusal:
        load_head(target, "EAGLE3", tmp_path)
    assert str(refusal.value) == f"{tmp_path}: missing tensors: {', '.join([*gone, 'lm_head.weight'])}"


@pytest.mark.parametrize("kind", ["EAGLE", "EAGLE3"])
def test_no_tensor_of_a_head_may_be_missing(kind, target, tmp_path):
    tensors = write_head(tmp_path, kind, target.hf.config, options={"fc_bias": False} if kind == "EAGLE" else {})
    optional = {"lm_head.weight"}
    for name in sorted(set(tensors) - optional):
        save_file({other: x for other, x in tensors.items() if other != name}, tmp_path / "model.safetensors")
        with pytest.raises(ConfigError, match=f"missing tensors: {name}$|needs an EAGLE|no kind of draft"):
            load_head(target, kind, tmp_path)


@pytest.mark.parametrize("kind", ["EAGLE", "EAGLE3"])
def test_what_else_a_head_brings_is_named_once_and_ignored(kind, target, tmp_path, caplog):
    for name in ("official", "other"):
        write_head(tmp_path / name, kind, target.hf.config)
    layer = "layers__0" if kind == "EAGLE" else "midlayer"
    known = {f"{layer}__self_attn__rotary_emb__inv_freq": torch.ones(4)}
    edit_tensors(tmp_path / "other", adapter=torch.ones(1), verifier_norm__weight=torch.ones(32), **known)
    assert_drafts_as(target, kind, tmp_path / "other", tmp_path / "official")
    (record,) = caplog.records
    unknown = "adapter, verifier_norm.weight"
    assert record.levelname == "WARNING"
    assert record.getMessage() == f"{tmp_path / 'other'}: tensors of an unknown kind are ignored: {unknown}"


def test_malicious_head_is_refused_and_not_run(target, tmp_path):
    write_head(tmp_path, "EAGLE3", target.hf.config)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save({**tensors, "fc.weight": Payload(tmp_path / "marker")}, tmp_path / BIN)
    with pytest.raises(ConfigError, match=f"{BIN}: cannot be read"):
        load_head(target, "EAGLE3", tmp_path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "content", [[torch.ones(1)], {"state_dict": {"fc.weight": torch.ones(1)}}], ids=["list", "nested"]
)
def test_bin_that_is_no_table_of_tensors(content, target, tmp_path):
    write_head(tmp_path, "EAGLE3", target.hf.config)
    (tmp_path / "model.safetensors").unlink()
    torch.save(content, tmp_path / BIN)
    with pytest.raises(ConfigError, match=f"{BIN}: is not a table of tensors by name"):
        load_head(target, "EAGLE3", tmp_path)


DAMAGED_PICKLES = {  # torch.load meets each of them with an error of another class
    "KeyError": b"\x80\x02h\x01.",
    "IndexError": b"\x80\x02s.",
    "UnicodeDecodeError": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "struct.error": b"\x80\x02X\x01",
}


@pytest.mark.parametrize("content", DAMAGED_PICKLES.values(), ids=DAMAGED_PICKLES)
def test_damaged_bin_is_named(content, target, tmp_path):
    write_head(tmp_path, "EAGLE", target.hf.config)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / BIN).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{BIN}: cannot be read"):
        load_head(target, "EAGLE", tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": null}'], ids=str)
def test_damaged_index_is_named(content, target, tmp_path):
    write_head(tmp_path, "EAGLE", target.hf.config)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"model.safetensors.index.json: is not an index of weights"):
        load_head(target, "EAGLE", tmp_path)
