"""EAGLE speculative decoding behind Triton Inference Server."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specbackend.engine import Engine

__all__ = ["Engine"]


def __getattr__(name: str):
    # Lazy on purpose: the Triton adapter imports this package but must not load torch, which only the engine needs.
    if name == "Engine":
        from specbackend.engine import Engine

        return Engine
    raise AttributeError(f"module 'specbackend' has no attribute {name!r}")
