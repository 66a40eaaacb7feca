"""Checkpoint files to tensors: safetensors or .bin (weights_only), sharded or not."""

import json
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from specbackend.errors import ConfigError

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # old exports carry what every engine computes itself


class Weights:
    """The tensors of one checkpoint, taken by name. What is missing or left over is an error, not a surprise."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device):
        self._folder, self._dtype, self._device = folder, dtype, device
        self._tensors = {
            name: tensor for name, tensor in _read_all(folder).items() if not name.endswith(IGNORED_SUFFIXES)
        }
        self._missing: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """Remove and return a tensor of this shape: floating ones in the engine's dtype, others as stored.

        A missing name gives zeros and is reported by `finish`, so that one error lists them all.
        """
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            self._missing.append(name)
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        if tuple(tensor.shape) != shape:
            raise ConfigError(f"{self._folder}: {name} is {list(tensor.shape)}, the config asks for {list(shape)}")
        dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self._device, dtype).contiguous()

    def discard(self, *names: str) -> None:
        """Known names that are not needed."""
        for name in names:
            self._tensors.pop(name, None)

    def finish(self) -> None:
        """Raise ConfigError if a tensor was missing or nobody took it."""
        if self._missing:
            raise ConfigError(f"{self._folder}: missing tensors: {', '.join(self._missing)}")
        if self._tensors:
            raise ConfigError(f"{self._folder}: tensors of an unknown kind: {', '.join(sorted(self._tensors))}")


def _read_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in _weight_files(folder):
        tensors |= _read_file(path)
    return tensors


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / index).is_file():
            names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
            if missing := [name for name in names if not (folder / name).is_file()]:
                raise ConfigError(f"{folder}: {index} names {', '.join(missing)}, which is not there")
            return [folder / name for name in names]
        if (folder / single).is_file():
            return [folder / single]
    raise ConfigError(f"no weights at {folder}: neither model.safetensors nor pytorch_model.bin")
