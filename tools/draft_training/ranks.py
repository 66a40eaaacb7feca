"""Data parallelism: the processes that torchrun started share every training step. One process alone is rank 0 of 1."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(days=7)  # the first rank to have answered its prompts waits for the last


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, if it did."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


def add_up(tensors: list[Tensor]) -> None:
    """Replace each tensor by its sum over all ranks."""
    if not dist.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def local_device(name: str) -> torch.device:
    """'auto' is this process's own GPU, or the CPU where there is none."""
    if name != "auto":
        return torch.device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device
