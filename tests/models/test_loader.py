"""What is wrong with a checkpoint is said at load, by name."""

from pathlib import Path

import pytest
import torch

from specbackend.errors import ConfigError
from specbackend.models.eagle3 import Eagle3Model
from specbackend.models.loader import Weights
from tests.checkpoints import convert_to_bin, edit_config, edit_tensors, write_eagle3_head, write_llama
from tests.models.forward import CPU, load_llama


def test_missing_tensors_are_all_named(tmp_path):
    write_llama(tmp_path)
    edit_tensors(tmp_path, model__norm__weight=None, lm_head__weight=None, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(ConfigError) as refusal:
        load_llama(tmp_path)
    missing = "missing tensors: model.layers.1.mlp.up_proj.weight, model.norm.weight, lm_head.weight"
    assert str(refusal.value) == f"{tmp_path}: {missing}"


def test_unknown_tensors_are_all_named(tmp_path):
    write_llama(tmp_path)
    edit_tensors(tmp_path, model__layers__0__self_attn__q_proj__bias=torch.ones(32), adapter=torch.ones(1))
    with pytest.raises(ConfigError, match=r"unknown kind: adapter, model.layers.0.self_attn.q_proj.bias$"):
        load_llama(tmp_path)


def test_wrong_shape_is_named_with_both_shapes(tmp_path):
    write_llama(tmp_path)
    edit_tensors(tmp_path, model__norm__weight=torch.ones(31))
    with pytest.raises(ConfigError, match=r"model.norm.weight is \[31\], the config asks for \[32\]"):
        load_llama(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_missing_shard_is_named(suffix, tmp_path):
    write_llama(tmp_path, max_shard_size="20KB" if suffix == "safetensors" else "1GB")
    if suffix == "bin":
        convert_to_bin(tmp_path, num_files=3)
    shard = sorted(tmp_path.glob(f"*-of-*.{suffix}"))[1]
    shard.unlink()
    with pytest.raises(ConfigError, match=f"index.json names {shard.name}, which is not there"):
        load_llama(tmp_path)


def test_no_weights(tmp_path):
    write_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"neither model.safetensors nor pytorch_model.bin"):
        load_llama(tmp_path)


class Payload:
    """What a malicious pickle does when it is loaded carelessly."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_malicious_bin_is_refused_and_not_run(tmp_path):
    write_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(tmp_path / "marker")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model.bin: cannot be read"):
        load_llama(tmp_path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("size", [0, 5, 10_000])
def test_truncated_file_is_named(name, size, tmp_path):
    write_llama(tmp_path)
    if name == "pytorch_model.bin":
        convert_to_bin(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:size])
    with pytest.raises(ConfigError, match=f"{name}: cannot be read"):
        load_llama(tmp_path)


def test_floats_take_the_engines_dtype_and_integers_keep_theirs(tmp_path):
    write_llama(tmp_path)
    edit_tensors(tmp_path, d2t=torch.tensor([3, 4]))
    weights = Weights(tmp_path, torch.bfloat16, CPU)
    assert weights.take("model.norm.weight", 32).dtype == torch.bfloat16
    assert weights.take("d2t", 2).dtype == torch.int64
    assert "d2t" not in weights


# ---- pairing of an EAGLE-3 head with its target ----


def load_pair(folder: Path) -> Eagle3Model:
    return Eagle3Model(folder / "draft", load_llama(folder / "target"), torch.float32, CPU, 128)


def write_pair(folder: Path, num_hidden_layers: int = 7, **head) -> None:
    model = write_llama(folder / "target", num_hidden_layers=num_hidden_layers)
    write_eagle3_head(folder / "draft", model.config, **head)


@pytest.mark.parametrize("layers, captured", [(7, (2, 3, 4)), (8, (2, 4, 5)), (10, (2, 5, 7))])
def test_captured_layers(layers, captured, tmp_path):
    write_pair(tmp_path, num_hidden_layers=layers)
    assert load_pair(tmp_path).captured_layers == captured


def test_d2t_maps_draft_ids_to_target_ids(tmp_path):
    write_pair(tmp_path, draft_vocab_size=40)
    assert load_pair(tmp_path).vocabulary.target_id_W.tolist() == list(range(24, 64))


def test_head_without_embedding_uses_the_targets(tmp_path):
    write_pair(tmp_path)
    target = load_llama(tmp_path / "target")
    assert Eagle3Model(tmp_path / "draft", target, torch.float32, CPU, 128).embed_tokens is target.embed_tokens


def test_head_with_its_own_embedding(tmp_path):
    write_pair(tmp_path)
    edit_tensors(tmp_path / "draft", embed_tokens__weight=torch.full((64, 32), 0.5))
    assert (load_pair(tmp_path).embed_tokens == 0.5).all()


def test_target_of_few_layers(tmp_path):
    write_pair(tmp_path, num_hidden_layers=6)
    with pytest.raises(ConfigError, match="7 layers or more, this one has 6"):
        load_pair(tmp_path)


def test_other_vocabulary(tmp_path):
    write_pair(tmp_path)
    edit_config(tmp_path / "draft", vocab_size=65)
    with pytest.raises(ConfigError, match="made for a vocabulary of 65, the target has 64"):
        load_pair(tmp_path)


def test_other_width_without_embedding(tmp_path):
    write_pair(tmp_path, hidden_size=16)
    with pytest.raises(ConfigError, match=r"no embed_tokens.*width 32, the draft has 16"):
        load_pair(tmp_path)


def test_missing_d2t(tmp_path):
    write_pair(tmp_path, draft_vocab_size=40)
    edit_tensors(tmp_path / "draft", d2t=None)
    with pytest.raises(ConfigError, match="draft_vocab_size is 40, the target has 64, and d2t is missing"):
        load_pair(tmp_path)


BAD_D2T = {
    "too-high": torch.arange(40) * 0 + 25,
    "negative": torch.arange(40) * 0 - 1,
    "repeats": torch.arange(40).flip(0) - torch.arange(40) // 2,
    "wrong-length": torch.arange(39),
}


@pytest.mark.parametrize("d2t", BAD_D2T.values(), ids=BAD_D2T)
def test_bad_d2t(d2t, tmp_path):
    write_pair(tmp_path, draft_vocab_size=40)
    edit_tensors(tmp_path / "draft", d2t=d2t)
    with pytest.raises(ConfigError, match="d2t"):
        load_pair(tmp_path)


def test_head_with_missing_and_unknown_tensors(tmp_path):
    write_pair(tmp_path)
    edit_tensors(tmp_path / "draft", fc__weight=None, midlayer__hidden_norm__weight=None)
    with pytest.raises(ConfigError, match=r"missing tensors: fc.weight, midlayer.hidden_norm.weight$"):
        load_pair(tmp_path)
