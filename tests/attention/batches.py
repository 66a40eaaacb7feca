"""Random forward batches of every kind that decoders make, over a pool whose slots lie in no order."""

from dataclasses import replace

import torch

from specbackend.batch import ForwardBatch
from specbackend.cache.slots import DUMMY_SLOT
from specbackend.runner import causal_mask
from specbackend.speculative.draft_tree import DraftTree

NUM_SLOTS = 500


def chunks(prefix_lens: list[int], chunk_lens: list[int], generator) -> ForwardBatch:
    """Prompt chunks, padded on the right; of length 1 each they are a plain decode step."""
    B, Q = len(prefix_lens), max(chunk_lens)
    batch = _batch(prefix_lens, Q, Q, causal_mask(Q, "cpu").expand(B, Q, Q), generator)
    padded_BQ = torch.arange(Q) >= torch.tensor(chunk_lens)[:, None]
    slot_BQ = batch.slot_BQ.masked_fill(padded_BQ, DUMMY_SLOT)
    return replace(batch, slot_BQ=slot_BQ, window_slot_BW=slot_BQ, window_is_causal=True)


def trees(prefix_lens: list[int], num_nodes: int, generator) -> ForwardBatch:
    B, N = len(prefix_lens), num_nodes
    parent_BN = torch.stack([_random_parents(N, generator) for _ in range(B)])
    tree = DraftTree.of(torch.zeros(B, N, dtype=torch.int64), parent_BN, torch.ones(B, N, dtype=torch.bool))
    return _batch(prefix_lens, N, N, tree.mask_BNN, generator)


def draft_level(prefix_lens: list[int], topk: int, num_levels: int, generator) -> ForwardBatch:
    """Rows of the first of the levels that share a window; `level_mask` shows the others theirs."""
    B, W = len(prefix_lens), topk * num_levels
    return _batch(prefix_lens, topk, W, level_mask(B, topk, num_levels, 0, generator), generator)


def level_mask(B: int, topk: int, num_levels: int, level: int, generator) -> torch.Tensor:
    """Each row sees itself and random rows of the levels before: bool [B, K, W]."""
    W = topk * num_levels
    above_BKW = torch.rand(B, topk, W, generator=generator) < 0.5
    above_BKW[:, :, level * topk :] = False
    return above_BKW | torch.eye(W, dtype=torch.bool)[level * topk : (level + 1) * topk]


def to(device: torch.device, batch: ForwardBatch) -> ForwardBatch:
    tensors = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return replace(batch, **tensors)


def _random_parents(num_nodes: int, generator) -> torch.Tensor:
    parents = [-1] + [int(torch.randint(0, node, (), generator=generator)) for node in range(1, num_nodes)]
    return torch.tensor(parents)


def _batch(prefix_lens: list[int], Q: int, W: int, window_mask_BQW: torch.Tensor, generator) -> ForwardBatch:
    B, L = len(prefix_lens), max(prefix_lens)
    slot_BC = (torch.randperm(NUM_SLOTS - 1, generator=generator)[: B * (L + W)] + 1).view(B, L + W)
    return ForwardBatch(
        token_BQ=torch.zeros(B, Q, dtype=torch.int64),
        position_BQ=torch.zeros(B, Q, dtype=torch.int64),
        slot_BQ=slot_BC[:, L : L + Q],
        prefix_slot_BL=slot_BC[:, :L],
        prefix_len_B=torch.tensor(prefix_lens),
        window_slot_BW=slot_BC[:, L:],
        window_mask_BQW=window_mask_BQW,
    )
