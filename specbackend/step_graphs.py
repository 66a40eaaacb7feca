"""Decode steps that are recorded once and replayed, as CUDA graphs.

A step launches hundreds of kernels of a few microseconds. Issued one by one they wait for Python; recorded, they follow
each other at the speed of the device. A recording is of one batch size and reads its inputs from buffers of its own, so
there is one for each of several sizes, and a batch takes the next larger one: the rows it lacks are the padding row's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch

from specbackend.batch import Accepted, DecodeBatch, Sequences
from specbackend.config import TreeShape
from specbackend.request import Request
from specbackend.sampling import SamplingBatch
from specbackend.sampling.pick import signed
from specbackend.sampling.processors import AFTER_TEMPERATURE, BEFORE_TEMPERATURE, MinP, TopKTopP, processors_of
from specbackend.sampling_params import SamplingParams
from specbackend.speculative.plain import PlainDecoder
from specbackend.speculative.tree_decoder import TreeDecoder
from specbackend.speculative.tree_shapes import TreeShapes


class Sampling(Enum):
    """What the requests of a batch need at most. A recording of one does for the lesser ones, at a higher cost."""

    GREEDY = 0
    SAMPLED = 1  # temperature and seed
    LIMITED = 2  # top_k, top_p, min_p too


@dataclass(frozen=True)
class Recording:
    """`replay` computes what was recorded from what the buffers hold by then, and leaves it in `accepted`."""

    replay: Callable[[], object]
    accepted: Accepted


Recorder = Callable[[Callable[[], Accepted]], Recording]


@dataclass(frozen=True)
class StepBuffers:
    """What a recorded step reads of its B requests; see `_integers` and `_floats` for the rows."""

    integer_5B: torch.Tensor  # int64
    float_3B: torch.Tensor  # float64

    @classmethod
    def of(cls, B: int, device: torch.device) -> "StepBuffers":
        return cls(
            torch.empty(5, B, dtype=torch.int64, device=device), torch.empty(3, B, dtype=torch.float64, device=device)
        )

    def fill(self, requests: list[Request], padding_row: int) -> None:
        """Bring the requests to the device; the rest are nobody's: empty and greedy."""
        missing = self.float_3B.shape[1] - len(requests)
        integers = [_integers(request) for request in requests] + [(padding_row, 0, 0, 0, UNLIMITED)] * missing
        floats = [_floats(request.params) for request in requests] + [GREEDY_FLOATS] * missing
        for buffer, columns in ((self.integer_5B, integers), (self.float_3B, floats)):
            on_host = torch.tensor(columns, dtype=buffer.dtype, pin_memory=buffer.is_cuda)
            buffer.copy_(on_host.t(), non_blocking=True)

    def sequences(self, slots_RC: torch.Tensor) -> Sequences:
        row_B, length_B, root_B = self.integer_5B[:3].unbind()
        return Sequences([], row_B, length_B, root_B, prefix_slot_BL=slots_RC[row_B])

    def sampling(self, most: Sampling) -> SamplingBatch:
        seed_B, top_k_B = self.integer_5B[3:].unbind()
        temperature_B, top_p_B, min_p_B = self.float_3B.unbind()
        limits = ()
        if most is Sampling.LIMITED:
            every_B = torch.arange(len(seed_B), device=seed_B.device)
            limits = (TopKTopP(every_B, top_k_B, top_p_B, most=UNLIMITED), MinP(min_p_B.float().log()))
        return SamplingBatch(temperature_B.float(), seed_B, most is not Sampling.GREEDY, after_temperature=limits)


UNLIMITED = torch.iinfo(torch.int64).max
GREEDY_FLOATS = (0.0, torch.inf, 0.0)  # limits are of sampled requests alone: they would narrow a greedy one's drafts


def _integers(request: Request) -> tuple[int, ...]:
    params = request.params
    top_k = params.top_k if params.temperature and params.top_k != -1 else UNLIMITED
    return request.row, request.num_computed, request.output_ids[-1], signed(request.seed), top_k


def _floats(params: SamplingParams) -> tuple[float, ...]:
    if not params.temperature:
        return GREEDY_FLOATS
    return params.temperature, torch.inf if params.top_p == 1 else params.top_p, params.min_p


class RecordedDecoder:
    """A decoder whose steps are recorded for batches of up to batch_sizes[-1] requests that all have one tree.

    What a recording cannot hold is left to the decoder: logprobs, trees of their own, parameters that need the text.
    """

    def __init__(
        self, decoder: PlainDecoder | TreeDecoder, tree: TreeShape | None, batch_sizes: list[int], record: Recorder
    ):
        """tree: what the recorded requests draft, None for plain decoding."""
        self.num_nodes, self.extend = decoder.num_nodes, decoder.extend
        self._decoder, self._tree, self._batch_sizes = decoder, tree, batch_sizes
        self._table, device = decoder.runner.table, decoder.runner.device
        self._buffers = {B: StepBuffers.of(B, device) for B in batch_sizes}
        self._shapes = {B: TreeShapes.of([tree] * B, device) if tree else None for B in batch_sizes}
        self._recordings: dict[tuple[int, Sampling], Recording] = {}
        for B in reversed(batch_sizes):  # the largest first: the others fit into its memory
            self._buffers[B].fill([], self._table.padding_row)
            for most in Sampling:
                self._recordings[B, most] = record(lambda B=B, most=most: self._run(B, most))

    def decode(self, batch: DecodeBatch) -> Accepted:
        """What it returns lasts until the next step."""
        requests = batch.requests
        if not self._is_recorded(requests):
            return self._decoder.decode(batch)
        B = next(size for size in self._batch_sizes if size >= len(requests))
        self._buffers[B].fill(requests, self._table.padding_row)
        recording = self._recordings[B, _most(requests)]
        recording.replay()
        accepted = recording.accepted
        return Accepted(accepted.token_BP[: len(requests)], accepted.count_B[: len(requests)])

    def _is_recorded(self, requests: list[Request]) -> bool:
        if len(requests) > self._batch_sizes[-1]:
            return False
        others = any(request.tree != self._tree or request.params.logprobs is not None for request in requests)
        return not others and not processors_of(BEFORE_TEMPERATURE, requests, "cpu")

    def _run(self, B: int, most: Sampling) -> Accepted:
        buffers = self._buffers[B]
        return self._decoder.step(buffers.sequences(self._table.slots), buffers.sampling(most), self._shapes[B])


def _most(requests: list[Request]) -> Sampling:
    if not any(request.params.temperature for request in requests):
        return Sampling.GREEDY
    return Sampling.LIMITED if processors_of(AFTER_TEMPERATURE, requests, "cpu") else Sampling.SAMPLED


def graph_batch_sizes(most: int) -> list[int]:
    """1, 2, 4, 8, then steps of 8, `most` included: a padded row costs little, but a quarter of the batch shows."""
    return sorted({*(size for size in (1, 2, 4) if size < most), *range(8, most, 8), most})


def graph_recorder(device: torch.device) -> Recorder | None:
    """None for a device that has no graphs."""
    return _cuda_recorder() if device.type == "cuda" else None


def _cuda_recorder() -> Recorder:
    """Its graphs share their memory: they never run at the same time, and their results are read in between."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream()

    def record(run: Callable[[], Accepted]) -> Recording:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled and libraries set up outside of the recording
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            accepted = run()
        return Recording(graph.replay, accepted)

    return record
