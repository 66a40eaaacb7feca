import pytest

from tests.checkpoints import write_target, write_tokenizer
from tests.models.forward import load_llama
from tests.models.heads import Target

ROPE_THETA = 500.0  # not the default, which is what a head's config means when it is silent


@pytest.fixture(scope="session")
def target(tmp_path_factory) -> Target:
    """Seven layers, the fewest that EAGLE-3's default needs; width 32, vocabulary 64. Tests only read it."""
    folder = tmp_path_factory.mktemp("target")
    hf = write_target(folder, num_hidden_layers=7, rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA})
    write_tokenizer(folder)  # Engine.generate wants one
    return Target(folder, hf, load_llama(folder))
