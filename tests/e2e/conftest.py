import json
import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest

from specbackend.serving.client import read_metrics
from specbackend.serving.tritonserver import TritonServer, processes_of
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET, ROOT

# As the shipped config.pbtxt, for a machine on which other tests run.
ENGINE_PARAMS = {
    "model_path": str(DEMO_TARGET),
    "speculative_adaptive": False,
    "speculative_algorithm": "EAGLE3",
    "speculative_draft_model_path": str(DEMO_EAGLE3),
    "max_total_tokens": 12000,
    "num_threads": 1,
}
FACES = {"llm", "vllm_model"}


def pytest_collection_modifyitems(items):
    if find_spec("pytriton") is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs the tritonserver wheel"))


def make_repository(folder: Path, faces: Iterable[str] = ("llm",), **params) -> Path:
    """The shipped repository, with these faces, other parameters, which are theirs all, and gauges, by model.json."""
    left_out = shutil.ignore_patterns(*FACES - set(faces))
    shutil.copytree(ROOT / "model_repository", folder, ignore=left_out, dirs_exist_ok=True)
    params = {**ENGINE_PARAMS, "REPORT_CUSTOM_METRICS": True, **params}
    for face in faces:
        (folder / face / "1" / "model.json").write_text(json.dumps(params))
    (folder / "preprocessing" / "1" / "model.json").write_text(json.dumps({"model_path": str(DEMO_TARGET)}))
    return folder


def engine_pid(server: TritonServer) -> int:
    """Of the one engine that all faces share."""
    [pid] = [pid for pid in processes_of(server.server_id) if b"engine_process" in _command_line(pid)]
    return pid


def slots(server: TritonServer) -> dict[str, float]:
    """The gauges of llm's KV pool: max, free (the cache's included), used, ..."""
    prefix, model = "nv_trt_llm_kv_cache_block_metrics", 'model="llm"'
    metrics = {
        name: value
        for name, value in read_metrics(server.metrics_url).items()
        if name.startswith(prefix) and model in name
    }
    return {name.split('kv_cache_block_type="')[1].split('"')[0]: value for name, value in metrics.items()}


def _command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
