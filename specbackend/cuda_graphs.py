"""Recording what a device is told to do, so that it can be told again at once."""

from collections.abc import Callable

import torch

Compute = Callable[[], object]
Recorder = Callable[[Compute], Compute]  # makes of a computation what computes it again, from and to the same tensors


def graph_recorder(device: torch.device) -> Recorder | None:
    """None for a device that has no graphs.

    The graphs share their memory: they never run at the same time, and nothing but what is kept outlasts one's end.
    """
    if device.type != "cuda":
        return None
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def record(compute: Compute) -> Compute:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled and libraries set up outside of the recording
                compute()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            compute()

        def replay() -> None:
            graph.replay()

        replay.of = compute  # the tensors that it uses must not go before the graph does
        return replay

    return record


def graph_timer(work: Compute) -> Callable[[], float]:
    """A replay of `work` as a graph, so that the host costs nothing, and the seconds that the device takes for it."""
    for _ in range(2):  # kernels are compiled and libraries set up outside of the recording
        work()
    graph, start, end = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.graph(graph):
        work()

    def timed() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    timed()  # the first replay of a graph uploads it
    return timed


def graph_batch_sizes(most: int) -> list[int]:
    """1, 2, 4, 8, then steps of 8, `most` included: a padded row costs little, but a quarter of the batch shows."""
    return sorted({*(size for size in (1, 2, 4) if size < most), *range(8, most, 8), most})
