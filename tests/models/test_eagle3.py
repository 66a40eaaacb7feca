"""Which target layers a head reads; everything else of EAGLE-3 is compared in tests/speculative/test_drafter.py."""

from pathlib import Path

import pytest

from specbackend.errors import ConfigError
from specbackend.models.eagle3 import captured_layers

IDS = "eagle_aux_hidden_state_layer_ids"


def layers(raw: dict, num_layers: int = 16) -> tuple[int, ...]:
    return captured_layers(Path("head"), raw, num_layers)


@pytest.mark.parametrize(
    "raw", [{}, {IDS: [2, 8, 13]}, {"eagle_config": {IDS: [1, 7, 12]}}], ids=["default", "top level", "nested"]
)
def test_the_conventions_for_the_same_layers(raw):
    assert layers(raw) == (2, 8, 13)


@pytest.mark.parametrize("ids", [[2, 8, 16], [8, 2, 13], [2, 2, 13], [-1, 3, 5]], ids=str)
def test_layers_the_target_does_not_have_are_refused(ids):
    with pytest.raises(ConfigError, match="rising layers of a target of 16"):
        layers({IDS: ids})
