"""Decode steps that are recorded once and replayed, as CUDA graphs.

A step launches hundreds of kernels of a few microseconds. Issued one by one they wait for Python; recorded, they follow
each other at the speed of the device. A recording is of one batch size and reads its inputs from buffers of its own, so
there is one for each of several sizes, and a batch takes the next larger one: the rows it lacks are the padding row's.
"""

from enum import Enum
from functools import partial

import numpy as np
import torch

from specbackend.batch import Accepted, DecodeBatch, Sequences, traced_rows
from specbackend.cache.kv_pool import RequestTable
from specbackend.cache.slots import DUMMY_SLOT
from specbackend.config import TreeShape
from specbackend.cuda_graphs import Compute, Recorder
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


class StepBuffers:
    """What a recorded step reads of its B requests and what it says of them, on the device and on the host.

    `_integers` and `_floats` tell the rows of the inputs. Copies between the two sides are part of the recording.
    """

    def __init__(self, B: int, longest_path: int, device: torch.device):
        def pair(*shape: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
            on_host = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
            return on_host, torch.zeros(shape, dtype=dtype, device=device)

        self.host_integer_5B, self.integer_5B = pair(5, B, dtype=torch.int64)
        self.host_float_3B, self.float_3B = pair(3, B, dtype=torch.float64)
        self.host_write_3M, self.write_3M = pair(3, B * longest_path, dtype=torch.int64)
        self.host_accepted_BP, self.accepted_BP = pair(B, 1 + longest_path, dtype=torch.int64)
        self._host_inputs = self.host_integer_5B.numpy(), self.host_float_3B.numpy(), self.host_write_3M.numpy()

    def fill(self, requests: list[Request], table: RequestTable) -> None:
        """Lay out the requests, and what is new in their table; the rest are nobody's: empty and greedy."""
        integers, floats, writes = self._host_inputs
        padding_row = table.padding_row
        for b, request in enumerate(requests):
            integers[:, b], floats[:, b] = _integers(request), _floats(request.params)
        missing = slice(len(requests), None)
        integers[:, missing] = ((padding_row,), (0,), (0,), (0,), (UNLIMITED,))
        floats[:, missing] = np.array(GREEDY_FLOATS)[:, None]
        if table.num_unwritten > writes.shape[1]:
            table.flush()
        unwritten = table.take_unwritten()
        writes[:, : len(unwritten)] = np.array(unwritten).reshape(-1, 3).T
        writes[:, len(unwritten) :] = ((padding_row,), (0,), (DUMMY_SLOT,))

    def upload(self) -> None:
        self.integer_5B.copy_(self.host_integer_5B, non_blocking=True)
        self.float_3B.copy_(self.host_float_3B, non_blocking=True)
        self.write_3M.copy_(self.host_write_3M, non_blocking=True)

    def download(self, accepted: Accepted) -> None:
        self.accepted_BP[:, 0] = accepted.count_B
        self.accepted_BP[:, 1:] = accepted.token_BP
        self.host_accepted_BP.copy_(self.accepted_BP, non_blocking=True)

    def accepted(self, count: int) -> Accepted:
        """What a replay said of the first `count` requests, on the host."""
        return Accepted(self.host_accepted_BP[:count, 1:], self.host_accepted_BP[:count, 0])

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
        self._shapes = {B: TreeShapes.of([tree] * B, device) if tree else None for B in batch_sizes}
        self._buffers: dict[int, StepBuffers] = {}
        self._replays: dict[tuple[int, Sampling], Compute] = {}
        for B in reversed(batch_sizes):  # the largest first: the others fit into its memory
            buffers = self._buffers[B] = StepBuffers(B, tree.longest_path if tree else 1, device)
            buffers.fill([], self._table)
            for most in Sampling:
                self._replays[B, most] = record(partial(self._run, B, most))

    def decode(self, batch: DecodeBatch) -> Accepted:
        """What it returns lasts until the next step."""
        requests = batch.requests
        if not self._is_recorded(requests):
            return self._decoder.decode(batch)
        B = next(size for size in self._batch_sizes if size >= len(requests))
        buffers = self._buffers[B]
        buffers.fill(requests, self._table)
        self._replays[B, _most(requests)]()
        if buffers.accepted_BP.is_cuda:
            torch.cuda.current_stream().synchronize()
        return buffers.accepted(len(requests))

    def _is_recorded(self, requests: list[Request]) -> bool:
        if len(requests) > self._batch_sizes[-1]:
            return False
        others = any(self._tree not in (None, each.tree) or each.params.logprobs is not None for each in requests)
        return not others and not traced_rows(requests) and not processors_of(BEFORE_TEMPERATURE, requests, "cpu")

    def _run(self, B: int, most: Sampling) -> None:
        buffers = self._buffers[B]
        buffers.upload()
        self._table.put(buffers.write_3M)
        at, sampling = buffers.sequences(self._table.slots), buffers.sampling(most)
        buffers.download(self._decoder.step(at, sampling, self._shapes[B]))


def _most(requests: list[Request]) -> Sampling:
    if not any(request.params.temperature for request in requests):
        return Sampling.GREEDY
    return Sampling.LIMITED if processors_of(AFTER_TEMPERATURE, requests, "cpu") else Sampling.SAMPLED
