"""Drafting with a small language model that reads the same tokens as the target, and shares its slot numbers."""

import torch

from specbackend.batch import Accepted, ExtendBatch, ForwardBatch, Sequences
from specbackend.cache.kv_pool import RequestTable
from specbackend.cache.slots import DUMMY_SLOT
from specbackend.config import TreeShape
from specbackend.cuda_graphs import Recorder
from specbackend.models.llama import TargetOutput
from specbackend.request import Request
from specbackend.runner import causal_mask
from specbackend.sampling import SamplingBatch
from specbackend.speculative.draft_tree import Proposal, build_tree
from specbackend.speculative.drafter import CacheRule, Verified
from specbackend.speculative.tree_growth import DraftPrefix, TreeGrower
from specbackend.speculative.tree_shapes import TreeShapes


class StandaloneDrafter:
    """Before it drafts, it reads the last P tokens of each sequence, root included: at least all that are new to it.

    P is the longest path that a step can accept, whose first node was read as the root of that step, plus the new root.
    Reading some tokens again costs nothing, as the width is fixed anyway, and saves keeping count of what is new.
    """

    is_on_device = False

    def __init__(self, grower: TreeGrower, table: RequestTable):
        self.grower, self.table = grower, table
        self.cache_rule = CacheRule(has_draft_kv=True, unfed_tokens=grower.num_steps)
        self._back_P = torch.arange(-grower.num_steps, 1, device=grower.device)

    def follow_prompt(
        self, batch: ExtendBatch, forward: ForwardBatch, output: TargetOutput, accepted: Accepted
    ) -> None:
        self._read(forward)

    def record_forwards(self, record: Recorder, batch_sizes: list[int], num_columns: int, tree: TreeShape) -> None:
        self.grower.record_forwards(record, batch_sizes, num_columns, feed_width=len(self._back_P))

    def propose(self, at: Sequences, sampling: SamplingBatch, shapes: TreeShapes) -> Proposal:
        last_B = torch.full_like(at.length_B, len(self._back_P) - 1)
        hidden_BD = self.grower.feed(self._recent(at), None, last_B)
        slot_BL = self.table.slots[at.row_B, : at.prefix_slot_BL.shape[1] + 1]  # one more: the root has been read
        candidates = self.grower.grow(at, DraftPrefix(at.length_B + 1, slot_BL, hidden_BD), sampling, shapes)
        tree = build_tree(at.root_B, candidates, shapes.num_nodes_B, shapes.most_nodes)
        return Proposal(tree, candidates)

    def follow_path(self, verified: Verified, at: Sequences) -> None:
        """Nothing to do: the next proposal reads what was accepted."""

    def keep_plain(self, output: TargetOutput, at: Sequences) -> None:
        """Nothing to do: the tokens are in the text."""

    def catch_up(self, requests: list[Request], forward: ForwardBatch) -> None:
        self._read(forward)

    def _read(self, forward: ForwardBatch) -> None:
        """For its K and V; what may follow is asked before drafting."""
        self.grower.feed(forward, None, torch.zeros_like(forward.prefix_len_B))

    def _recent(self, at: Sequences) -> ForwardBatch:
        """The last P tokens as rows on the right; a shorter sequence is padded on the left."""
        P = len(self._back_P)
        tokens = [_last(request.input_ids, request.output_ids, P) for request in at.requests]
        position_BP = at.length_B[:, None] + self._back_P
        valid_BP = position_BP >= 0
        position_BP = position_BP.clamp(min=0)
        slot_BP = self.table.slots[at.row_B[:, None], position_BP].where(valid_BP, DUMMY_SLOT)
        seen_BPP = causal_mask(P, self.grower.device) & valid_BP[:, None, :]
        own_PP = torch.eye(P, dtype=torch.bool, device=self.grower.device)
        return ForwardBatch(
            token_BQ=torch.tensor(tokens, device=self.grower.device),
            position_BQ=position_BP,
            slot_BQ=slot_BP,
            prefix_slot_BL=at.prefix_slot_BL,
            prefix_len_B=position_BP[:, 0],
            window_slot_BW=slot_BP,
            window_mask_BQW=seen_BPP | own_PP,
        )


def _last(prompt: list[int], output: list[int], count: int) -> list[int]:
    """The last `count` tokens of prompt and output, zeros in front if there are fewer."""
    tail = output[-count:]
    tail = prompt[max(0, len(prompt) - (count - len(tail))) :] + tail if len(tail) < count else tail
    return [0] * (count - len(tail)) + tail
