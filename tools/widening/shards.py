"""Safetensors of any size, one tensor in memory at a time to read and a few shards to write."""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from widening import WideningError

MAX_BYTES = 2 << 30  # of a shard, unless one tensor is larger
NUM_WRITERS = 2  # shards that are copied from the device and written while the next one is made


def readers(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """How to read each tensor of a checkpoint."""
    files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
    if not files:
        raise WideningError(f"{folder}: no safetensors there")
    return {name: partial(file.get_tensor, name) for file in files for name in file.keys()}  # noqa: SIM118


class ShardWriter:
    """Takes tensors in any order; after `finish` the folder holds one file, or several and their index."""

    def __init__(self, folder: Path):
        self.folder, self.num_parameters, self.num_bytes = folder, 0, 0
        self._open: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._writers, self._written = ThreadPoolExecutor(NUM_WRITERS), list[Future]()

    def add(self, name: str, tensor: Tensor) -> None:
        if self._open and _bytes(self._open.values()) + tensor.nbytes > MAX_BYTES:
            self._write()
        self._open[name] = tensor.contiguous()
        self.num_parameters += tensor.numel() if tensor.is_floating_point() else 0
        self.num_bytes += tensor.nbytes

    def finish(self) -> None:
        self._write()
        self._wait_for(len(self._written))
        self._writers.shutdown()
        if len(self._shards) == 1:
            self._path(0).rename(self.folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            file_name = f"model-{number + 1:05}-of-{len(self._shards):05}.safetensors"
            self._path(number).rename(self.folder / file_name)
            weight_map |= dict.fromkeys(names, file_name)
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _write(self) -> None:
        self._wait_for(len(self._written) - NUM_WRITERS + 1)
        self._written.append(self._writers.submit(_save, self._open, self._path(len(self._shards))))
        self._shards.append(list(self._open))
        self._open = {}

    def _wait_for(self, count: int) -> None:
        """Until the first `count` shards are written. Raises what went wrong with them."""
        for shard in self._written[: max(count, 0)]:
            shard.result()

    def _path(self, number: int) -> Path:
        """Before it is known how many there will be."""
        return self.folder / f"model-{number + 1:05}.safetensors"


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def _bytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)
