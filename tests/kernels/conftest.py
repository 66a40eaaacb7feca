"""Kernels run on the GPU where there is one, in Triton's interpreter elsewhere (see tests/conftest.py)."""

import pytest
import torch

from specbackend import kernels
from specbackend.models.operators import operators


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def on_kernels(monkeypatch):
    """The engine uses them here too."""
    monkeypatch.setattr(kernels, "run_on", lambda device: True)
    operators.cache_clear()
    yield
    operators.cache_clear()


def poison(t: torch.Tensor) -> torch.Tensor:
    if t.dtype == torch.bool:
        return t.fill_(True)
    return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(torch.iinfo(t.dtype).min)


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    """Fresh memory holds junk on purpose: a kernel that forgets to write an output must not pass by luck."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, real=real, **kwargs: poison(real(*args, **kwargs)))
