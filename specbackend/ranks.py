"""The processes that share the layers of one model (tensor parallelism), and what they say to each other in a forward.

The layers are split as Megatron-LM splits them. All ranks see all tokens and hold the same hidden states: of each layer
a rank has some of the heads and some of the MLP's width, and the ranks' outputs are summed. An all-reduce gives every
rank the same bits, so that what is computed from a sum needs no further talk.
"""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """Which of how many this process is. All of them must call the collectives, in the same order."""

    rank: int
    size: int

    def part(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's share of a dimension that `size` divides, in memory of its own."""
        return tensor if self.size == 1 else tensor.chunk(self.size, dim)[self.rank].clone()

    def sum_(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x, which lies in x afterwards."""
        # NCCL's, like the one below, can be part of a CUDA graph: every rank records and replays the same steps.
        dist.all_reduce(x)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' x side by side, along the last dimension."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x)
        return torch.cat(parts, dim=-1)

    def least(self, value: int, device: torch.device) -> int:
        """The smallest of all ranks' values; none goes on before the last has come here."""
        if self.size == 1:
            return value
        value_ = torch.tensor(value, device=device)
        dist.all_reduce(value_, dist.ReduceOp.MIN)
        return int(value_)


ONE_RANK = Ranks(0, 1)


@dataclass(frozen=True)
class Seat:
    """Where a process joins the others."""

    rank: int
    meeting: Path  # a file that all of them can write


def join_ranks(seat: Seat, size: int, device: torch.device, timeout_s: float) -> Ranks:
    """Wait for the others. Collectives fail, here or later, when a rank is longer than timeout_s in coming."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(str(seat.meeting), size),
        rank=seat.rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,  # NCCL then sets up at once, not while a graph is recorded
    )
    return Ranks(seat.rank, size)
