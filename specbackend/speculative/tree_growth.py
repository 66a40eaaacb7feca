"""Growing a draft tree with a network, level by level.

K = topk, S = num_steps, P = rows of a level, W = (S - 1) * K drafted rows, R = rows of the request table.
Each level but the first runs K rows of the draft model, which see the prefix and their own ancestors among the drafted
rows, nothing else. Drafted K and V live in scratch slots and are never kept.

Candidates compete by the draft's estimate of the chance that the target picks them, and the target picks by parameters,
text and noise that are known: see `sampling.forecast`. Greedy requests get the published algorithm, but for a sharper
scale.
"""

from dataclasses import dataclass

import torch

from specbackend.attention.base import AttentionBackend, AttentionPlan
from specbackend.attention.unpadded import run_unpadded
from specbackend.batch import ForwardBatch, Sequences
from specbackend.cache.kv_pool import KVPool
from specbackend.cuda_graphs import Recorder
from specbackend.forward_graphs import ForwardGraphs
from specbackend.models.draft import DraftModel
from specbackend.sampling import Likeliest, Nodes, SamplingBatch, likeliest
from specbackend.speculative.beam import Beam, next_level
from specbackend.speculative.draft_tree import Candidates
from specbackend.speculative.tree_shapes import TreeShapes


@dataclass(frozen=True)
class DraftPrefix:
    """What the draft model has computed of each sequence: length_B tokens, at these slots."""

    length_B: torch.Tensor
    slot_BL: torch.Tensor
    hidden_BD: torch.Tensor  # the draft's hidden state at its last row, which saw the root


@dataclass(frozen=True)
class Places:
    """Where the drafted rows go: level l has K of them, but for level 0, which is the root."""

    prefix: DraftPrefix
    slot_BW: torch.Tensor
    position_BLK: torch.Tensor
    picked_BLK: torch.Tensor  # the positions of what is picked after them


def num_scratch_slots(num_steps: int, topk: int) -> int:
    """Draft slots that one request needs while a tree is drafted."""
    return (num_steps - 1) * topk


@dataclass(frozen=True)
class DraftForward:
    """A draft model over its KV pool."""

    model: DraftModel
    kv_pool: KVPool
    attention: AttentionBackend

    def __call__(self, batch: ForwardBatch, hidden_TD: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return self.run(batch, hidden_TD, self.plan(batch))

    def plan(self, batch: ForwardBatch) -> AttentionPlan:
        return self.attention.plan(batch, self.model.vocabulary.lm_head.dtype)

    def run(self, batch: ForwardBatch, hidden_TD: torch.Tensor | None, plan: AttentionPlan) -> tuple[torch.Tensor, ...]:
        """`plan` is of a batch of the same places."""
        return run_unpadded(self._network, batch, hidden_TD, plan)

    def _network(self, batch: ForwardBatch, hidden_TD: torch.Tensor | None, plan: AttentionPlan) -> tuple[torch.Tensor]:
        return (self.model.forward(batch, hidden_TD, plan, self.kv_pool),)


class TreeGrower:
    """A draft model and its KV pool. Scratch slots of table row r start at first_scratch_slot + r * W."""

    def __init__(
        self,
        model: DraftModel,
        kv_pool: KVPool,
        attention: AttentionBackend,
        num_rows: int,
        first_scratch_slot: int,
        num_steps: int,
        topk: int,
    ):
        self.model, self.kv_pool = model, kv_pool
        self.num_rows, self.num_steps, self.topk = num_rows, num_steps, topk
        self.dtype, self.device = model.vocabulary.lm_head.dtype, model.vocabulary.lm_head.device
        W = num_scratch_slots(num_steps, topk)
        self.scratch_RW = first_scratch_slot + torch.arange(num_rows * W, device=self.device).view(num_rows, W)
        self._eager = DraftForward(model, kv_pool, attention)
        self._graphs: ForwardGraphs | None = None
        self._level_L = torch.arange(num_steps, device=self.device)
        self._own_LKW = torch.eye(W, dtype=torch.bool, device=self.device).view(num_steps - 1, topk, W)

    def feed(self, batch: ForwardBatch, hidden_TD: torch.Tensor | None, last_B: torch.Tensor) -> torch.Tensor:
        """Compute true tokens. Returns hidden_BD at row last_B[b] of each sequence, after which growth may begin."""
        hidden_BQD = self._forward(batch, hidden_TD, self._eager.plan(batch))
        return hidden_BQD[torch.arange(len(last_B), device=self.device), last_B]

    def grow(self, at: Sequences, prefix: DraftPrefix, sampling: SamplingBatch, shapes: TreeShapes) -> Candidates:
        """Draft K + (S - 1) * K^2 candidates per request. Those beyond a request's own tree score -inf."""
        beam, hidden_BPD = Beam.root(at.root_B, self.scratch_RW.shape[1]), prefix.hidden_BD[:, None]
        nodes, places, plan = Nodes.roots(at.root_B, at.length_B + 1), self._places(at, prefix), None
        levels, path_tokens = [], [beam.token_BP]
        for level in range(shapes.most_steps):
            if level:
                batch = self._level_batch(level, beam, places)
                if plan is None:
                    plan = self._eager.plan(batch)
                else:
                    plan.set_window_mask(batch.window_mask_BQW)
                hidden_BPD = self._forward(batch, beam.hidden_BPD.flatten(0, 1), plan)
                path_tokens.append(beam.token_BP)
                nodes = Nodes.positions(places.picked_BLK[:, level])
                if sampling.before_temperature:
                    nodes = _with_texts(nodes, path_tokens, batch.window_mask_BQW)
            likely = self._likeliest(hidden_BPD, nodes, sampling)
            own_KW = self._own_LKW[level] if level + 1 < shapes.most_steps else None
            children, beam = next_level(level, beam, likely, hidden_BPD, shapes, own_KW)
            levels.append(children)
        return Candidates.of_levels(levels)

    def _likeliest(self, hidden_BPD: torch.Tensor, nodes: Nodes, sampling: SamplingBatch) -> Likeliest:
        """The topk tokens after each row."""
        logits_BPW, vocabulary = self.model.logits(hidden_BPD), self.model.vocabulary
        return likeliest(self.topk, logits_BPW, vocabulary.target_id_W, self.model.config.vocab_size, nodes, sampling)

    def _places(self, at: Sequences, prefix: DraftPrefix) -> Places:
        S, K = self.num_steps, self.topk
        offset_L1 = self._level_L[:, None]
        return Places(
            prefix,
            self.scratch_RW[at.row_B],
            position_BLK=(prefix.length_B[:, None, None] + (offset_L1 - 1)).expand(-1, S, K),
            picked_BLK=(at.length_B[:, None, None] + (offset_L1 + 1)).expand(-1, S, K),
        )

    def _level_batch(self, level: int, beam: Beam, places: Places) -> ForwardBatch:
        """The beam's tokens as rows; all of a level sit at the same position."""
        prefix = places.prefix
        return ForwardBatch(
            token_BQ=beam.token_BP,
            position_BQ=places.position_BLK[:, level],
            slot_BQ=places.slot_BW[:, (level - 1) * self.topk : level * self.topk],
            prefix_slot_BL=prefix.slot_BL,
            prefix_len_B=prefix.length_B,
            window_slot_BW=places.slot_BW,
            window_mask_BQW=beam.seen_BPW,
        )

    def record_forwards(self, record: Recorder, batch_sizes: list[int], num_columns: int, feed_width: int) -> None:
        """From now on replay feeds of so many tokens per sequence and of lone prompts, and the levels of growth."""
        hidden_size = self.model.config.hidden_size if self.model.is_head else None
        graphs = ForwardGraphs(self._eager, num_columns, hidden_size, self.dtype, self.device, record)
        graphs.record(batch_sizes, feed_width, feed_width)
        if self.num_steps > 1:
            graphs.record(batch_sizes, self.topk, self.scratch_RW.shape[1])
        graphs.record_prompts()
        self._graphs = graphs

    def _forward(self, batch: ForwardBatch, hidden_TD: torch.Tensor | None, plan: AttentionPlan) -> torch.Tensor:
        if self._graphs:
            (hidden_TD,) = self._graphs(batch, hidden_TD)
        else:
            (hidden_TD,) = self._eager.run(batch, hidden_TD, plan)
        return hidden_TD.view(*batch.token_BQ.shape, -1)


def _with_texts(nodes: Nodes, path_tokens: list[torch.Tensor], seen_BKW: torch.Tensor) -> Nodes:
    """The root and the drafted rows that each row of a level sees, of which path_tokens are the tokens, lead there."""
    token_BM = torch.cat(path_tokens, dim=1)
    root_BK1 = torch.ones_like(seen_BKW[:, :, :1])
    mask_BKM = torch.cat([root_BK1, seen_BKW[:, :, : token_BM.shape[1] - 1]], dim=2)
    return Nodes(token_BM, nodes.position_BN, mask_BKM)
