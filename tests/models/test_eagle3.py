"""Which target layers a head reads. What it computes from them is compared in test_head_formats."""

from pathlib import Path

import pytest

from specbackend.errors import ConfigError
from specbackend.models.eagle3 import captured_layers

IDS = "eagle_aux_hidden_state_layer_ids"


def layers(raw: dict, num_layers: int = 16) -> tuple[int, ...]:
    return captured_layers(Path("head"), raw, num_layers)


@pytest.mark.parametrize(
    "num_layers, expected",
    [(7, (2, 3, 4)), (8, (2, 4, 5)), (16, (2, 8, 13)), (32, (2, 16, 29)), (61, (2, 30, 58))],
)
@pytest.mark.parametrize("raw", [{}, {IDS: None}, {IDS: []}, {"eagle_config": None}, {"eagle_config": {}}], ids=str)
def test_default(raw, num_layers, expected):
    assert layers(raw, num_layers) == expected


@pytest.mark.parametrize(
    "raw", [{}, {IDS: [2, 8, 13]}, {"eagle_config": {IDS: [1, 7, 12]}}], ids=["default", "top level", "nested"]
)
def test_the_conventions_for_the_same_layers(raw):
    assert layers(raw) == (2, 8, 13)


def test_nested_ids_that_look_like_the_default():
    """Kimi's heads say [2, 30, 58] for 61 layers, and SGLang captures the ones after."""
    assert layers({"eagle_config": {IDS: [2, 30, 58]}}, 61) == (3, 31, 59)


@pytest.mark.parametrize("ids", [[5], [0, 15], [2, 8, 13, 14]], ids=str)
def test_other_numbers_of_layers(ids):
    assert layers({IDS: ids}) == tuple(ids)


@pytest.mark.parametrize(
    "raw",
    [
        {"use_aux_hidden_state": False},
        {"eagle_config": {"use_aux_hidden_state": False}},
        {"use_aux_hidden_state": False, "eagle_config": {"parallel_draft_step": 1}},
        {"use_aux_hidden_state": False, IDS: [2, 8, 13]},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_layers", [2, 16])
def test_none(raw, num_layers):
    """The feature is the final hidden state, which a target of any depth has."""
    assert layers(raw, num_layers) == ()


@pytest.mark.parametrize("num_layers", [1, 6])
def test_default_of_a_target_of_few_layers_is_refused(num_layers):
    with pytest.raises(ConfigError, match=f"a target of 7 layers or more, this one has {num_layers}$"):
        layers({}, num_layers)
    assert layers({IDS: [0]}, num_layers) == (0,)


@pytest.mark.parametrize("ids", [[2, 8, 16], [8, 2, 13], [2, 2, 13], [-1, 3, 5]], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_layers_the_target_does_not_have_are_refused(nested, ids):
    raw = {"eagle_config": {IDS: [layer - 1 for layer in ids]}} if nested else {IDS: ids}
    with pytest.raises(ConfigError) as refusal:
        layers(raw)
    assert str(refusal.value) == f"head: {IDS} {tuple(ids)} are not rising layers of a target of 16"
