import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from specbackend.serving.adapter import Adapter
from specbackend.serving.supervisor import ENGINE_COMMAND
from tests.fakes import FakePbUtils, save_byte_checkpoint

FAKE_ENGINE = (*ENGINE_COMMAND, "--engine", "tests.fakes:FakeEngine")
SLOW_ENGINE = (*ENGINE_COMMAND, "--engine", "tests.fakes:SlowEngine")
STUCK_ENGINE = (*ENGINE_COMMAND, "--engine", "tests.serving.engines:StuckEngine")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return save_byte_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def triton_args(checkpoint, tmp_path) -> Callable[..., dict[str, str]]:
    """What Triton passes to initialize(), for the given parameters."""

    def make(**params) -> dict[str, str]:
        params = {"model_path": str(checkpoint), **params}
        config = {"parameters": {name: {"string_value": str(value)} for name, value in params.items()}}
        repository = {
            "model_repository": str(tmp_path / "repository" / "llm"),
            "model_version": "1",
            "model_name": "llm",
        }
        return {"model_config": json.dumps(config), **repository}

    return make


@pytest.fixture
def start_adapter(triton_args) -> Iterator[Callable[..., Adapter]]:
    """An adapter with a fake engine in a real process."""
    started = []

    def start(command=FAKE_ENGINE, **params) -> Adapter:
        started.append(Adapter(FakePbUtils, triton_args(**params), command))
        return started[-1]

    yield start
    for adapter in started:
        adapter.finalize()


@pytest.fixture
def adapter(start_adapter) -> Adapter:
    return start_adapter()
