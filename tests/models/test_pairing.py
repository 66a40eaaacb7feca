"""A draft and a target that do not belong together are refused at load, with what both of them say."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

from specbackend import Engine
from specbackend.errors import ConfigError
from specbackend.models.draft import DraftVocabulary
from tests.checkpoints import Payload, edit_config, edit_tensors, write_head, write_target
from tests.models.heads import Target, drafts, load_head, reference_drafts

AUX = "eagle_aux_hidden_state_layer_ids"


def write_draft(folder: Path, kind: str, target: Target, **config) -> None:
    if kind == "STANDALONE":
        write_target(folder, seed=1, **config)
    else:
        write_head(folder, kind, target.hf.config, **config)


# ---- sizes ----


@pytest.mark.parametrize("kind", ["EAGLE", "EAGLE3", "STANDALONE"])
def test_other_vocabulary(kind, target, tmp_path):
    write_draft(tmp_path, kind, target, vocab_size=65)
    with pytest.raises(ConfigError, match="made for a vocabulary of 65, the target has 64"):
        load_head(target, kind, tmp_path)


OTHER_WIDTHS = {  # kind, config, options, complaint
    "EAGLE": ("EAGLE", {"hidden_size": 24}, {}, "the head has width 24, the target 32"),
    "EAGLE even with an embedding": (
        "EAGLE",
        {"hidden_size": 24},
        {"own_embedding": True},
        "the head has width 24, the target 32",
    ),
    "EAGLE3 without embedding": (
        "EAGLE3",
        {"hidden_size": 24, "target_hidden_size": 32},
        {},
        "no embed_tokens, and the target's cannot serve: width 32, the draft has 24",
    ),
    "EAGLE3 for another target": (
        "EAGLE3",
        {"hidden_size": 24, "target_hidden_size": 48},
        {"own_embedding": True},
        "made for a target of width 48, this one has 32",
    ),
    "EAGLE3 of the final hidden state": (
        "EAGLE3",
        {"hidden_size": 24, "use_aux_hidden_state": False},
        {"own_embedding": True, "num_features": 0},
        "without fc its width of 24 must be the target's 32",
    ),
}


@pytest.mark.parametrize("name", OTHER_WIDTHS)
def test_other_width(name, target, tmp_path):
    kind, config, options, complaint = OTHER_WIDTHS[name]
    write_head(tmp_path, kind, target.hf.config, options=options, **config)
    with pytest.raises(ConfigError) as refusal:
        load_head(target, kind, tmp_path)
    assert str(refusal.value) == f"{tmp_path}: {complaint}"


LAYERS = {
    "of a deeper target": ({AUX: [2, 4, 7]}, "(2, 4, 7) are not rising layers of a target of 7"),
    "of a deeper target, nested": (
        {"eagle_config": {AUX: [1, 3, 6]}},
        "(2, 4, 7) are not rising layers of a target of 7",
    ),
}


@pytest.mark.parametrize("config, complaint", LAYERS.values(), ids=LAYERS)
def test_layers_the_target_does_not_have(config, complaint, target, tmp_path):
    write_head(tmp_path, "EAGLE3", target.hf.config, **config)
    with pytest.raises(ConfigError) as refusal:
        load_head(target, "EAGLE3", tmp_path)
    assert str(refusal.value).endswith(complaint)


@pytest.mark.parametrize("features", [2, 4])
def test_fc_for_another_number_of_layers(features, target, tmp_path):
    write_head(tmp_path, "EAGLE3", target.hf.config, options={"num_features": features})
    with pytest.raises(ConfigError, match=rf"fc.weight is \[32, {32 * features}\], the config asks for \[32, 96\]"):
        load_head(target, "EAGLE3", tmp_path)


def test_lm_head_of_another_vocabulary(target, tmp_path):
    write_head(tmp_path, "EAGLE3", target.hf.config, draft_vocab_size=40)
    edit_config(tmp_path, draft_vocab_size=41)
    edit_tensors(tmp_path, d2t=torch.zeros(41, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"lm_head.weight is \[40, 32\], the config asks for \[41, 32\]"):
        load_head(target, "EAGLE3", tmp_path)


def test_target_of_few_layers(tmp_path):
    """The three default layers would not be three."""
    hf = write_target(tmp_path / "target", num_hidden_layers=6)
    write_head(tmp_path / "head", "EAGLE3", hf.config)
    head = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(tmp_path / "head")}
    with pytest.raises(ConfigError, match="a target of 7 layers or more, this one has 6"):
        Engine(model_path=str(tmp_path / "target"), **head)
    edit_config(tmp_path / "head", **{AUX: [1, 3, 5]})
    Engine(model_path=str(tmp_path / "target"), **head)


# ---- tokenizers ----


def save_words(folder: Path, words: dict[str, int]) -> None:
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))


WORDS = {f"w{token_id}": token_id for token_id in range(64)}  # the target's


@pytest.mark.parametrize("kind", ["EAGLE", "EAGLE3", "STANDALONE"])
def test_tokenizer_that_gives_a_word_another_id(kind, target, tmp_path):
    write_draft(tmp_path, kind, target)
    save_words(tmp_path, {**WORDS, "w41": 64})
    with pytest.raises(ConfigError, match=f"{tmp_path}: its tokenizer gives 'w41' the id 64, the target's 41"):
        load_head(target, kind, tmp_path)


def test_added_token_of_another_id(target, tmp_path):
    """Added tokens are a part of the vocabulary too."""
    write_head(tmp_path, "EAGLE", target.hf.config)
    words = {word: token_id for word, token_id in WORDS.items() if word != "w63"}
    tokenizer = Tokenizer(models.WordLevel({**words, "other": 63}, unk_token="w0"))
    tokenizer.add_special_tokens(["w63"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="gives 'w63' the id 64, the target's 63"):
        load_head(target, "EAGLE", tmp_path)


@pytest.mark.parametrize("words", [WORDS, {"w0": 0, "w5": 5}, {**WORDS, "more": 64}], ids=["the same", "fewer", "more"])
def test_tokenizers_that_agree(words, target, tmp_path):
    write_head(tmp_path, "EAGLE", target.hf.config)
    save_words(tmp_path, words)
    load_head(target, "EAGLE", tmp_path)


def test_unreadable_tokenizer_is_named(target, tmp_path):
    write_head(tmp_path, "EAGLE", target.hf.config)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=f"{tmp_path / 'tokenizer.json'}: "):
        load_head(target, "EAGLE", tmp_path)


# ---- FR-Spec's token maps ----

TOKEN_MAP = [9, 3, 60, 17, 2, 33, 41, 5]  # by frequency, so not sorted


def map_params(folder: Path, content) -> dict:
    torch.save(content, folder / "freq.pt")
    return {"speculative_token_map": str(folder / "freq.pt")}


@pytest.mark.parametrize(
    "stored",
    [TOKEN_MAP, torch.tensor(TOKEN_MAP), torch.tensor(TOKEN_MAP, dtype=torch.int32)],
    ids=["list", "int64", "int32"],
)
def test_token_map(stored, target, tmp_path):
    write_head(tmp_path / "head", "EAGLE", target.hf.config)
    head = load_head(target, "EAGLE", tmp_path / "head", **map_params(tmp_path, stored))
    assert head.vocabulary.target_id_W.tolist() == TOKEN_MAP
    rows = head.vocabulary.lm_head.rows(torch.arange(len(TOKEN_MAP)))
    assert torch.equal(rows, target.model.lm_head.rows(torch.tensor(TOKEN_MAP)))
    expected = reference_drafts(target, "EAGLE", tmp_path / "head", token_map=TOKEN_MAP)
    for mine, theirs in zip(drafts(target, head), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_logits_of_some_tokens_are_the_targets(target):
    hidden = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    logits = DraftVocabulary.of_target(target.model, TOKEN_MAP).logits(hidden)
    torch.testing.assert_close(logits, target.model.logits(hidden)[..., TOKEN_MAP])


def test_whole_vocabulary_is_the_targets_lm_head_itself(target):
    vocabulary = DraftVocabulary.of_target(target.model)
    assert vocabulary.lm_head is target.model.lm_head
    assert vocabulary.target_id_W.tolist() == list(range(64))


BAD_MAPS = {
    "too high": ([3, 64], "holds 2 ids from 3 to 64, which are not distinct ids of the target's vocabulary of 64"),
    "negative": ([3, -1], "holds 2 ids from -1 to 3, which are not distinct ids of the target's vocabulary of 64"),
    "repeats": ([3, 5, 3], "holds 3 ids from 3 to 5, which are not distinct ids of the target's vocabulary of 64"),
    "empty": ([], "is not a list of token ids"),
    "dict": ({3: 5}, "is not a list of token ids"),
    "words": (["w3"], "is not a list of token ids"),
    "floats": ([3.0], "is not a list of token ids"),
    "flags": ([True, False], "is not a list of token ids"),
    "tensor of floats": (torch.tensor([3.0]), "is not a list of token ids"),
    "table": (torch.tensor([[3], [5]]), "is not a list of token ids"),
    "number": (torch.tensor(3), "is not a list of token ids"),
}


@pytest.mark.parametrize("content, complaint", BAD_MAPS.values(), ids=BAD_MAPS)
def test_bad_token_map(content, complaint, target, tmp_path):
    write_head(tmp_path, "EAGLE", target.hf.config)
    with pytest.raises(ConfigError) as refusal:
        load_head(target, "EAGLE", tmp_path, **map_params(tmp_path, content))
    assert str(refusal.value) == f"speculative_token_map: {tmp_path / 'freq.pt'} {complaint}"


UNREADABLE = {
    "missing": lambda path: None,
    "folder": Path.mkdir,
    "empty": Path.touch,
    "text": lambda path: path.write_text(json.dumps(TOKEN_MAP)),
    "damaged": lambda path: path.write_bytes(b"\x80\x02\x8c\xff"),
}


@pytest.mark.parametrize("make", UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_token_map(make, target, tmp_path):
    write_head(tmp_path / "head", "EAGLE", target.hf.config)
    make(tmp_path / "freq.pt")
    with pytest.raises(ConfigError, match=f"speculative_token_map: {tmp_path / 'freq.pt'}: cannot be read"):
        load_head(target, "EAGLE", tmp_path / "head", speculative_token_map=str(tmp_path / "freq.pt"))


def test_malicious_token_map_is_refused_and_not_run(target, tmp_path):
    write_head(tmp_path, "EAGLE", target.hf.config)
    with pytest.raises(ConfigError, match=r"speculative_token_map: .*cannot be read"):
        load_head(target, "EAGLE", tmp_path, **map_params(tmp_path, [Payload(tmp_path / "marker")]))
    assert not (tmp_path / "marker").exists()


def test_token_map_that_was_saved_on_a_gpu(target, tmp_path, monkeypatch):
    write_head(tmp_path, "EAGLE", target.hf.config)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        params = map_params(tmp_path, torch.tensor(TOKEN_MAP))
    assert b"cuda:0" in (tmp_path / "freq.pt").read_bytes()
    assert load_head(target, "EAGLE", tmp_path, **params).vocabulary.target_id_W.tolist() == TOKEN_MAP


def test_tree_wider_than_the_token_map(target, tmp_path):
    write_head(tmp_path, "EAGLE", target.hf.config)
    paths = {"model_path": str(target.folder), "speculative_draft_model_path": str(tmp_path)}
    with pytest.raises(ConfigError, match="speculative_eagle_topk: 4 is more than the draft's vocabulary of 3"):
        Engine(**paths, speculative_algorithm="EAGLE", **map_params(tmp_path, TOKEN_MAP[:3]))
