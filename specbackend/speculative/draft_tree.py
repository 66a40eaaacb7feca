r"""Draft trees as tensors.

                 root: the last token the target picked, not yet in the KV pool
                /    \
               1      2          parent_BN = [0, 0, 0, 1, 1, 3]
              / \                (the root counts as its own parent)
             3   4
             |
             5

A tree is one parent array and its tokens. A parent has a lower index than its children; siblings have distinct tokens.
B = requests, N = nodes, K = topk, C = candidates.
"""

from dataclasses import dataclass

import torch

from specbackend import kernels
from specbackend.kernels import cpu
from specbackend.kernels.cpu import trees

MOST_NODES_OF_KERNEL = 128


@dataclass(frozen=True)
class DraftTree:
    """N nodes per request, node 0 is the root."""

    token_BN: torch.Tensor  # int64
    parent_BN: torch.Tensor  # int64
    mask_BNN: torch.Tensor  # bool; [n, m]: m is n or one of n's ancestors
    depth_BN: torch.Tensor  # int64; the root has 0
    drafted_BN: torch.Tensor  # bool; False: only there because other trees of the batch are larger. True for the root

    @classmethod
    def of(cls, token_BN: torch.Tensor, parent_BN: torch.Tensor, drafted_BN: torch.Tensor) -> "DraftTree":
        mask_BNN = ancestor_mask(parent_BN)
        return cls(token_BN, parent_BN, mask_BNN, depth_BN=mask_BNN.sum(dim=2) - 1, drafted_BN=drafted_BN)


@dataclass(frozen=True)
class Candidates:
    """Everything the draft loop proposed, level by level: K of level 1, then K * K of each further level."""

    score_BC: torch.Tensor  # float32, log-probability of the whole path down to the candidate; -inf: not a candidate
    token_BC: torch.Tensor  # int64
    parent_BC: torch.Tensor  # int64, index of the parent candidate; -1 below the root

    @classmethod
    def of_levels(cls, levels: list["Candidates"]) -> "Candidates":
        fields = zip(*(vars(level).values() for level in levels), strict=True)
        return cls(*(torch.cat(of_levels, dim=1) for of_levels in fields))


@dataclass(frozen=True)
class Proposal:
    """A tree, and what it was kept of."""

    tree: DraftTree
    candidates: Candidates | None = None  # None: nobody has weighed them

    @property
    def logprob_BN(self) -> torch.Tensor | None:
        """float32: how likely each drafted node is after its parent, by the draft. 0 of the root."""
        if self.candidates is None:
            return None
        parent_BN = self.tree.parent_BN
        kept, _ = _best(self.candidates, parent_BN.shape[1] - 1)
        path_BN = torch.nn.functional.pad(self.candidates.score_BC.gather(1, kept), (1, 0))
        return path_BN - path_BN.gather(1, parent_BN)


def build_tree(root_token_B: torch.Tensor, candidates: Candidates, num_nodes_B: torch.Tensor, most: int) -> DraftTree:
    """Keep the root and each request's num_nodes - 1 best candidates, in index order; `most` is the largest num_nodes.

    A child never scores above its parent and never comes before it, so with ties broken by index (a stable sort) the
    kept set is closed under ancestors. Source: EAGLE-2's reranking, SafeAILab/EAGLE `topK_genrate`.
    """
    inputs = (root_token_B, candidates.score_BC, candidates.token_BC, candidates.parent_BC, num_nodes_B, most)
    if kernels.run_on(root_token_B.device) and most <= MOST_NODES_OF_KERNEL:
        from specbackend.kernels.build_tree import build_tree

        return DraftTree(**vars(build_tree(*inputs)))
    if cpu.serves(candidates.score_BC.dtype, root_token_B.device):
        return DraftTree(*trees.build_tree(*inputs))
    kept, rank = _best(candidates, most - 1)
    drafted = (rank < num_nodes_B[:, None] - 1) & (candidates.score_BC.gather(1, kept) > -torch.inf)
    parent_candidate = candidates.parent_BC.gather(1, kept)
    parent = torch.searchsorted(kept, parent_candidate) + 1  # place among the kept, after the root
    parent.masked_fill_(parent_candidate < 0, 0)
    root_parent = torch.zeros_like(root_token_B)[:, None]
    token_BN = torch.cat([root_token_B[:, None], candidates.token_BC.gather(1, kept)], dim=1)
    parent_BN = torch.cat([root_parent, parent], dim=1)
    drafted_BN = torch.cat([torch.ones_like(root_parent, dtype=torch.bool), drafted], dim=1)
    return DraftTree.of(token_BN, parent_BN, drafted_BN)


def _best(candidates: Candidates, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [B, count]: the indices of the best in ascending order, and how many are better than each."""
    ranked = candidates.score_BC.sort(dim=1, descending=True, stable=True)
    best = ranked.indices[:, :count].sort(dim=1)
    return best.values, best.indices


def ancestor_mask(parent_BN: torch.Tensor) -> torch.Tensor:
    """bool [B, N, N]: which nodes lie on each node's path from the root, itself included."""
    N = parent_BN.shape[1]
    node = torch.arange(N, device=parent_BN.device)
    reach = ((parent_BN[:, :, None] == node) | (node[:, None] == node)).float()  # one generation up
    generations = 1
    while generations < N - 1:
        reach = torch.bmm(reach, reach).clamp_(max=1)
        generations *= 2
    return reach > 0
