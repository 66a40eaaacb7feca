"""Decode steps that are recorded once and replayed, as CUDA graphs.

A step launches hundreds of kernels of a few microseconds. Issued one by one they wait for Python; recorded, they follow
each other at the speed of the device. A recording is of one batch size and reads its inputs from buffers of its own, so
there is one for each of several sizes, and a batch takes the next larger one: the rows it lacks are the padding row's.

While the device takes a step, the host can have it take the next one, too, before it knows what came of the first.
"""

from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import cycle

import numpy as np
import torch

from specbackend.batch import Accepted, DecodeBatch, Sequences, traced_rows
from specbackend.cache.kv_pool import RequestTable
from specbackend.cache.slots import DUMMY_SLOT
from specbackend.config import TreeShape
from specbackend.cuda_graphs import Compute, Recorder
from specbackend.request import Request
from specbackend.sampling import SamplingBatch, has_processors
from specbackend.sampling.limits import NO_LIMITS, UNLIMITED, Limits, limits_of
from specbackend.sampling.pick import signed
from specbackend.sampling_params import SamplingParams
from specbackend.speculative.decoder import Step
from specbackend.speculative.plain import PlainDecoder
from specbackend.speculative.tree_decoder import TreeDecoder
from specbackend.speculative.tree_shapes import TreeShapes


class Sampling(Enum):
    """What the requests of a batch need at most. A recording of one does for the lesser ones, at a higher cost."""

    GREEDY = 0
    SAMPLED = 1  # temperature and seed
    LIMITED = 2  # top_k, top_p, min_p too


class HostBuffers:
    """Inputs and results of one step on the host, where copies to and from the device may still be under way."""

    def __init__(self, B: int, longest_path: int, device: torch.device):
        is_cuda = device.type == "cuda"

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=is_cuda)

        self.integer_5B, self.float_3B = zeros(5, B), zeros(3, B, dtype=torch.float64)
        self.write_3M, self.accepted_BP = zeros(3, B * longest_path), zeros(B, 1 + longest_path)
        self.done = torch.cuda.Event() if is_cuda else None

    def fill(self, requests: list[Request], table: RequestTable) -> None:
        """Lay out the requests; the rest are nobody's: empty and greedy."""
        integers, floats = self.integer_5B.numpy(), self.float_3B.numpy()
        for b, request in enumerate(requests):
            integers[:, b], floats[:, b] = _integers(request), _floats(request.params)
        missing = slice(len(requests), None)
        integers[:, missing] = ((table.padding_row,), (0,), (0,), (0,), (UNLIMITED,))
        floats[:, missing] = np.array(GREEDY_FLOATS)[:, None]

    def fill_writes(self, table: RequestTable) -> None:
        """What is new in the table."""
        writes = self.write_3M.numpy()
        if table.num_unwritten > writes.shape[1]:
            table.flush()
        unwritten = table.take_unwritten()
        writes[:, : len(unwritten)] = np.array(unwritten).reshape(-1, 3).T
        writes[:, len(unwritten) :] = ((table.padding_row,), (0,), (DUMMY_SLOT,))

    def wait(self) -> None:
        """Until the device has done what it was told with these."""
        if self.done:
            self.done.synchronize()

    def accepted(self, count: int) -> Accepted:
        """Of the first `count` requests, when that is known."""
        self.wait()
        return Accepted(self.accepted_BP[:count, 1:], self.accepted_BP[:count, 0])


class StepBuffers:
    """What a recorded step reads of its B requests and what it says of them, on the device.

    `_integers` and `_floats` tell the rows of the inputs. A step leaves them as the next one needs them. The host has
    two sets: it fills one for a step while another step still has the other.
    """

    def __init__(self, B: int, longest_path: int, padding_row: int, device: torch.device):
        self._hosts = cycle([HostBuffers(B, longest_path, device) for _ in range(2)])
        self.integer_5B = torch.zeros(5, B, dtype=torch.int64, device=device)
        self.float_3B = torch.zeros(3, B, dtype=torch.float64, device=device)
        self.write_3M = torch.zeros(3, B * longest_path, dtype=torch.int64, device=device)
        self.accepted_BP = torch.zeros(B, 1 + longest_path, dtype=torch.int64, device=device)
        self._padding_row = padding_row

    def upload(self, requests: list[Request], table: RequestTable) -> HostBuffers:
        """Returns where the results will be."""
        host = self._free_host()
        host.fill(requests, table)
        host.fill_writes(table)
        self.send(host, "integer_5B", "float_3B", "write_3M")
        return host

    def upload_writes(self, table: RequestTable) -> HostBuffers:
        """For the next step of the same requests, whose other inputs are there."""
        host = self._free_host()
        host.fill_writes(table)
        self.send(host, "write_3M")
        return host

    def _free_host(self) -> HostBuffers:
        host = next(self._hosts)
        host.wait()
        return host

    def send(self, host: HostBuffers, *names: str) -> None:
        for name in names:
            getattr(self, name).copy_(getattr(host, name), non_blocking=True)

    def download(self, host: HostBuffers) -> None:
        host.accepted_BP.copy_(self.accepted_BP, non_blocking=True)
        if host.done:
            host.done.record()

    def keep(self, accepted: Accepted) -> None:
        """A step's results, and where they leave its requests."""
        self.accepted_BP[:, 0] = accepted.count_B
        self.accepted_BP[:, 1:] = accepted.token_BP
        row_B, length_B, root_B = self.integer_5B[:3]
        length_B += accepted.count_B * (row_B != self._padding_row)  # whose columns are few
        root_B.copy_(accepted.token_BP.gather(1, accepted.count_B[:, None] - 1)[:, 0])

    def sequences(self, slots_RC: torch.Tensor) -> Sequences:
        row_B, length_B, root_B = self.integer_5B[:3].unbind()
        return Sequences([], row_B, length_B, root_B, prefix_slot_BL=slots_RC[row_B])

    def sampling(self, most: Sampling) -> SamplingBatch:
        seed_B, top_k_B = self.integer_5B[3:].unbind()
        temperature_B, top_p_B, log_min_p_B = self.float_3B.unbind()
        is_limited = most is Sampling.LIMITED
        limits = Limits(top_k_B, top_p_B, log_min_p_B.float(), most=UNLIMITED) if is_limited else None
        return SamplingBatch(temperature_B.float(), seed_B, most is not Sampling.GREEDY, limits=limits)


GREEDY_FLOATS = (0.0, *NO_LIMITS[1:])


def _integers(request: Request) -> tuple[int, ...]:
    top_k, *_ = limits_of(request.params)
    return request.row, request.num_computed, request.output_ids[-1], signed(request.seed), top_k


def _floats(params: SamplingParams) -> tuple[float, ...]:
    _, *others = limits_of(params)
    return params.temperature, *others


@dataclass(frozen=True, kw_only=True)
class RecordedStep(Step):
    size: int  # of the recording
    most: Sampling


class RecordedDecoder:
    """A decoder whose steps are recorded for batches of up to batch_sizes[-1] requests that all have one tree.

    What a recording cannot hold is left to the decoder: logprobs, traces, trees of their own, parameters that need the
    text.
    """

    def __init__(
        self, decoder: PlainDecoder | TreeDecoder, tree: TreeShape | None, batch_sizes: list[int], record: Recorder
    ):
        """tree: what the recorded requests draft, None for plain decoding."""
        self.num_nodes, self.extend = decoder.num_nodes, decoder.extend
        self._decoder, self._tree, self._batch_sizes = decoder, tree, batch_sizes
        self._table, device = decoder.runner.table, decoder.runner.device
        self._buffers: dict[int, StepBuffers] = {}
        self._replays: dict[tuple[int, Sampling], Compute] = {}
        longest_path, padding_row = tree.longest_path if tree else 1, self._table.padding_row
        for B in reversed(batch_sizes):  # the largest first: the others fit into its memory
            self._buffers[B] = StepBuffers(B, longest_path, padding_row, device)
            self._buffers[B].upload([], self._table)
            shapes = TreeShapes.of([tree] * B, device) if tree else None
            for most in Sampling:
                step = partial(_run_step, decoder, shapes, self._buffers[B], self._table, most)
                self._replays[B, most] = record(step)

    def begin(self, batch: DecodeBatch) -> Step:
        """The results last until the second step from here."""
        requests = batch.requests
        if not self._is_recorded(requests):
            return self._decoder.begin(batch)
        B = next(size for size in self._batch_sizes if size >= len(requests))
        return self._replay(batch, B, _most(requests), self._buffers[B].upload(requests, self._table))

    def begin_next(self, step: RecordedStep) -> Step:
        return self._replay(step.batch, step.size, step.most, self._buffers[step.size].upload_writes(self._table))

    def _replay(self, batch: DecodeBatch, B: int, most: Sampling, host: HostBuffers) -> RecordedStep:
        self._replays[B, most]()
        self._buffers[B].download(host)
        return RecordedStep(batch, partial(host.accepted, len(batch.requests)), goes_on=True, size=B, most=most)

    def _is_recorded(self, requests: list[Request]) -> bool:
        if len(requests) > self._batch_sizes[-1]:
            return False
        others = any(self._tree not in (None, each.tree) or each.params.logprobs is not None for each in requests)
        return not others and not traced_rows(requests) and not has_processors(requests)


def _run_step(
    decoder: PlainDecoder | TreeDecoder,
    shapes: TreeShapes | None,
    buffers: StepBuffers,
    table: RequestTable,
    most: Sampling,
) -> None:
    table.put(buffers.write_3M)
    buffers.keep(decoder.step(buffers.sequences(table.slots), buffers.sampling(most), shapes))


def _most(requests: list[Request]) -> Sampling:
    if not any(request.params.temperature for request in requests):
        return Sampling.GREEDY
    is_limited = any(limits_of(request.params) != NO_LIMITS for request in requests)
    return Sampling.LIMITED if is_limited else Sampling.SAMPLED
