"""Each algorithm takes checkpoints of its own kind and says what it was given instead."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specbackend import Engine
from specbackend.config import EngineConfig
from specbackend.errors import ConfigError
from specbackend.models.causal_draft import CausalDraftModel
from specbackend.models.eagle import EagleModel
from specbackend.models.eagle3 import Eagle3Model
from specbackend.models.mtp import MtpModel
from specbackend.models.registry import load_draft
from tests.checkpoints import edit_tensors, write_head, write_target
from tests.models.forward import CPU, load_llama
from tests.models.heads import load_head

CLASSES = {"EAGLE": EagleModel, "EAGLE3": Eagle3Model, "NEXTN": MtpModel, "STANDALONE": CausalDraftModel}
NAMES = {
    "EAGLE": "an EAGLE-1/2 head",
    "EAGLE3": "an EAGLE-3 head",
    "NEXTN": "a checkpoint with MTP layers of its own",
    "STANDALONE": "a language model",
}
FITS = {(kind, kind) for kind in CLASSES} | {("STANDALONE", "NEXTN")}  # with MTP layers it is a language model too


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """One checkpoint of every kind; NEXTN is the target of them all."""
    folder = tmp_path_factory.mktemp("kinds")
    hf = write_target(folder / "NEXTN", "mimo", num_hidden_layers=7)
    for kind in ("EAGLE", "EAGLE3"):
        write_head(folder / kind, kind, hf.config)
    write_target(folder / "STANDALONE", "llama", seed=1)
    return folder


def load(checkpoints: Path, algorithm: str, kind: str):
    paths = {"model_path": str(checkpoints / "NEXTN"), "speculative_draft_model_path": str(checkpoints / kind)}
    config = EngineConfig.from_params({**paths, "speculative_algorithm": algorithm})
    return load_draft(config, load_llama(checkpoints / "NEXTN"), torch.float32, CPU, 128)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("algorithm", CLASSES)
def test_algorithm_and_kind_of_checkpoint(algorithm, kind, checkpoints):
    if (algorithm, kind) in FITS:
        assert type(load(checkpoints, algorithm, kind)) is CLASSES[algorithm]
        return
    with pytest.raises(ConfigError) as refusal:
        load(checkpoints, algorithm, kind)
    assert str(refusal.value) == (
        f"{checkpoints / kind}: {algorithm} needs {NAMES[algorithm]}, this is {NAMES[kind]} "
        f"(speculative_algorithm {kind})"
    )


@pytest.mark.parametrize("algorithm", [None, "NGRAM"])
def test_algorithms_without_a_network(algorithm, target):
    config = EngineConfig(model_path=str(target.folder), speculative_algorithm=algorithm)
    assert load_draft(config, target.model, torch.float32, CPU, 128) is None


@pytest.mark.parametrize("algorithm", CLASSES)
def test_something_else(algorithm, target, tmp_path):
    save_file({"medusa_head.0.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"{algorithm} needs .*, and this is no kind of draft known here"):
        load_head(target, algorithm, tmp_path)


@pytest.mark.parametrize("algorithm", CLASSES)
def test_folder_without_a_checkpoint(algorithm, target, tmp_path):
    with pytest.raises(ConfigError, match=f"no weights at {tmp_path / 'nothing'}"):
        load_head(target, algorithm, tmp_path / "nothing")


# ---- NEXTN: the draft is a part of the target's checkpoint ----


def test_target_without_mtp_layer(target):
    with pytest.raises(ConfigError, match=r"NEXTN needs a checkpoint with MTP layers of its own, this is a language"):
        Engine(model_path=str(target.folder), speculative_algorithm="NEXTN")


def test_mtp_layer_is_the_targets_where_no_path_is_given(checkpoints):
    config = EngineConfig(model_path=str(checkpoints / "NEXTN"), speculative_algorithm="NEXTN")
    model = load_llama(checkpoints / "NEXTN")
    draft = load_draft(config, model, torch.float32, CPU, 128)
    assert type(draft) is MtpModel
    assert draft.embed_tokens is model.embed_tokens
    assert draft.vocabulary.lm_head is model.lm_head


def test_incomplete_mtp_layer(tmp_path):
    write_target(tmp_path, "mimo")
    prefix = "model__mtp_layers__0__"
    edit_tensors(tmp_path, **{f"{prefix}input_proj__weight": None, f"{prefix}self_attn__k_proj__bias": None})
    with pytest.raises(ConfigError) as refusal:
        Engine(model_path=str(tmp_path), speculative_algorithm="NEXTN")
    missing = "model.mtp_layers.0.input_proj.weight, model.mtp_layers.0.self_attn.k_proj.bias"
    assert str(refusal.value) == f"{tmp_path}: missing tensors: {missing}"


def test_checkpoint_with_mtp_layer_serves_as_a_plain_target(checkpoints):
    tensors = load_file(checkpoints / "NEXTN" / "model.safetensors")
    assert any(name.startswith("model.mtp_layers.") for name in tensors)
    Engine(model_path=str(checkpoints / "NEXTN"))
