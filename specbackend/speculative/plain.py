"""Decoding without a draft: one row per request and step. The oracle for everything speculative."""

import torch

from specbackend.batch import Accepted, DecodeBatch, ExtendBatch, ForwardBatch, Sequences
from specbackend.models.llama import TargetOutput
from specbackend.runner import TargetRunner, extend_forward_batch
from specbackend.sampling import Nodes, SamplingBatch, note_prompt_logprobs, pick_from, picked_logprobs, target_logits
from specbackend.speculative.decoder import EagerDecoder
from specbackend.speculative.drafter import Drafter
from specbackend.speculative.tree_shapes import TreeShapes


class PlainDecoder(EagerDecoder):
    num_nodes = 1
    is_on_device = True

    def __init__(self, runner: TargetRunner, drafter: Drafter | None = None):
        """drafter: one that goes on, some time, where these steps lead."""
        self.runner, self._drafter = runner, drafter

    def extend(self, batch: ExtendBatch) -> Accepted:
        forward = extend_forward_batch(self.runner, batch)
        return pick_after_prompt(self.runner, batch, self.runner.forward(forward))

    def decode(self, batch: DecodeBatch) -> Accepted:
        at = self.runner.sequences(batch.requests)
        return self.step(at, SamplingBatch.of(batch.requests, self.runner.device))

    def step(self, at: Sequences, sampling: SamplingBatch, shapes: TreeShapes | None = None) -> Accepted:
        """`decode` without the host's part. shapes: there are no trees here."""
        runner = self.runner
        slot_B1 = runner.table.slots[at.row_B, at.length_B][:, None]
        forward = ForwardBatch(
            token_BQ=at.root_B[:, None],
            position_BQ=at.length_B[:, None],
            slot_BQ=slot_B1,
            prefix_slot_BL=at.prefix_slot_BL,
            prefix_len_B=at.length_B,
            window_slot_BW=slot_B1,
            window_mask_BQW=torch.ones_like(slot_B1, dtype=torch.bool)[:, None],
            window_is_causal=True,
        )
        output = runner.forward(forward)
        if self._drafter:
            self._drafter.keep_plain(output, at)
        logits_BV = runner.model.logits(output.hidden_TD)
        nodes = Nodes.roots(at.root_B, at.length_B + 1)
        return _pick_one(logits_BV, nodes, sampling, torch.ones_like(at.length_B))


def pick_after_prompt(runner: TargetRunner, batch: ExtendBatch, output: TargetOutput) -> Accepted:
    """Pick the token after each final chunk; non-final chunks count 0 tokens."""
    B = len(batch.requests)
    chunk_len_B = torch.tensor(batch.chunk_lens, device=runner.device)
    hidden_BQD = output.hidden_TD.view(B, -1, output.hidden_TD.shape[-1])
    note_prompt_logprobs(batch, hidden_BQD, runner.model.logits)
    last_BD = hidden_BQD[torch.arange(B, device=runner.device), chunk_len_B - 1]
    position_B = runner.lengths(batch.requests) + chunk_len_B
    root_B = torch.tensor([(r.output_ids or r.input_ids)[-1] for r in batch.requests], device=runner.device)
    nodes, sampling = Nodes.roots(root_B, position_B), SamplingBatch.of(batch.requests, runner.device)
    final_B = torch.tensor([batch.is_final(i) for i in range(B)], device=runner.device)
    return _pick_one(runner.model.logits(last_BD), nodes, sampling, final_B.long())


def _pick_one(logits_BV: torch.Tensor, nodes: Nodes, sampling: SamplingBatch, count_B: torch.Tensor) -> Accepted:
    logits_B1V = target_logits(logits_BV[:, None], nodes, sampling)
    token_B1 = pick_from(logits_B1V, nodes, sampling)
    return Accepted(token_B1, count_B, picked_logprobs(logits_B1V, torch.zeros_like(token_B1), token_B1, sampling))
