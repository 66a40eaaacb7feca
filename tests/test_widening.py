"""tools/widen_checkpoint: a wider checkpoint says the same, drafts the same, and what cannot be widened is refused."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from widening import WideningError, shards
from widening.checkpoint import Original, widen_checkpoints
from widening.shape import PRESETS, Shape, layer_places
from widening.token_map import widen_token_map

from specbackend import Engine
from specbackend.models.draft import read_token_map
from specbackend.models.model_config import ModelConfig
from tests.checkpoints import edit_config, write_head, write_target
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET, DEMOS
from tests.test_tools import load_tool

DEMO_EAGLE, DEMO_MIMO = DEMOS / "llama-gsm8k-eagle", DEMOS / "mimo-gsm8k"
WIDER_DEMO = Shape(384, 19, 12, 3, 64, 600, 1100, draft_vocab_size=700)
WIDER = Shape(96, 12, 12, 3, 16, 64, 80)


def logits_of(folder) -> torch.Tensor:
    """Hugging Face's, for 40 tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.arange(3, 43)[None]).logits[0]


def assert_equal_but_for_rounding(wide: torch.Tensor, small: torch.Tensor) -> None:
    error, largest = (wide - small).abs().max(), small.abs().max()
    assert error < 1e-5 * largest, f"{error:.1e} of {largest:.1f}"


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("mistral", {"num_key_value_heads": 4}),
    ],
    ids=["llama", "biases", "tied", "qwen2", "mistral"],
)
def test_logits_are_the_originals(family, config, tmp_path):
    write_target(tmp_path / "small", family, num_hidden_layers=8, initializer_range=0.1, **config)
    heads = {"num_attention_heads": 12, "num_key_value_heads": 6} if family == "mistral" else {}
    widen_checkpoints(tmp_path / "small", [], tmp_path / "wide", replace(WIDER, **heads), dtype=None)
    small, wide = logits_of(tmp_path / "small"), logits_of(tmp_path / "wide" / "small")
    assert_equal_but_for_rounding(wide[:, :64], small)
    mean = small.mean(1, keepdim=True)  # so new tokens never win
    assert_equal_but_for_rounding(wide[:, 64:], mean.expand(-1, 16))


def test_demo_targets_logits(tmp_path):
    widen_checkpoints(DEMO_TARGET, [], tmp_path, WIDER_DEMO, dtype=None)
    small, wide = logits_of(DEMO_TARGET), logits_of(tmp_path / DEMO_TARGET.name)
    assert_equal_but_for_rounding(wide[:, :1024], small)


@pytest.fixture(scope="module")
def wide_demos(tmp_path_factory):
    """The demo checkpoints, a little wider, deeper and with more of everything."""
    out = tmp_path_factory.mktemp("wide")
    widen_checkpoints(DEMO_TARGET, [DEMO_EAGLE3, DEMO_EAGLE], out, WIDER_DEMO, dtype=None)
    widen_checkpoints(DEMO_MIMO, [], out, WIDER_DEMO, dtype=None)
    return out


@pytest.mark.parametrize("algorithm", ["EAGLE3", "EAGLE", "NEXTN"])
def test_same_text_and_accept_lengths(algorithm, wide_demos, demo_prompts):
    draft = {"EAGLE3": DEMO_EAGLE3, "EAGLE": DEMO_EAGLE}.get(algorithm)
    target = DEMO_MIMO if draft is None else DEMO_TARGET

    def answers(folder) -> list[tuple[list[int], int]]:
        params = {"speculative_draft_model_path": str(folder / draft.name)} if draft else {}
        engine = Engine(
            model_path=str(folder / target.name), speculative_algorithm=algorithm, speculative_adaptive=False, **params
        )
        sampling = {"temperature": 0, "max_new_tokens": 32}
        answers = engine.generate(input_ids=demo_prompts[:6], sampling_params=sampling)
        return [(answer["output_ids"], answer["meta_info"]["spec_verify_ct"]) for answer in answers]

    assert answers(wide_demos) == answers(DEMOS)


def test_layers_that_a_head_names_are_found_again(tmp_path):
    model = write_target(tmp_path / "small", num_hidden_layers=8)
    for name in ("outer", "inner"):
        write_head(tmp_path / name, "EAGLE3", model.config, draft_vocab_size=48)
    ids = "eagle_aux_hidden_state_layer_ids"
    edit_config(tmp_path / "outer", **{ids: [1, 4, 7]})
    edit_config(tmp_path / "inner", eagle_config={ids: [0, 3, 6]})
    heads = [tmp_path / "outer", tmp_path / "inner"]
    widen_checkpoints(tmp_path / "small", heads, tmp_path / "wide", replace(WIDER, draft_vocab_size=60), dtype=None)
    outer, inner = (json.loads((tmp_path / "wide" / head.name / "config.json").read_text()) for head in heads)
    places = layer_places(8, 12)
    assert outer[ids] == [places[1], places[4], places[7]] == [1, 6, 11]
    assert inner["eagle_config"][ids] == [0, 5, 10]
    assert (outer["hidden_size"], outer["draft_vocab_size"], outer["num_hidden_layers"]) == (96, 60, 1)


@pytest.mark.parametrize("old", range(7, 20))
def test_eagle3s_usual_layers_keep_their_streams(old):
    for new in range(old, 2 * old + 2):
        places = layer_places(old, new)
        assert places == sorted(set(places)) and len(places) == old and places[-1] < new
        for mine, theirs in zip((2, old // 2, old - 3), (2, new // 2, new - 3), strict=True):
            assert sum(place < theirs for place in places) == mine, f"{old} to {new} layers"


def test_an_identity_layer_costs_what_a_layer_costs(tmp_path):
    """Zeros in its large matrices would make it cheaper on some hardware."""
    write_target(tmp_path / "small", num_hidden_layers=8)
    widen_checkpoints(tmp_path / "small", [], tmp_path / "wide", WIDER, dtype=None)
    tensors = load_file(tmp_path / "wide" / "small" / "model.safetensors")
    (identity, *_) = set(range(12)) - set(layer_places(8, 12))
    for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert tensors[f"model.layers.{identity}.{module}.weight"].count_nonzero() > 1000
    assert not tensors[f"model.layers.{identity}.mlp.up_proj.weight"].any()


def test_shards_and_dtype(tmp_path, monkeypatch):
    write_target(tmp_path / "small", num_hidden_layers=8)
    widen_checkpoints(tmp_path / "small", [], tmp_path / "one", WIDER, dtype=None)
    monkeypatch.setattr(shards, "MAX_BYTES", 100_000)
    widen_checkpoints(tmp_path / "small", [], tmp_path / "many", WIDER, dtype=None)
    assert len(list((tmp_path / "many" / "small").glob("model-0*-of-0*.safetensors"))) > 5
    assert torch.equal(logits_of(tmp_path / "many" / "small"), logits_of(tmp_path / "one" / "small"))
    widen_checkpoints(tmp_path / "small", [], tmp_path / "half", WIDER, dtype="bfloat16")
    assert {t.dtype for t in shards_of(tmp_path / "half" / "small")} == {torch.bfloat16}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_logits_of_a_checkpoint_made_on_a_gpu(tmp_path):
    widen_checkpoints(DEMO_TARGET, [], tmp_path, WIDER_DEMO, dtype=None, device="cuda")
    assert_equal_but_for_rounding(logits_of(tmp_path / DEMO_TARGET.name)[:, :1024], logits_of(DEMO_TARGET))


def test_a_shard_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        raise OSError("no space left")

    write_target(tmp_path / "small", num_hidden_layers=8)
    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        widen_checkpoints(tmp_path / "small", [], tmp_path / "wide", WIDER, dtype=None)


def test_longer_contexts(tmp_path):
    write_target(tmp_path / "small", num_hidden_layers=8)
    longest = ModelConfig.read(tmp_path / "small").max_position_embeddings
    for name, shape in (("same", WIDER), ("longer", replace(WIDER, max_position_embeddings=2 * longest))):
        widen_checkpoints(tmp_path / "small", [], tmp_path / name, shape, dtype=None)
    found = [ModelConfig.read(tmp_path / name / "small").max_position_embeddings for name in ("same", "longer")]
    assert found == [longest, 2 * longest]


def shards_of(folder) -> list[torch.Tensor]:
    return [tensor for path in folder.glob("*.safetensors") for tensor in load_file(path).values()]


def test_presets_and_their_counts(tmp_path):
    original = Original.read(DEMO_TARGET).shape
    assert [round(shape.num_parameters / 1e6) for shape in PRESETS.values()] == [123, 300, 8030]
    for shape in PRESETS.values():
        assert layer_places(original.num_hidden_layers, shape.num_hidden_layers)
    small = replace(WIDER_DEMO, num_hidden_layers=16)
    (parameters,) = widen_checkpoints(DEMO_TARGET, [], tmp_path, small, dtype=None).values()
    assert parameters == small.num_parameters == sum(t.numel() for t in shards_of(tmp_path / DEMO_TARGET.name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 100}, "hidden_size: 100 is not a multiple of 32"),
        ({"hidden_size": 0}, "hidden_size: 0 is less than 32"),
        ({"head_dim": 12}, "head_dim: 12 is not a multiple of 8"),
        ({"num_hidden_layers": 7}, "num_hidden_layers: 7 is less than 8"),
        ({"num_key_value_heads": 1}, "num_key_value_heads: 1 is less than 2"),
        ({"intermediate_size": 40}, "intermediate_size: 40 is less than 48"),
        ({"vocab_size": 63}, "vocab_size: 63 is less than 64"),
        ({"num_attention_heads": 8}, "num_attention_heads: 8 is not a multiple of num_key_value_heads, 3"),
        (
            {"num_attention_heads": 3},
            "num_attention_heads: 3 over 3 key-value heads are groups of 1, less than 2",
        ),
        ({"num_attention_heads": 9}, "hidden_size: 96 is not a multiple of num_attention_heads, 9"),
        ({"draft_vocab_size": 30}, "draft_vocab_size: 30 is less than 48"),
        ({"draft_vocab_size": 70}, "draft_vocab_size: 22 new tokens, but the vocabulary has only 16 new ones"),
    ],
)
def test_impossible_shapes(change, message, tmp_path):
    model = write_target(tmp_path / "small", num_hidden_layers=8)
    write_head(tmp_path / "head", "EAGLE3", model.config, draft_vocab_size=48)
    with pytest.raises(WideningError, match=message):
        widen_checkpoints(tmp_path / "small", [tmp_path / "head"], tmp_path / "wide", replace(WIDER, **change), None)
    assert not (tmp_path / "wide").exists(), "nothing is written"


def test_what_cannot_be_widened(tmp_path):
    write_target(tmp_path / "qwen3", "qwen3")
    with pytest.raises(WideningError, match="query and key norms"):
        widen_checkpoints(tmp_path / "qwen3", [], tmp_path / "wide", WIDER, None)
    with pytest.raises(WideningError, match="hidden_size is 128, the target's is 32"):
        write_target(tmp_path / "small", num_hidden_layers=8, vocab_size=1024)
        widen_checkpoints(tmp_path / "small", [DEMO_EAGLE], tmp_path / "wide", replace(WIDER, vocab_size=1024), None)


@pytest.fixture
def widen(monkeypatch):
    """Call tools/widen_checkpoint with arguments."""
    tool = load_tool("widen_checkpoint", monkeypatch)

    def call(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["widen_checkpoint", *map(str, arguments)])
        tool.main()

    return call


def test_command(widen, tmp_path, capsys):
    write_target(tmp_path / "small")
    widen("--target", tmp_path / "small", "--out", tmp_path / "wide", "--hidden-size", 64, "--vocab-size", 80)
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'wide' / 'small'}: ")
    config = json.loads((tmp_path / "wide" / "small" / "config.json").read_text())
    assert (config["hidden_size"], config["vocab_size"], config["intermediate_size"]) == (64, 80, 48)
    assert "first 64 are real" in (tmp_path / "wide" / "small" / "README.md").read_text()
    with pytest.raises(SystemExit, match=r"widen_checkpoint: .*small: exists already"):
        widen("--target", tmp_path / "small", "--out", tmp_path / "wide")
    with pytest.raises(SystemExit, match="num_hidden_layers: 12 is less than 16"):
        widen("--target", DEMO_TARGET, "--out", tmp_path / "deep", "--shape", "120m", "--num-hidden-layers", 12)


def test_token_maps(widen, tmp_path):
    sizes = ("--intermediate-size", 512, "--vocab-size", 1100, "--token-map-size", 300)
    widen("--target", DEMO_TARGET, "--head", DEMO_EAGLE, "--out", tmp_path, *sizes)
    ids = read_token_map(tmp_path / DEMO_EAGLE.name / "freq_300.pt", 1100)
    original = read_token_map(DEMO_EAGLE / "freq_256.pt", 1024)
    assert ids == original + list(range(1024, 1068))
    for size in (255, 333):
        with pytest.raises(WideningError, match=f"{size} ids cannot be made of its 256 and up to 76 new tokens"):
            widen_token_map(DEMO_EAGLE / "freq_256.pt", size, 1024, 1100)


def test_help_tells_the_sizes(widen, capsys):
    with pytest.raises(SystemExit):
        widen("--help")
    assert "120m 122,708,736 (16 layers of width 768)" in " ".join(capsys.readouterr().out.split())
