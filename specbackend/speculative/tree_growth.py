"""Growing a draft tree with a network, level by level.

K = topk, S = num_steps, W = (S - 1) * K drafted rows, M = K * K candidates of a level, R = rows of the request table.
Level 1 is known when growth begins. Each further level runs K rows of the draft model, which see the prefix and their
own ancestors among the drafted rows, nothing else. Drafted K and V live in scratch slots and are never kept.

Candidates compete by the draft's estimate of the chance that the target picks them. So they are scored at the
temperature at which it picks; at 1 that is the published algorithm.
"""

from dataclasses import dataclass

import torch

from specbackend.attention.base import AttentionBackend, AttentionPlan
from specbackend.batch import ForwardBatch
from specbackend.cache.kv_pool import KVPool
from specbackend.models.draft import DraftModel
from specbackend.speculative.draft_tree import Candidates

# At temperature 0 a score of 1 for the best token and 0 for the rest would leave a chain. The demo's EAGLE-3 head
# accepts 3.76 tokens a step when scored at 1, and 4.08 at 0.2, 0.3 or 0.5.
LOWEST_TEMPERATURE = 0.5


@dataclass(frozen=True)
class DraftPrefix:
    """What the draft model has computed of each sequence: length_B tokens, at these slots."""

    row_B: torch.Tensor
    length_B: torch.Tensor
    slot_BL: torch.Tensor
    temperature_B: torch.Tensor  # float32, of the request


@dataclass(frozen=True)
class FirstLevel:
    """The likeliest tokens after the prefix and a root the draft was fed, and the draft's hidden state there."""

    logprob_BK: torch.Tensor  # float32
    token_BK: torch.Tensor  # int64
    hidden_BD: torch.Tensor


@dataclass(frozen=True)
class Beam:
    """The K nodes of a level that are continued."""

    score_BK: torch.Tensor
    token_BK: torch.Tensor
    candidate_BK: torch.Tensor  # each node's index among all candidates
    hidden_BKD: torch.Tensor  # the draft's hidden state at the node's parent
    ancestor_BKW: torch.Tensor  # bool: the drafted rows above the node


def num_scratch_slots(num_steps: int, topk: int) -> int:
    """Draft slots that one request needs while a tree is drafted."""
    return (num_steps - 1) * topk


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
        self.model, self.kv_pool, self.attention = model, kv_pool, attention
        self.num_rows, self.num_steps, self.topk = num_rows, num_steps, topk
        self.dtype, self.device = model.vocabulary.lm_head_WD.dtype, model.vocabulary.lm_head_WD.device
        W = num_scratch_slots(num_steps, topk)
        self._scratch_RW = first_scratch_slot + torch.arange(num_rows * W, device=self.device).view(num_rows, W)
        self._own_LKW = torch.eye(W, dtype=torch.bool, device=self.device).view(num_steps - 1, topk, W)

    def feed(
        self, batch: ForwardBatch, hidden_TD: torch.Tensor | None, last_B: torch.Tensor, temperature_B: torch.Tensor
    ) -> FirstLevel:
        """Compute true tokens; growth may begin after row last_B[b] of each sequence."""
        hidden_BQD = self._forward(batch, hidden_TD, self.attention.plan(batch, self.dtype))
        last_BD = hidden_BQD[torch.arange(len(last_B), device=self.device), last_B]
        logprob_BK, token_BK = self.model.top_tokens(last_BD, self.topk, _scoring(temperature_B)[:, None])
        return FirstLevel(logprob_BK, token_BK, last_BD)

    def grow(self, first: FirstLevel, prefix: DraftPrefix) -> Candidates:
        """Draft K + (S - 1) * K^2 candidates per request."""
        beam, plan, temperature_B11 = self._first_beam(first), None, _scoring(prefix.temperature_B)[:, None, None]
        scores, tokens, parents = [beam.score_BK], [beam.token_BK], [torch.full_like(beam.token_BK, -1)]
        for level in range(1, self.num_steps):
            batch = self._level_batch(level, beam, prefix)
            if plan is None:
                plan = self.attention.plan(batch, self.dtype)
            else:
                plan.set_window_mask(batch.window_mask_BQW)
            hidden_BKD = self._forward(batch, beam.hidden_BKD.flatten(0, 1), plan)
            logprob_BKK, token_BKK = self.model.top_tokens(hidden_BKD, self.topk, temperature_B11)
            score_BM, token_BM = (beam.score_BK[:, :, None] + logprob_BKK).flatten(1), token_BKK.flatten(1)
            scores.append(score_BM)
            tokens.append(token_BM)
            parents.append(beam.candidate_BK[:, :, None].expand_as(token_BKK).flatten(1))
            if level < self.num_steps - 1:
                beam = self._next_beam(level, score_BM, token_BM, hidden_BKD, batch.window_mask_BQW)
        return Candidates(torch.cat(scores, dim=1), torch.cat(tokens, dim=1), torch.cat(parents, dim=1))

    def _first_beam(self, first: FirstLevel) -> Beam:
        (B, K), W = first.token_BK.shape, self._scratch_RW.shape[1]
        return Beam(
            score_BK=first.logprob_BK,
            token_BK=first.token_BK,
            candidate_BK=torch.arange(K, device=self.device).expand(B, K),
            hidden_BKD=first.hidden_BD[:, None].expand(B, K, -1),
            ancestor_BKW=torch.zeros(B, K, W, dtype=torch.bool, device=self.device),
        )

    def _next_beam(self, level: int, score_BM, token_BM, hidden_BKD, seen_BKW) -> Beam:
        """The K best of a level's candidates, each with its parent's hidden state and everything its parent saw."""
        K = self.topk
        score_BK, chosen_BK = score_BM.topk(K, dim=1)
        parent_BK1 = chosen_BK.div(K, rounding_mode="floor")[:, :, None]
        return Beam(
            score_BK=score_BK,
            token_BK=token_BM.gather(1, chosen_BK),
            candidate_BK=chosen_BK + (K + (level - 1) * K * K),
            hidden_BKD=hidden_BKD.gather(1, parent_BK1.expand_as(hidden_BKD)),
            ancestor_BKW=seen_BKW.gather(1, parent_BK1.expand_as(seen_BKW)),
        )

    def _level_batch(self, level: int, beam: Beam, prefix: DraftPrefix) -> ForwardBatch:
        """The beam's tokens as rows; all of a level sit at the same position."""
        scratch_BW = self._scratch_RW[prefix.row_B]
        return ForwardBatch(
            token_BQ=beam.token_BK,
            position_BQ=(prefix.length_B + (level - 1))[:, None].expand_as(beam.token_BK),
            slot_BQ=scratch_BW[:, (level - 1) * self.topk : level * self.topk],
            prefix_slot_BL=prefix.slot_BL,
            prefix_len_B=prefix.length_B,
            window_slot_BW=scratch_BW,
            window_mask_BQW=beam.ancestor_BKW | self._own_LKW[level - 1],
        )

    def _forward(self, batch: ForwardBatch, hidden_TD: torch.Tensor | None, plan: AttentionPlan) -> torch.Tensor:
        hidden_TD = self.model.forward(batch, hidden_TD, plan, self.kv_pool)
        return hidden_TD.view(*batch.token_BQ.shape, -1)


def _scoring(temperature_B: torch.Tensor) -> torch.Tensor:
    return temperature_B.clamp(min=LOWEST_TEMPERATURE)
