"""Checkpoint files to tensors: safetensors or .bin (weights_only), sharded or not."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from specbackend.errors import ConfigError
from specbackend.ranks import ONE_RANK, Ranks

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # old exports carry what every engine computes itself

Reader = Callable[[], torch.Tensor]


class Weights:
    """The tensors of one checkpoint, taken by name and read when they are taken.

    What is missing or of another shape is an error; what is left over is the caller's to judge (`remaining`, `finish`).
    `rename` maps the names in the file to those used here, for checkpoints that exist under several conventions.
    `ranks` share the tensors that are taken with `split`.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        rename: Callable[[str], str] = lambda name: name,
        ranks: Ranks = ONE_RANK,
    ):
        self.folder, self.ranks, self._dtype, self._device = folder, ranks, dtype, device
        self._readers = {
            rename(name): read for name, read in _readers(folder).items() if not name.endswith(IGNORED_SUFFIXES)
        }
        self._missing: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._readers

    def take(self, name: str, *shape: int, split: int | None = None) -> torch.Tensor:
        """Remove and return a tensor of this shape: floating ones in the engine's dtype, others as stored.

        split: the dimension of which each rank takes its part; `shape` is that of a part.
        A missing name gives zeros and is reported by `check_complete`, so that one error lists them all.
        """
        read = self._readers.pop(name, None)
        if read is None:
            self._missing.append(name)
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        tensor, whole = read(), list(shape)
        if split is not None:
            whole[split] *= self.ranks.size
        if list(tensor.shape) != whole:
            raise ConfigError(f"{self.folder}: {name} is {list(tensor.shape)}, the config asks for {whole}")
        if split is not None:
            tensor = self.ranks.part(tensor, split)
        dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self._device, dtype).contiguous()

    def take_if_there(self, name: str, *shape: int) -> torch.Tensor | None:
        """`take` for tensors that a checkpoint may do without."""
        return self.take(name, *shape) if name in self else None

    def discard(self, *names: str) -> None:
        """Known names that are not needed."""
        for name in names:
            self._readers.pop(name, None)

    def discard_prefix(self, prefix: str) -> None:
        for name in [name for name in self._readers if name.startswith(prefix)]:
            del self._readers[name]

    def remaining(self) -> list[str]:
        """What nobody has taken yet."""
        return sorted(self._readers)

    def check_complete(self) -> None:
        """Raise ConfigError if a tensor was missing."""
        if self._missing:
            raise ConfigError(f"{self.folder}: missing tensors: {', '.join(self._missing)}")

    def finish(self) -> None:
        """Raise ConfigError if a tensor was missing or nobody took it."""
        self.check_complete()
        if unknown := self.remaining():
            raise ConfigError(f"{self.folder}: tensors of an unknown kind: {', '.join(unknown)}")


def tensor_names(folder: Path) -> Iterable[str]:
    """The names in a checkpoint's files, as stored."""
    return _readers(folder).keys()


def _readers(folder: Path) -> dict[str, Reader]:
    readers: dict[str, Reader] = {}
    for path in _weight_files(folder):
        readers |= _file_readers(path)
    return readers


def _file_readers(path: Path) -> dict[str, Reader]:
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            return {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    tensors = read_pickle(path)
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ConfigError(f"{path}: is not a table of tensors by name")
    return {name: tensor.detach for name, tensor in tensors.items()}


def read_pickle(path: Path) -> object:
    """What torch.save wrote: tensors and plain values, and no code is run. Raises ConfigError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise a dozen classes
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / index).is_file():
            names = _shard_names(folder / index)
            if missing := [name for name in names if not (folder / name).is_file()]:
                raise ConfigError(f"{folder}: {index} names {', '.join(missing)}, which is not there")
            return [folder / name for name in names]
        if (folder / single).is_file():
            return [folder / single]
    raise ConfigError(f"no weights at {folder}: neither model.safetensors nor pytorch_model.bin")


def _shard_names(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index}: is not an index of weights: {error!r}") from error
