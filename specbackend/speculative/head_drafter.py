"""Drafting with a head (EAGLE, EAGLE-3, MTP), which is fed the target's features.

A head's row t pairs the target's feature at t with token x_{t+1}. It shares the slot of the target's row t.
"""

import dataclasses

import torch

from specbackend.batch import Accepted, ExtendBatch, ForwardBatch, Sequences
from specbackend.cache.slots import DUMMY_SLOT
from specbackend.config import TreeShape
from specbackend.cuda_graphs import Recorder
from specbackend.models.draft import HeadModel
from specbackend.models.llama import TargetOutput
from specbackend.request import Request
from specbackend.runner import causal_mask
from specbackend.sampling import SamplingBatch
from specbackend.speculative.draft_tree import Proposal, build_tree
from specbackend.speculative.drafter import MOST_UNFED, CacheRule, Verified
from specbackend.speculative.tree_growth import DraftPrefix, TreeGrower
from specbackend.speculative.tree_shapes import TreeShapes


class HeadDrafter:
    """Keeps, per table row, where the last feed left the head: the state that the next tree grows from.

    And the target's features at the last MOST_UNFED positions, as far as plain steps computed them: position t's in
    column t % MOST_UNFED.
    """

    cache_rule = CacheRule(successor_keys=True, has_draft_kv=True)
    is_on_device = True

    def __init__(self, head: HeadModel, grower: TreeGrower, feature_size: int):
        """grower: of the same head."""
        self.head, self.grower, self.device = head, grower, grower.device
        R, D, like = grower.num_rows, head.config.hidden_size, {"dtype": grower.dtype, "device": self.device}
        self.hidden_RD = torch.zeros(R, D, **like)
        self._plain_feature_RUF = torch.zeros(R, MOST_UNFED, feature_size, **like)
        self._causal_PP = causal_mask(grower.num_steps + 1, self.device)

    def follow_prompt(
        self, batch: ExtendBatch, forward: ForwardBatch, output: TargetOutput, accepted: Accepted
    ) -> None:
        """The prompt shifted by one: a chunk's tail is the true next prompt token, or the one just picked."""
        Q = forward.token_BQ.shape[1]
        following = []
        for request, length in zip(batch.requests, batch.chunk_lens, strict=True):
            tokens = request.all_ids[request.num_computed + 1 : request.num_computed + length + 1]
            following.append(tokens + [0] * (Q - len(tokens)))
        last_B = torch.tensor(batch.chunk_lens, device=self.device) - 1
        token_BQ = torch.tensor(following, device=self.device)
        tail_B1 = token_BQ.gather(1, last_B[:, None]).where(accepted.count_B[:, None] == 0, accepted.token_BP)
        token_BQ.scatter_(1, last_B[:, None], tail_B1)
        row_B = torch.tensor([request.row for request in batch.requests], device=self.device)
        self._feed(dataclasses.replace(forward, token_BQ=token_BQ), output.feature_TF, last_B, row_B)

    def record_forwards(self, record: Recorder, batch_sizes: list[int], num_columns: int, tree: TreeShape) -> None:
        self.grower.record_forwards(record, batch_sizes, num_columns, feed_width=tree.longest_path)

    def propose(self, at: Sequences, sampling: SamplingBatch, shapes: TreeShapes) -> Proposal:
        prefix = DraftPrefix(at.length_B, at.prefix_slot_BL, self.hidden_RD[at.row_B])
        candidates = self.grower.grow(at, prefix, sampling, shapes)
        tree = build_tree(at.root_B, candidates, shapes.num_nodes_B, shapes.most_nodes)
        return Proposal(tree, candidates)

    def follow_path(self, verified: Verified, at: Sequences) -> None:
        """Row j of the path pairs the feature of its node with the token after it; the width is fixed."""
        verify, path, accepted = verified.forward, verified.path, verified.accepted
        B, P = accepted.token_BP.shape
        N = path.order_BN.shape[1]
        node_BP = path.order_BN[:, :P]
        offset_P = torch.arange(P, device=self.device)
        slot_BP = verify.slot_BQ.gather(1, node_BP).where(offset_P < path.count_B[:, None], DUMMY_SLOT)
        batch = ForwardBatch(
            token_BQ=accepted.token_BP,
            position_BQ=at.length_B[:, None] + offset_P,
            slot_BQ=slot_BP,
            prefix_slot_BL=at.prefix_slot_BL,
            prefix_len_B=at.length_B,
            window_slot_BW=slot_BP,
            window_mask_BQW=self._causal_PP[:P, :P].expand(B, P, P),
            window_is_causal=True,
        )
        first_row_B1 = torch.arange(0, B * N, N, device=self.device)[:, None]
        feature_TF = verified.output.feature_TF[(first_row_B1 + node_BP).flatten()]
        self._feed(batch, feature_TF, path.count_B - 1, at.row_B)

    def keep_plain(self, output: TargetOutput, at: Sequences) -> None:
        self._plain_feature_RUF[at.row_B, at.length_B % MOST_UNFED] = output.feature_TF

    def catch_up(self, requests: list[Request], forward: ForwardBatch) -> None:
        Q = forward.token_BQ.shape[1]
        following = [request.all_ids[-request.num_unfed :] + [0] * (Q - request.num_unfed) for request in requests]
        last_B = torch.tensor([request.num_unfed for request in requests], device=self.device) - 1
        row_B = torch.tensor([request.row for request in requests], device=self.device)
        feature_BQF = self._plain_feature_RUF[row_B[:, None], forward.position_BQ % MOST_UNFED]
        batch = dataclasses.replace(forward, token_BQ=torch.tensor(following, device=self.device))
        self._feed(batch, feature_BQF.flatten(0, 1), last_B, row_B)

    def _feed(self, batch: ForwardBatch, feature_TF: torch.Tensor, last_B, row_B) -> None:
        self.hidden_RD[row_B] = self.grower.feed(batch, self.head.fuse(feature_TF), last_B)
