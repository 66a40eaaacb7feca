"""Lays requests out as forward batches and runs the target over them."""

from dataclasses import dataclass
from itertools import chain

import torch

from specbackend.attention.base import AttentionBackend, AttentionPlan
from specbackend.attention.unpadded import run_unpadded
from specbackend.batch import ExtendBatch, ForwardBatch, Sequences
from specbackend.cache.kv_pool import KVPool, RequestTable
from specbackend.cache.slots import DUMMY_SLOT
from specbackend.cuda_graphs import Recorder
from specbackend.forward_graphs import PROMPT_WIDTHS, ForwardGraphs, Forwards
from specbackend.models.llama import LlamaModel, TargetOutput
from specbackend.request import Request

MOST_FULL = 0.9  # of a batch's rows: a fuller one is computed with its padding


@dataclass(frozen=True)
class TargetForward:
    """The target over its KV pool."""

    model: LlamaModel
    kv_pool: KVPool
    attention: AttentionBackend

    def __call__(self, batch: ForwardBatch, _: None) -> tuple[torch.Tensor, ...]:
        return run_unpadded(self._network, batch, None, self.attention.plan(batch, self.model.lm_head.dtype))

    def _network(self, batch: ForwardBatch, _: None, plan: AttentionPlan) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.model.forward(batch, plan, self.kv_pool)
        return output.hidden_TD, output.feature_TF


class TargetRunner:
    """The target network with its KV pool and the request table that drafts share."""

    def __init__(self, model: LlamaModel, kv_pool: KVPool, table: RequestTable, attention: AttentionBackend):
        self.model, self.kv_pool, self.table = model, kv_pool, table
        self.dtype = model.lm_head.dtype
        self.device = model.lm_head.device
        self._forward: Forwards = TargetForward(model, kv_pool, attention)
        self._prompt_widths: tuple[int, ...] = ()

    def forward(self, batch: ForwardBatch) -> TargetOutput:
        return TargetOutput(*self._forward(batch, None))

    def record_forwards(self, record: Recorder, batch_sizes: list[int], widths: set[int]) -> None:
        """From now on replay forwards of so many rows per sequence, which are the window too, and of lone prompts."""
        graphs = ForwardGraphs(self._forward, self.table.slots.shape[1], None, self.dtype, self.device, record)
        for width in widths:
            graphs.record(batch_sizes, width, width)
        graphs.record_prompts()
        self._forward, self._prompt_widths = graphs, PROMPT_WIDTHS

    def prompt_width(self, chunk_lens: list[int]) -> int:
        """How many rows per sequence to lay out for prompt chunks: the longest, and for a lone one what is recorded."""
        longest = max(chunk_lens)
        recorded = self._prompt_widths if len(chunk_lens) == 1 else ()
        return next((width for width in recorded if width >= longest), longest)

    def sequences(self, requests: list[Request]) -> Sequences:
        places = [(request.row, request.num_computed, request.output_ids[-1]) for request in requests]
        row_B, length_B, root_B = torch.tensor(list(zip(*places, strict=True)), device=self.device).unbind()
        return Sequences(requests, row_B, length_B, root_B, self.prefix_slots(requests, row_B))

    def rows(self, requests: list[Request]) -> torch.Tensor:
        return torch.tensor([request.row for request in requests], device=self.device)

    def lengths(self, requests: list[Request]) -> torch.Tensor:
        return torch.tensor([request.num_computed for request in requests], device=self.device)

    def prefix_slots(self, requests: list[Request], row_B: torch.Tensor) -> torch.Tensor:
        """Table columns [B, L] that cover the longest prefix among the requests."""
        return self.table.slots[row_B, : max(request.num_computed for request in requests)]


def extend_forward_batch(runner: TargetRunner, batch: ExtendBatch) -> ForwardBatch:
    """Prompt chunks side by side."""
    starts = [request.num_computed for request in batch.requests]
    return text_forward_batch(runner, batch.requests, starts, batch.chunk_lens)


def text_forward_batch(
    runner: TargetRunner, requests: list[Request], starts: list[int], lengths: list[int]
) -> ForwardBatch:
    """Of each text lengths[i] tokens from starts[i] on, side by side, padded on the right."""
    Q = runner.prompt_width(lengths)
    tokens = [_padded(r.all_ids[i : i + n], Q) for r, i, n in zip(requests, starts, lengths, strict=True)]
    row_B, prefix_len_B = runner.rows(requests), torch.tensor(starts, device=runner.device)
    length_B = torch.tensor(lengths, device=runner.device)
    offset_Q = torch.arange(Q, device=runner.device)
    position_BQ = prefix_len_B[:, None] + offset_Q
    valid_BQ = offset_Q < length_B[:, None]
    position_BQ = position_BQ.where(valid_BQ, 0)
    slot_BQ = runner.table.slots[row_B[:, None], position_BQ].where(valid_BQ, DUMMY_SLOT)
    return ForwardBatch(
        token_BQ=torch.tensor(tokens, device=runner.device),
        position_BQ=position_BQ,
        slot_BQ=slot_BQ,
        prefix_slot_BL=runner.prefix_slots(requests, row_B),
        prefix_len_B=prefix_len_B,
        window_slot_BW=slot_BQ,
        window_mask_BQW=causal_mask(Q, runner.device).expand(len(requests), Q, Q),
        window_is_causal=True,
        row_T=_rows_apart(lengths, Q, runner.device),
    )


def _rows_apart(lengths: list[int], width: int, device) -> torch.Tensor | None:
    """The rows that are no padding, if so many are that it is worth leaving them out. See ForwardBatch."""
    if len(lengths) == 1 or sum(lengths) > MOST_FULL * len(lengths) * width:
        return None
    rows = [range(b * width, b * width + length) for b, length in enumerate(lengths)]
    return torch.tensor(list(chain.from_iterable(rows)), device=device)


def _padded(tokens: list[int], width: int) -> list[int]:
    return tokens + [0] * (width - len(tokens))


def causal_mask(Q: int, device) -> torch.Tensor:
    """bool [Q, Q]: each row sees itself and the rows before it."""
    return torch.ones(Q, Q, dtype=torch.bool, device=device).tril()
