"""The config.pbtxt files say what the tables say, and Triton can read them."""

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from specbackend.config import EngineConfig
from specbackend.serving.adapter import TRITON_PARAMETERS
from specbackend.serving.schemas import LLM_INPUTS, LLM_OUTPUTS, LLM_PARAMETERS, NOT_IN_ENSEMBLE, TENSORS, config_text

REPOSITORY = Path(__file__).parents[2] / "model_repository"


def read_config(model: str) -> ModelConfig:
    return text_format.Parse((REPOSITORY / model / "config.pbtxt").read_text(), ModelConfig())


@pytest.mark.parametrize("model", TENSORS)
def test_config_repeats_the_table(model):
    assert config_text(model) in (REPOSITORY / model / "config.pbtxt").read_text()
    config = read_config(model)
    assert [tensor.name for tensor in config.input] == [spec.name for spec in TENSORS[model][0]]


def test_llm_admits_what_arrives_together_and_streams():
    config = read_config("llm")
    assert config.max_batch_size == 64
    assert config.HasField("dynamic_batching") and config.dynamic_batching.max_queue_delay_microseconds == 0
    assert config.model_transaction_policy.decoupled
    assert all(tensor.optional for tensor in config.input)


def test_shipped_parameters_are_known():
    params = {name: value.string_value for name, value in read_config("llm").parameters.items()}
    EngineConfig.from_params({name: value for name, value in params.items() if name not in TRITON_PARAMETERS})


def test_ensemble_passes_everything_on_and_has_no_step_after_llm():
    steps = read_config("ensemble").ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["preprocessing", "llm"]
    expected = {spec.name for spec in LLM_INPUTS} - set(NOT_IN_ENSEMBLE) - {"text_input"} | {"input_ids"}
    assert set(steps[1].input_map) == expected
    assert set(steps[1].output_map) == {spec.name for spec in LLM_OUTPUTS}


def test_every_folder_in_the_repository_is_a_model():
    """A stray folder stops tritonserver."""
    for folder in filter(Path.is_dir, REPOSITORY.iterdir()):
        assert (folder / "config.pbtxt").exists(), folder
        assert any(version.is_dir() and version.name.isdigit() for version in folder.iterdir()), folder


def test_names_are_unique():
    for table in (LLM_INPUTS, LLM_PARAMETERS, LLM_OUTPUTS):
        names = [spec.name for spec in table]
        assert len(names) == len(set(names))
