"""Speculative decoding: draft a tree, verify it in one target forward, keep the accepted path, tell the drafter."""

import dataclasses

import torch

from specbackend.batch import Accepted, DecodeBatch, ExtendBatch, ForwardBatch, Sequences, traced_rows
from specbackend.runner import TargetRunner, extend_forward_batch
from specbackend.sampling import Nodes, SamplingBatch, pick_from, picked_logprobs, target_logits
from specbackend.speculative.decoder import EagerDecoder
from specbackend.speculative.draft_tree import DraftTree
from specbackend.speculative.drafter import Drafter, Verified
from specbackend.speculative.plain import pick_after_prompt
from specbackend.speculative.tracer import NOBODY, Observer, Tracer
from specbackend.speculative.tree_shapes import TreeShapes, shapes_of
from specbackend.speculative.verifier import accept_path


class TreeDecoder(EagerDecoder):
    """A request of n computed tokens owns the slots of table columns [0, n + N): the last N are the tree's window.

    Accepting a path permutes the window so that the path's slots come first. Nothing is copied or freed; the scheduler
    refills the window's end before the next step.
    """

    def __init__(self, runner: TargetRunner, drafter: Drafter, num_nodes: int):
        self.runner, self.drafter, self.num_nodes = runner, drafter, num_nodes
        self.is_on_device = drafter.is_on_device
        self._node_N = torch.arange(num_nodes, device=runner.device)

    def extend(self, batch: ExtendBatch) -> Accepted:
        forward = extend_forward_batch(self.runner, batch)
        output = self.runner.forward(forward)
        accepted = pick_after_prompt(self.runner, batch, output)
        self.drafter.follow_prompt(batch, forward, output, accepted)
        return accepted

    def decode(self, batch: DecodeBatch) -> Accepted:
        at, device = self.runner.sequences(batch.requests), self.runner.device
        shapes = shapes_of(tuple(request.tree for request in batch.requests), device)
        sampling, rows = SamplingBatch.of(batch.requests, device), traced_rows(batch.requests)
        if not rows:
            return self.step(at, sampling, shapes)
        tracer = Tracer(rows, sampling, batch.started_ns)
        return dataclasses.replace(self.step(at, sampling, shapes, tracer), rounds=tracer.rounds)

    def step(self, at: Sequences, sampling: SamplingBatch, shapes: TreeShapes, observer: Observer = NOBODY) -> Accepted:
        """`decode` without the host's part: if `is_on_device`, a graph can hold it."""
        proposal = self.drafter.propose(at, sampling, shapes)
        observer.drafted(proposal)
        tree = proposal.tree
        verify = self._verify_batch(tree, at)
        output = self.runner.forward(verify)
        logits_BNV = self.runner.model.logits(output.hidden_TD).view(*tree.token_BN.shape, -1)
        nodes = Nodes(tree.token_BN, verify.position_BQ + 1, tree.mask_BNN)
        logits_BNV = target_logits(logits_BNV, nodes, sampling)
        pick_BN = pick_from(logits_BNV, nodes, sampling)
        path = accept_path(tree, pick_BN)
        self.runner.table.permute_windows(at.row_B, at.length_B, verify.slot_BQ, path.order_BN)
        node_BP = path.order_BN[:, : shapes.longest_path]
        token_BP = pick_BN.gather(1, node_BP)
        logprobs = picked_logprobs(logits_BNV, node_BP, token_BP, sampling)
        accepted = Accepted(token_BP, path.count_B, logprobs)
        observer.verified(logits_BNV, path)
        self.drafter.follow_path(Verified(verify, output, path, accepted), at)
        observer.extended()
        return accepted

    def _verify_batch(self, tree: DraftTree, at: Sequences) -> ForwardBatch:
        node_N = self._node_N[: tree.token_BN.shape[1]]
        slot_BN = self.runner.table.slots[at.row_B[:, None], at.length_B[:, None] + node_N]
        return ForwardBatch(
            token_BQ=tree.token_BN,
            position_BQ=at.length_B[:, None] + tree.depth_BN,
            slot_BQ=slot_BN,
            prefix_slot_BL=at.prefix_slot_BL,
            prefix_len_B=at.length_B,
            window_slot_BW=slot_BN,
            window_mask_BQW=tree.mask_BNN,
        )
