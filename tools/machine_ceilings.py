"""What this machine can do at most: read, multiply, launch. Seconds of measuring, and `roofline` takes the result."""

import math
import time
from collections.abc import Callable, Iterable

import torch
from roofline import Ceilings, GemmTimes

from specbackend.cuda_graphs import graph_timer
from specbackend.kernels.cpu.memory import HugePages
from specbackend.models.linear import linear

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
READ_BYTES = 1 << 30  # far beyond any cache
ROTATED_BYTES = 1 << 29  # likewise: weights take turns until they have read as much
NUM_KERNELS = 300
MIN_RUNS, MIN_SECONDS = 3, 0.05  # of each measurement


def measure(
    weights: Iterable[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    rows: tuple[int, ...] = ROWS,
    working_set: int = ROTATED_BYTES,
) -> Ceilings:
    """Ceilings of a device with as many CPU threads as torch has now.

    weights: (outputs, inputs) of the products to time with `rows` rows. working_set: bytes of the weights that a
    forward reads; less than ROTATED_BYTES stay in the same caches as they do there.
    """
    rotated = min(working_set, ROTATED_BYTES)
    gemms = tuple(gemm_times(*shape, dtype, device, rows, rotated) for shape in sorted(set(weights)))
    rates = [
        2 * gemm.outputs * gemm.inputs * T / seconds
        for gemm in gemms
        for T, seconds in zip(gemm.rows, gemm.seconds, strict=True)
    ]
    ceilings = Ceilings(read_bandwidth(device), max(rates), kernel_gap(device), gemms)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # who comes next may size its own memory by what is free
    return ceilings


@torch.inference_mode()
def read_bandwidth(device: torch.device, size: int = READ_BYTES) -> float:
    """Bytes/s of a sum over a buffer of `size` bytes, or of the product of its halves: CPUs like two streams better."""
    buffer = HugePages().zeros((size // 4,), torch.float32).fill_(1).to(device)
    first, second = buffer.chunk(2)
    return buffer.nbytes / min(best_seconds(work, device) for work in (buffer.sum, lambda: first @ second))


@torch.inference_mode()
def gemm_times(
    outputs: int, inputs: int, dtype: torch.dtype, device: torch.device, rows: tuple[int, ...], rotated: int
) -> GemmTimes:
    """Seconds of the project's own product with equal weights that take turns, `rotated` bytes of them or more."""
    weight_ED = torch.randn(outputs, inputs, device=device).to(dtype)
    products = [linear(weight_ED.clone()) for _ in range(math.ceil(rotated / weight_ED.nbytes))]

    def seconds(T: int) -> float:
        x_TD = torch.randn(T, inputs, device=device).to(dtype)

        def work() -> None:
            for product in products:
                product(x_TD)

        return best_seconds(work, device) / len(products)

    return GemmTimes(outputs, inputs, tuple(rows), tuple(seconds(T) for T in rows))


@torch.inference_mode()
def kernel_gap(device: torch.device) -> float:
    """Seconds of a tiny kernel among others that each need the one before; on a CPU, of a tiny operation."""
    x = torch.zeros(1, device=device)

    def work() -> None:
        for _ in range(NUM_KERNELS):
            x.add_(1)

    return best_seconds(work, device) / NUM_KERNELS


def best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of several runs after one to warm up; on a GPU, of a CUDA graph, so that the host costs nothing."""
    work()
    timed = graph_timer(work) if device.type == "cuda" else _timer(work)
    runs = [timed() for _ in range(MIN_RUNS)]
    while sum(runs) < MIN_SECONDS:
        runs.append(timed())
    return min(runs)


def _timer(work: Callable[[], object]) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return timed
