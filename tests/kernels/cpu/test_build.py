"""The compiled library: cached, shared, and done without where there is no compiler."""

import subprocess
import sys

import pytest
import torch

from specbackend.kernels import cpu
from specbackend.kernels.cpu import memory

PROGRAM = """
import torch
from specbackend.kernels import cpu
from specbackend.models.linear import linear
assert cpu.compiled() is None
print(type(linear(torch.zeros(3, 4))).__name__)
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.compiled.cache_clear()
    yield tmp_path / "specbackend"
    cpu.compiled.cache_clear()


def test_compiled_once(cache):
    assert cpu.compiled() is not None
    (compiled,) = cache.iterdir()
    written = compiled.stat().st_mtime_ns
    cpu.compiled.cache_clear()
    assert cpu.compiled() is not None and compiled.stat().st_mtime_ns == written


@pytest.mark.parametrize("compiler", ["/bin/false", "/nowhere/g++"])
def test_no_compiler_that_works(compiler, tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path), "CXX": compiler, "PYTHONPATH": ":".join(sys.path)}
    child = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert child.stdout.strip() == "Linear", child.stderr
    assert "kernels for this CPU are not used" in child.stderr
    assert not [*tmp_path.rglob("*.so")]


@pytest.mark.parametrize("flags", ["-march=haswell", "-march=x86-64-v2"])
def test_compiles_for_older_cpus(flags, tmp_path):
    sources = sorted(cpu.FOLDER.glob("*.cpp"))
    command = ["g++", *(flags if flag.startswith("-march") else flag for flag in cpu.FLAGS), "-Wall", "-Werror"]
    subprocess.run([*command, "-o", tmp_path / "old.so", *sources], check=True)


def test_huge_pages_hold_tensors_apart():
    pages = memory.HugePages()
    tensors = [pages.zeros((size, 3), dtype) for size in (1, 100, 7) for dtype in (torch.float32, torch.bfloat16)]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
    large = pages.zeros((memory.CHUNK + 1,), torch.uint8)
    assert large.data_ptr() % memory.HUGE_PAGE == 0 and len(large) == memory.CHUNK + 1
