"""Growing a draft tree with a network, level by level.

K = topk, S = num_steps, W = (S - 1) * K drafted rows, M = K * K candidates of a level, R = rows of the request table.
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
from specbackend.sampling import Nodes, SamplingBatch, likeliest
from specbackend.speculative.draft_tree import Candidates
from specbackend.speculative.tree_shapes import TreeShapes


@dataclass(frozen=True)
class DraftPrefix:
    """What the draft model has computed of each sequence: length_B tokens, at these slots."""

    length_B: torch.Tensor
    slot_BL: torch.Tensor
    hidden_BD: torch.Tensor  # the draft's hidden state at its last row, which saw the root


@dataclass(frozen=True)
class Beam:
    """The K nodes of a level that are continued, and what is known of the rows above them."""

    score_BK: torch.Tensor
    token_BK: torch.Tensor
    candidate_BK: torch.Tensor  # each node's index among all candidates
    hidden_BKD: torch.Tensor  # the draft's hidden state at the node's parent
    ancestor_BKW: torch.Tensor  # bool: the drafted rows above the node


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
        self._scratch_RW = first_scratch_slot + torch.arange(num_rows * W, device=self.device).view(num_rows, W)
        self._eager = DraftForward(model, kv_pool, attention)
        self._graphs: ForwardGraphs | None = None
        self._own_LKW = torch.eye(W, dtype=torch.bool, device=self.device).view(num_steps - 1, topk, W)

    def feed(self, batch: ForwardBatch, hidden_TD: torch.Tensor | None, last_B: torch.Tensor) -> torch.Tensor:
        """Compute true tokens. Returns hidden_BD at row last_B[b] of each sequence, after which growth may begin."""
        hidden_BQD = self._forward(batch, hidden_TD, self._eager.plan(batch))
        return hidden_BQD[torch.arange(len(last_B), device=self.device), last_B]

    def grow(self, at: Sequences, prefix: DraftPrefix, sampling: SamplingBatch, shapes: TreeShapes) -> Candidates:
        """Draft K + (S - 1) * K^2 candidates per request. Those beyond a request's own tree score -inf."""
        nodes = Nodes.roots(at.root_B, at.length_B + 1)
        logprob_B1K, token_B1K = self._children(prefix.hidden_BD[:, None], nodes, sampling)
        beam, plan = self._first_beam(shapes.within(0, logprob_B1K)[:, 0], token_B1K[:, 0], prefix.hidden_BD), None
        path_tokens = [at.root_B[:, None]]
        scores, tokens, parents = [beam.score_BK], [beam.token_BK], [torch.full_like(beam.token_BK, -1)]
        for level in range(1, shapes.most_steps):
            batch = self._level_batch(level, beam, at, prefix)
            if plan is None:
                plan = self._eager.plan(batch)
            else:
                plan.set_window_mask(batch.window_mask_BQW)
            hidden_BKD = self._forward(batch, beam.hidden_BKD.flatten(0, 1), plan)
            path_tokens.append(beam.token_BK)
            nodes = Nodes.positions((at.length_B[:, None] + (level + 1)).expand_as(beam.token_BK))
            if sampling.before_temperature:
                nodes = _with_texts(nodes, path_tokens, batch.window_mask_BQW)
            logprob_BKK, token_BKK = self._children(hidden_BKD, nodes, sampling)
            logprob_BKK = shapes.within(level, logprob_BKK)
            score_BM, token_BM = (beam.score_BK[:, :, None] + logprob_BKK).flatten(1), token_BKK.flatten(1)
            scores.append(score_BM)
            tokens.append(token_BM)
            parents.append(beam.candidate_BK[:, :, None].expand_as(token_BKK).flatten(1))
            if level < shapes.most_steps - 1:
                beam = self._next_beam(level, score_BM, token_BM, hidden_BKD, batch.window_mask_BQW, shapes)
        return Candidates(torch.cat(scores, dim=1), torch.cat(tokens, dim=1), torch.cat(parents, dim=1))

    def _children(
        self, hidden_BQD: torch.Tensor, nodes: Nodes, sampling: SamplingBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest tokens after each row: log-probabilities float32, target ids, both [B, Q, K]."""
        token_W = self.model.vocabulary.target_id_W
        logits_BQW = self.model.logits(hidden_BQD)
        likely = likeliest(self.topk, logits_BQW, token_W, self.model.config.vocab_size, nodes, sampling)
        return likely.logprob_BNK, token_W[likely.index_BNK]

    def _first_beam(self, score_BK: torch.Tensor, token_BK: torch.Tensor, hidden_BD: torch.Tensor) -> Beam:
        (B, K), W = token_BK.shape, self._scratch_RW.shape[1]
        return Beam(
            score_BK,
            token_BK,
            candidate_BK=torch.arange(K, device=self.device).expand(B, K),
            hidden_BKD=hidden_BD[:, None].expand(B, K, -1),
            ancestor_BKW=torch.zeros(B, K, W, dtype=torch.bool, device=self.device),
        )

    def _next_beam(self, level: int, score_BM, token_BM, hidden_BKD, seen_BKW, shapes: TreeShapes) -> Beam:
        """The best of a level's candidates, each with its parent's hidden state and everything its parent saw."""
        K = self.topk
        score_BK, chosen_BK = score_BM.topk(K, dim=1)
        parent_BK1 = chosen_BK.div(K, rounding_mode="floor")[:, :, None]
        return Beam(
            score_BK=shapes.within(level, score_BK[:, None])[:, 0],
            token_BK=token_BM.gather(1, chosen_BK),
            candidate_BK=chosen_BK + (K + (level - 1) * K * K),
            hidden_BKD=hidden_BKD.gather(1, parent_BK1.expand_as(hidden_BKD)),
            ancestor_BKW=seen_BKW.gather(1, parent_BK1.expand_as(seen_BKW)),
        )

    def _level_batch(self, level: int, beam: Beam, at: Sequences, prefix: DraftPrefix) -> ForwardBatch:
        """The beam's tokens as rows; all of a level sit at the same position."""
        scratch_BW = self._scratch_RW[at.row_B]
        return ForwardBatch(
            token_BQ=beam.token_BK,
            position_BQ=(prefix.length_B + (level - 1))[:, None].expand_as(beam.token_BK),
            slot_BQ=scratch_BW[:, (level - 1) * self.topk : level * self.topk],
            prefix_slot_BL=prefix.slot_BL,
            prefix_len_B=prefix.length_B,
            window_slot_BW=scratch_BW,
            window_mask_BQW=beam.ancestor_BKW | self._own_LKW[level - 1],
        )

    def record_forwards(self, record: Recorder, batch_sizes: list[int], num_columns: int, feed_width: int) -> None:
        """From now on replay feeds of so many tokens per sequence and of lone prompts, and the levels of growth."""
        hidden_size = self.model.config.hidden_size if self.model.is_head else None
        graphs = ForwardGraphs(self._eager, num_columns, hidden_size, self.dtype, self.device, record)
        graphs.record(batch_sizes, feed_width, feed_width)
        if self.num_steps > 1:
            graphs.record(batch_sizes, self.topk, self._scratch_RW.shape[1])
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
