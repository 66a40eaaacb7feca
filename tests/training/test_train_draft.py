"""tools/train_draft from the command line: what it refuses, and a whole small training, alone and on two ranks."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import DEMO_TARGET, ROOT
from tests.test_tools import load_tool
from tests.training.conftest import write_target

TRAINING = ["--tokens", "500", "--tokens-per-batch", "120", "--lr", "1e-3", "--warmup", "2", "--holdout", "0.2"]
RESPONSES = ["--num-prompts", "10", "--max-new-tokens", "12", "--device", "cpu"]


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory):
    """A tiny Qwen2 with the demo's tokenizer."""
    folder = write_target(tmp_path_factory.mktemp("target") / "tiny", "qwen2", vocab_size=1024)
    for path in DEMO_TARGET.glob("*token*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def train_draft(monkeypatch):
    """Call tools/train_draft with arguments."""
    module = load_tool("train_draft", monkeypatch)

    def call(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["train_draft", *map(str, arguments)])
        module.main()

    return call


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{'How many? ' * (i % 3 + 1)}{i}"}) + "\n" for i in range(12)))
    return path


def test_two_ranks_train_what_one_does_with_twice_the_batches(tmp_path, train_draft, target_folder, data):
    common = ["--algorithm", "eagle", "--target", target_folder, "--data", data, "--fc-bias", *RESPONSES, *TRAINING]
    train_draft(*common, "--out", tmp_path / "one", "--accumulate", 2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [ROOT / "tools" / "train_draft", *common, "--out", tmp_path / "two"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    answers = (tmp_path / "one-work" / "responses.jsonl").read_text().splitlines()
    lengths = [len(json.loads(line)["prompt_ids"]) for line in answers]
    assert lengths == sorted(lengths), "padding is rare when neighbours are alike"
    for rank in (0, 1):
        share = (tmp_path / "two-work" / f"responses-{rank}-of-2.jsonl").read_text().splitlines()
        assert share == answers[rank::2]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    fresh = torch.load(tmp_path / "one-work" / "state.pt", weights_only=True)
    assert len(fresh["history"]["loss"]) > 2
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-6, msg=name)
    histories = [json.loads((tmp_path / f"{name}-work" / "history.json").read_text()) for name in ("one", "two")]
    assert histories[0]["loss"] == pytest.approx(histories[1]["loss"], rel=1e-5)
    assert histories[0]["accuracy"] == histories[1]["accuracy"]
    assert histories[0]["held_out_accuracy"] == pytest.approx(histories[1]["held_out_accuracy"], abs=0.05)
    check_card(tmp_path / "one", tmp_path)


def check_card(folder, tmp_path):
    card = (folder / "README.md").read_text()
    assert "# one: EAGLE-2 head for tiny" in card
    assert "10 prompts of prompts.jsonl, answered by the target greedily; 2 held out" in card
    assert "--fc-bias" in card
    assert str(tmp_path) not in card
    assert "{" not in card
    assert (folder / "losses.png").stat().st_size > 1000


def test_mtp_and_token_map_on_the_same_responses(tmp_path, train_draft, target_folder, data):
    common = ["--target", target_folder, "--data", data, *RESPONSES]
    train_draft("--algorithm", "token-map", *common, "--draft-vocab-size", 20, "--out", tmp_path / "map")
    responses = tmp_path / "map-work" / "responses.jsonl"
    assert len(responses.read_text().splitlines()) == 10
    ids = torch.load(tmp_path / "map" / "freq_20.pt", weights_only=True)
    assert len(set(ids)) == 20
    assert 3 in ids
    train_draft("--algorithm", "mtp", *common, *TRAINING, "--responses", responses, "--out", tmp_path / "mimo")
    tensors = load_file(tmp_path / "mimo" / "model.safetensors")
    assert "model.mtp_layers.0.input_proj.weight" in tensors
    assert not (tmp_path / "mimo-work" / "responses.jsonl").exists()
    history = json.loads((tmp_path / "mimo-work" / "history.json").read_text())
    assert len(history["held_out_accuracy"]) == 5


@pytest.mark.parametrize(
    ("algorithm", "model_type", "config", "message"),
    [
        ("eagle", "gpt2", {}, "is a GPT2LMHeadModel; this algorithm trains on LlamaForCausalLM"),
        ("eagle3", "llama", {"num_hidden_layers": 6}, "6 are too few, it takes 7"),
        ("mtp", "llama", {}, "is a LlamaForCausalLM; this algorithm trains on Qwen2ForCausalLM, MiMoForCausalLM"),
        (
            "mtp",
            "qwen2",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
            "RoPE scaling 'linear' is not trained",
        ),
    ],
)
def test_targets_that_do_not_fit(tmp_path, train_draft, data, algorithm, model_type, config, message):
    target = write_target(tmp_path / "target", model_type, **config)
    with pytest.raises(SystemExit, match=message):
        train_draft("--algorithm", algorithm, "--target", target, "--data", data, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_target_at_all(tmp_path, train_draft, data):
    with pytest.raises(SystemExit, match=r"config\.json is missing"):
        train_draft("--algorithm", "eagle", "--target", tmp_path, "--data", data, "--out", tmp_path / "out")


def test_command_on_the_card_says_what_was_chosen(tmp_path):
    from draft_training.recipe import Recipe

    folder = ROOT / "tools" / "demo_checkpoints" / "llama-gsm8k"
    recipe = Recipe("eagle", folder, tmp_path / "data.jsonl", tmp_path / "out", tmp_path / "work", lr=0.5, fc_bias=True)
    assert recipe.command() == (
        "tools/train_draft --algorithm eagle --target tools/demo_checkpoints/llama-gsm8k --data data.jsonl --out out "
        "--lr 0.5 --fc-bias"
    )
