"""EAGLE decoding: draft a tree, verify it in one target forward, keep the accepted path, feed the draft the truth."""

import dataclasses

import torch

from specbackend.batch import Accepted, DecodeBatch, ExtendBatch, ForwardBatch
from specbackend.cache.slots import DUMMY_SLOT
from specbackend.models.llama import TargetOutput
from specbackend.runner import TargetRunner, causal_mask, extend_forward_batch
from specbackend.sampling import SamplingBatch, pick_tokens
from specbackend.speculative.draft_tree import DraftTree, build_tree
from specbackend.speculative.drafter import Drafter
from specbackend.speculative.plain import pick_after_prompt
from specbackend.speculative.verifier import AcceptedPath, accept_path


class EagleDecoder:
    """A request of n computed tokens owns the slots of table columns [0, n + N): the last N are the tree's window.

    Accepting a path permutes the window so that the path's slots come first. Nothing is copied or freed; the scheduler
    refills the window's end before the next step.
    """

    def __init__(self, runner: TargetRunner, drafter: Drafter, num_nodes: int):
        self.runner, self.drafter, self.num_nodes = runner, drafter, num_nodes
        self.max_path = min(drafter.num_steps + 1, num_nodes)
        self._node_N = torch.arange(num_nodes, device=runner.device)
        self._causal_PP = causal_mask(self.max_path, runner.device)

    def extend(self, batch: ExtendBatch) -> Accepted:
        forward = extend_forward_batch(self.runner, batch)
        output = self.runner.forward(forward)
        accepted = pick_after_prompt(self.runner, batch, output)
        self._extend_draft_over_prompt(batch, forward, output, accepted)
        return accepted

    def decode(self, batch: DecodeBatch) -> Accepted:
        requests = batch.requests
        row_B, length_B = self.runner.rows(requests), self.runner.lengths(requests)
        root_B = torch.tensor([request.output_ids[-1] for request in requests], device=self.runner.device)
        prefix_slot_BL = self.runner.prefix_slots(requests, row_B)

        tree = build_tree(root_B, self.drafter.propose(row_B, length_B, prefix_slot_BL), self.num_nodes)
        verify = self._verify_batch(tree, row_B, length_B, prefix_slot_BL)
        output = self.runner.forward(verify)
        logits_BNV = self.runner.model.logits(output.hidden_TD).view(*tree.token_BN.shape, -1)
        sampling = SamplingBatch.of(requests, self.runner.device)
        pick_BN = pick_tokens(logits_BNV, verify.position_BQ + 1, sampling)
        path = accept_path(tree, pick_BN)
        self._keep_path(path, verify, row_B, length_B)
        accepted = Accepted(pick_BN.gather(1, path.order_BN[:, : self.max_path]), path.count_B)
        self._extend_draft(accepted, path, verify, output, row_B)
        return accepted

    def _verify_batch(self, tree: DraftTree, row_B, length_B, prefix_slot_BL) -> ForwardBatch:
        slot_BN = self.runner.table.slots[row_B[:, None], length_B[:, None] + self._node_N]
        return ForwardBatch(
            token_BQ=tree.token_BN,
            position_BQ=length_B[:, None] + tree.depth_BN,
            slot_BQ=slot_BN,
            prefix_slot_BL=prefix_slot_BL,
            prefix_len_B=length_B,
            window_slot_BW=slot_BN,
            window_mask_BQW=tree.mask_BNN,
        )

    def _keep_path(self, path: AcceptedPath, verify: ForwardBatch, row_B, length_B) -> None:
        column_BN = length_B[:, None] + self._node_N
        self.runner.table.slots[row_B[:, None], column_BN] = verify.slot_BQ.gather(1, path.order_BN)

    def _extend_draft(self, accepted: Accepted, path: AcceptedPath, verify: ForwardBatch, output, row_B) -> None:
        """Row j of the path pairs the feature of its node with the token after it; width is fixed at max_path rows."""
        node_BP = path.order_BN[:, : self.max_path]
        B, P = node_BP.shape
        offset_P = self._node_N[:P]
        valid_BP = offset_P < path.count_B[:, None]
        slot_BP = verify.slot_BQ.gather(1, node_BP).where(valid_BP, DUMMY_SLOT)
        batch = ForwardBatch(
            token_BQ=accepted.token_BP,
            position_BQ=verify.prefix_len_B[:, None] + offset_P,
            slot_BQ=slot_BP,
            prefix_slot_BL=verify.prefix_slot_BL,
            prefix_len_B=verify.prefix_len_B,
            window_slot_BW=slot_BP,
            window_mask_BQW=self._causal_PP.expand(B, P, P),
        )
        first_row_B1 = torch.arange(0, B * self.num_nodes, self.num_nodes, device=self.runner.device)[:, None]
        feature_TF = output.feature_TF[(first_row_B1 + node_BP).flatten()]
        self.drafter.extend(batch, feature_TF, row_B, last_B=path.count_B - 1)

    def _extend_draft_over_prompt(
        self, batch: ExtendBatch, forward: ForwardBatch, output: TargetOutput, accepted: Accepted
    ) -> None:
        """The prompt shifted by one: a chunk's tail is the true next prompt token, or the one just picked."""
        Q = forward.token_BQ.shape[1]
        following = []
        for request, length in zip(batch.requests, batch.chunk_lens, strict=True):
            tokens = request.all_ids[request.num_computed + 1 : request.num_computed + length + 1]
            following.append(tokens + [0] * (Q - len(tokens)))
        last_B = torch.tensor(batch.chunk_lens, device=self.runner.device) - 1
        token_BQ = torch.tensor(following, device=self.runner.device)
        tail_B1 = token_BQ.gather(1, last_B[:, None]).where(accepted.count_B[:, None] == 0, accepted.token_BP)
        token_BQ.scatter_(1, last_B[:, None], tail_B1)
        shifted = dataclasses.replace(forward, token_BQ=token_BQ)
        self.drafter.extend(shifted, output.feature_TF, self.runner.rows(batch.requests), last_B)
