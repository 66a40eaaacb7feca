"""Each request's own draft tree, within the server's."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from specbackend.config import TREE, EngineConfig, TreeShape
from specbackend.errors import InvalidRequest
from specbackend.sampling_params import SamplingParams


@dataclass(frozen=True)
class TreeShapes:
    """The trees of a batch. What is computed is as large as the largest; smaller ones leave the rest unused."""

    num_steps_B: torch.Tensor  # int64
    topk_B: torch.Tensor  # int64
    num_nodes_B: torch.Tensor  # int64
    most_steps: int
    most_nodes: int
    fewest_steps: int
    fewest_topk: int
    longest_path: int  # of any of them

    @classmethod
    def of(cls, trees: Sequence[TreeShape], device: torch.device) -> "TreeShapes":
        steps, topks, nodes = zip(*((tree.num_steps, tree.topk, tree.num_nodes) for tree in trees), strict=True)
        size_3B = torch.tensor([steps, topks, nodes], device=device)
        longest_path = max(tree.longest_path for tree in trees)
        return cls(*size_3B, max(steps), max(nodes), min(steps), min(topks), longest_path)

    def within(self, level: int, score_BQK: torch.Tensor) -> torch.Tensor:
        """-inf for what is not the best topk of K, or deeper than num_steps; levels count from 0."""
        if score_BQK.shape[2] <= self.fewest_topk and level < self.fewest_steps:
            return score_BQK
        rank_K = torch.arange(score_BQK.shape[2], device=score_BQK.device)
        within_BK = (rank_K < self.topk_B[:, None]) & (level < self.num_steps_B[:, None])
        return score_BQK.masked_fill(~within_BK[:, None], -torch.inf)


@lru_cache(maxsize=64)
def shapes_of(trees: tuple[TreeShape, ...], device: torch.device) -> TreeShapes:
    """As `TreeShapes.of`, but from step to step the same. Nobody writes to them."""
    return TreeShapes.of(trees, device)


def tree_of(params: SamplingParams, config: EngineConfig) -> TreeShape | None:
    """The tree that a request drafts; None if it decodes plainly. Raises InvalidRequest, naming the field."""
    server = config.tree
    asked = {name: getattr(params, name) for name in TREE if getattr(params, name) is not None}
    if server is None:
        if asked:
            raise InvalidRequest(next(iter(asked)), "this server does not speculate (speculative_algorithm)")
        return None
    limits = dict(zip(TREE, (server.num_steps, server.topk, server.num_nodes), strict=True))
    for name, value in asked.items():
        if config.speculative_algorithm == "NGRAM" and name != "speculative_num_draft_tokens":
            raise InvalidRequest(name, "NGRAM takes its trees from the text")
        if value > limits[name]:
            raise InvalidRequest(name, f"must be at most the server's {limits[name]}, got {value}")
    if not params.speculative or asked.get("speculative_num_draft_tokens") == 1:
        return None
    if config.speculative_algorithm == "NGRAM":
        num_nodes = asked.get("speculative_num_draft_tokens", server.num_nodes)
        return TreeShape(num_nodes - 1, 1, num_nodes)
    return _fitting(*(asked.get(name) for name in TREE), server)


def _fitting(num_steps: int | None, topk: int | None, num_nodes: int | None, server: TreeShape) -> TreeShape:
    """What is not given is as large as the server and the rest allow."""
    topk = topk or server.topk
    if topk == 1 and num_steps is None and num_nodes is not None:
        num_steps = min(server.num_steps, num_nodes - 1)
    num_steps = num_steps or server.num_steps
    drafted = num_steps if topk == 1 else topk + (num_steps - 1) * topk * topk
    num_nodes = num_nodes or min(server.num_nodes, drafted + 1)
    if num_nodes - 1 > drafted:
        message = f"{num_steps} steps of topk {topk} draft {drafted} tokens, too few for {num_nodes - 1} below the root"
        raise InvalidRequest("speculative_num_draft_tokens", message)
    return TreeShape(min(num_steps, num_nodes - 1), topk, num_nodes)
