"""What is written, tensor by tensor, as it is published."""

import json

import pytest
import torch
from draft_training.errors import TrainingError
from draft_training.head import HeadOptions
from draft_training.target import Target
from draft_training.token_map import frequent_tokens, write_token_map
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

from tests.training import heads
from tests.training.conftest import write_target

D, INNER, V, W, Q, KV = 32, 48, 64, 24, 32, 16

ATTENTION = {"q_proj.weight": (Q, D), "k_proj.weight": (KV, D), "v_proj.weight": (KV, D), "o_proj.weight": (D, Q)}
MLP = {"mlp.gate_proj.weight": (INNER, D), "mlp.up_proj.weight": (INNER, D), "mlp.down_proj.weight": (D, INNER)}
EAGLE3 = {
    "fc.weight": (D, 3 * D),
    "midlayer.input_layernorm.weight": (D,),
    "midlayer.hidden_norm.weight": (D,),
    "midlayer.post_attention_layernorm.weight": (D,),
    "midlayer.self_attn.q_proj.weight": (Q, 2 * D),
    "midlayer.self_attn.k_proj.weight": (KV, 2 * D),
    "midlayer.self_attn.v_proj.weight": (KV, 2 * D),
    "midlayer.self_attn.o_proj.weight": (D, Q),
    **{f"midlayer.{name}": shape for name, shape in MLP.items()},
    "norm.weight": (D,),
    "lm_head.weight": (W, D),
    "d2t": (W,),
    "t2d": (V,),
}
EAGLE = {
    "fc.weight": (D, 2 * D),
    **{f"layers.0.self_attn.{name}": shape for name, shape in ATTENTION.items()},
    **{f"layers.0.{name}": shape for name, shape in MLP.items()},
    "layers.0.post_attention_layernorm.weight": (D,),
}
NORMS = ("token_layernorm", "hidden_layernorm", "input_layernorm", "post_attention_layernorm", "final_layernorm")
MTP = {
    **{f"model.mtp_layers.0.{name}.weight": (D,) for name in NORMS},
    "model.mtp_layers.0.input_proj.weight": (D, 2 * D),
    **{f"model.mtp_layers.0.self_attn.{name}": shape for name, shape in ATTENTION.items()},
    "model.mtp_layers.0.self_attn.q_proj.bias": (Q,),
    "model.mtp_layers.0.self_attn.k_proj.bias": (KV,),
    "model.mtp_layers.0.self_attn.v_proj.bias": (KV,),
    **{f"model.mtp_layers.0.{name}": shape for name, shape in MLP.items()},
}


def load_target(folder, dtype=torch.float32) -> Target:
    return Target.load(folder, dtype, torch.device("cpu"))


def shapes(tensors: dict) -> dict:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def read_config(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eagle3(tmp_path, llama_folder, dtype):
    target = load_target(llama_folder, dtype)
    head = heads.build("eagle3", target)
    head.save(tmp_path, target)
    tensors = load_file(tmp_path / "model.safetensors")
    assert shapes(tensors) == EAGLE3
    kinds = {name: tensor.dtype for name, tensor in tensors.items()}
    assert kinds.pop("d2t") == torch.int64
    assert kinds.pop("t2d") == torch.bool
    assert set(kinds.values()) == {dtype}
    ids = tensors["d2t"] + torch.arange(W)  # offsets, of ascending ids
    assert (ids.diff() > 0).all()
    assert torch.equal(tensors["t2d"].nonzero().flatten(), ids)
    assert target.eos_token_ids[0] in ids  # though it is rare in what the fixture counted
    config = read_config(tmp_path)
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["model_type"] == "llama"
    assert config["draft_vocab_size"] == W
    assert config["target_hidden_size"] == D
    assert config["num_hidden_layers"] == 1
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("bias", [False, True])
def test_eagle(tmp_path, llama_folder, bias):
    target = load_target(llama_folder)
    heads.build("eagle", target, HeadOptions(W, 40, bias, 0.2)).save(tmp_path, target)
    tensors = load_file(tmp_path / "model.safetensors")
    narrow = {name: tuple(40 if n == INNER else n for n in shape) for name, shape in EAGLE.items()}
    assert shapes(tensors) == narrow | ({"fc.bias": (D,)} if bias else {})
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    config = read_config(tmp_path)
    assert config["architectures"] == ["LlamaForCausalLMEagle"]
    assert config["bias"] is bias
    assert config["intermediate_size"] == 40


@pytest.mark.parametrize("tied", [False, True])
def test_mtp(tmp_path, tied):
    folder = write_target(tmp_path / "target", "qwen2", tie_word_embeddings=tied)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("of the target")
    target = load_target(folder)
    head = heads.build("mtp", target)
    head.save(tmp_path / "mimo", target)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "mimo"))
    assert shapes(after) == shapes(before) | MTP
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for name, tensor in head.state_dict().items():
        assert torch.equal(after[f"model.mtp_layers.0.{name}"], tensor)
    mimo = {"architectures": ["MiMoForCausalLM"], "model_type": "mimo", "num_nextn_predict_layers": 1}
    assert read_config(tmp_path / "mimo") == read_config(folder) | mimo
    assert (tmp_path / "mimo" / "tokenizer.json").exists()
    assert not (tmp_path / "mimo" / "README.md").exists()
    again = load_target(tmp_path / "mimo")
    assert isinstance(again.model, Qwen2ForCausalLM)
    tokens_BT = torch.arange(10)[None]
    assert torch.equal(again.model(tokens_BT).logits, target.model(tokens_BT).logits)


def test_mtp_keeps_the_dtype_on_disk(tmp_path):
    """Training in float32 must not double the checkpoint."""
    folder = write_target(tmp_path / "target", "qwen2", dtype="bfloat16")
    stored = load_file(folder / "model.safetensors")
    assert read_config(folder)["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    target = load_target(folder)
    heads.build("mtp", target).save(tmp_path / "mimo", target)
    tensors = load_file(tmp_path / "mimo" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in stored.items())


def test_token_map(tmp_path):
    counts_V = torch.tensor([5, 0, 7, 0, 7, 1, 9, 2])
    path = write_token_map(frequent_tokens(counts_V, 5, [2]), tmp_path)
    assert path.name == "freq_5.pt"
    ids = torch.load(path, weights_only=True)
    assert ids == [6, 2, 4, 0, 7]
    assert all(type(token) is int for token in ids)
    assert frequent_tokens(counts_V, 5, [1, 3]) == [6, 2, 4, 1, 3]  # eos in place of the last ones
    with pytest.raises(TrainingError, match="9 is more than the target's vocabulary of 8"):
        frequent_tokens(counts_V, 9, [])
    assert frequent_tokens(counts_V, 8, []) == [6, 2, 4, 0, 7, 5, 1, 3]
