"""What one of two ranks loads: half of the layers and of the LM head, and nothing of the rest by accident."""

import pytest
import torch

from specbackend.errors import ConfigError
from specbackend.kernels.cpu import memory
from specbackend.models.draft import DraftVocabulary
from specbackend.models.eagle import EagleModel
from specbackend.models.eagle3 import Eagle3Model
from specbackend.models.llama import LlamaModel
from specbackend.models.loader import Weights
from specbackend.models.model_config import ModelConfig
from specbackend.models.mtp import MtpModel
from specbackend.ranks import ONE_RANK, Ranks
from tests.checkpoints import TINY, write_head, write_target

CPU = torch.device("cpu")
TWO = [Ranks(0, 2), Ranks(1, 2)]


@pytest.fixture(autouse=True)
def weights_apart(monkeypatch):
    """Each tensor its own storage, to be counted."""
    monkeypatch.setattr(memory.weights, "zeros", lambda shape, dtype: torch.empty(shape, dtype=dtype))


def load(folder, ranks: Ranks) -> LlamaModel:
    config = ModelConfig.read(folder).part(folder, ranks.size)
    return LlamaModel(folder, config, torch.float32, CPU, num_positions=8, ranks=ranks)


def load_eagle3(folder, target):
    return Eagle3Model(folder, target, torch.float32, CPU, num_positions=8)


def load_eagle(folder, target):
    return EagleModel(folder, target, DraftVocabulary.of_target(target), torch.float32, CPU, num_positions=8)


def tensors_in(thing, seen: set[int] | None = None) -> list[torch.Tensor]:
    """All that an object holds on to, but for RoPE's table, which is computed."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return [thing]
    parts = thing if isinstance(thing, (list, tuple)) else vars(thing).values() if hasattr(thing, "__dict__") else ()
    parts = [part for part in parts if not (isinstance(part, torch.Tensor) and part.is_complex())]
    return [tensor for part in parts for tensor in tensors_in(part, seen)]


def num_bytes(thing) -> int:
    """With what a view keeps alive."""
    storages = [tensor.untyped_storage() for tensor in tensors_in(thing)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_each_rank_holds_little_more_than_half(tmp_path):
    """The embedding and the norms are not split; all the rest is."""
    write_target(tmp_path)
    unsplit = 4 * TINY["hidden_size"] * (TINY["vocab_size"] + 2 * TINY["num_hidden_layers"] + 1)
    whole = num_bytes(load(tmp_path, ONE_RANK))
    for ranks in TWO:
        mine = num_bytes(load(tmp_path, ranks))
        assert mine == unsplit + (whole - unsplit) / 2
        assert mine < 0.6 * whole


@pytest.mark.parametrize("kind, load_head", [("EAGLE", load_eagle), ("EAGLE3", load_eagle3)])
def test_a_heads_layer_is_split(tmp_path, kind, load_head):
    model = write_target(tmp_path / "target", num_hidden_layers=8)
    write_head(tmp_path / "head", kind, model.config)
    whole = load_head(tmp_path / "head", load(tmp_path / "target", ONE_RANK))
    for ranks in TWO:
        head = load_head(tmp_path / "head", load(tmp_path / "target", ranks))
        for name in ("attention", "mlp"):
            assert num_bytes(getattr(head.layer, name)) == num_bytes(getattr(whole.layer, name)) / 2
        assert num_bytes(head.vocabulary.lm_head) == num_bytes(whole.vocabulary.lm_head) / 2


def test_an_mtp_layer_is_split(tmp_path):
    write_target(tmp_path, "mimo")

    def layer(ranks: Ranks):
        target = load(tmp_path, ranks)
        return MtpModel(tmp_path, target, DraftVocabulary.of_target(target), torch.float32, CPU).layer

    for ranks in TWO:
        assert num_bytes(layer(ranks).mlp) == num_bytes(layer(ONE_RANK).mlp) / 2


@pytest.mark.parametrize("split", [0, 1])
def test_the_parts_make_up_the_tensor(tmp_path, split):
    write_target(tmp_path)
    name, shape = "model.layers.0.mlp.gate_proj.weight", [48, 32]
    whole = Weights(tmp_path, torch.float32, CPU).take(name, *shape)
    shape[split] //= 2
    parts = [Weights(tmp_path, torch.float32, CPU, ranks=ranks).take(name, *shape, split=split) for ranks in TWO]
    assert torch.cat(parts, dim=split).equal(whole)
    assert all(part.is_contiguous() for part in parts)


def test_a_wrong_shape_is_told_as_the_file_has_it(tmp_path):
    write_target(tmp_path)
    weights = Weights(tmp_path, torch.float32, CPU, ranks=Ranks(1, 2))
    with pytest.raises(ConfigError, match=r"gate_proj.weight is \[48, 32\], the config asks for \[50, 32\]"):
        weights.take("model.layers.0.mlp.gate_proj.weight", 25, 32, split=0)


def test_what_cannot_be_split_is_named(tmp_path):
    write_target(tmp_path, num_key_value_heads=2, intermediate_size=50)
    with pytest.raises(ConfigError, match=r"tp_size 4 does not divide num_key_value_heads 2, intermediate_size 50$"):
        ModelConfig.read(tmp_path).part(tmp_path, 4)
