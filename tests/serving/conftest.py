import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from specbackend.serving.adapter import Adapter
from specbackend.serving.supervisor import ENGINE_COMMAND
from tests.fakes import FakePbUtils, save_byte_checkpoint

ENGINES = (
    "tests.fakes:FakeEngine",
    "tests.fakes:SlowEngine",
    "tests.serving.engines:StuckEngine",
    "tests.serving.engines:UnluckyEngine",
    "tests.serving.engines:ImpatientEngine",
)
FAKE_ENGINE, SLOW_ENGINE, STUCK_ENGINE, UNLUCKY_ENGINE, IMPATIENT_ENGINE = (
    (*ENGINE_COMMAND, "--linger", "0.3", "--engine", name) for name in ENGINES
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return save_byte_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(autouse=True)
def socket_folder(monkeypatch) -> Iterator[Path]:
    """Of its own for each test, so that no engine is shared. A socket's path has to be short."""
    with tempfile.TemporaryDirectory(prefix="sb-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


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


def is_running(pid: int) -> bool:
    """Not so for one that has ended, though its parent has not asked for the code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # before it is opened, or read
        return False
