"""Kernels in C++ for CPUs, compiled for the machine at hand when the first is used.

Each has its launcher beside it: `linear`, `operators`, `attention`, `trees`; and what calls these one after the other:
`network`, a target or a draft head; `growth`, all levels of a draft tree; `tree_step`, a whole step. Their references
in torch are what the engine runs where there is no compiler: `models.linear.Linear`, `models.operators.TorchOperators`,
`attention.torch_sdpa.TorchPlan`, the networks in `models`, `speculative.tree_growth.TreeGrower`,
`speculative.tree_decoder.TreeDecoder`.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # of the dtypes that are served, in the functions' names


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """The compiled kernels, on torch's OpenMP; None, and a warning, if they cannot be compiled."""
    if platform.machine() != "x86_64":  # what `vectors.h` is written for
        return None
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        log.warning("no C++ compiler (g++): decoding on this CPU is slower than it could be")
        return None
    try:
        return ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("kernels for this CPU are not used, decoding is slower: %s", getattr(error, "stderr", "") or error)
        return None


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" and dtype in NAMES and compiled() is not None


def function(name: str, *argtypes):
    """A function of the library that returns nothing."""
    found = getattr(compiled(), name)
    found.argtypes, found.restype = argtypes, None
    return found


def pointer(tensor: torch.Tensor | None) -> int | None:
    """What a kernel is given for a tensor, whose elements lie side by side; null if there is none."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _build(compiler: str) -> Path:
    """The shared library, from the user's cache if it is there."""
    sources = sorted(FOLDER.glob("*.cpp"))
    command = [compiler, *FLAGS]
    key = hashlib.sha256(repr((command, _cpu_flags())).encode())
    for path in (*sources, *FOLDER.glob("*.h")):
        key.update(path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specbackend"
    path = cache / f"cpu-{key.hexdigest()[:16]}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # others may compile the same now
            out = Path(folder) / path.name
            subprocess.run([*command, "-o", out, *sources], check=True, capture_output=True, text=True)
            out.rename(path)
    return path


def _cpu_flags() -> str:
    """A home may be shared by machines of different kinds."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith("flags")), "")
