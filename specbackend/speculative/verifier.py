"""Which part of a draft tree the target agrees with."""

from dataclasses import dataclass

import torch

from specbackend import kernels
from specbackend.kernels import cpu
from specbackend.kernels.cpu import trees
from specbackend.speculative.draft_tree import MOST_NODES_OF_KERNEL, DraftTree


@dataclass(frozen=True)
class AcceptedPath:
    """`order_BN` lists the accepted nodes from the root down, then all others; the first `count_B` are the path.

    The root is always accepted, so count is at least 1, and it is also how many tokens the step emits: each node on the
    path is followed by what the target picked after it, the last of these being the bonus token.
    """

    order_BN: torch.Tensor  # int64
    count_B: torch.Tensor  # int64


def accept_path(tree: DraftTree, pick_BN: torch.Tensor) -> AcceptedPath:
    """Walk down from the root for as long as the drafted child is the target's pick.

    pick_BN: the token the target picks after each node (see sampling.pick_tokens). No walk is needed: a node is on the
    path if every node from the root to it equals its parent's pick, and drafted siblings differ, so there is one path.
    """
    if kernels.run_on(pick_BN.device) and pick_BN.shape[1] <= MOST_NODES_OF_KERNEL:
        from specbackend.kernels.accept_path import accept_path

        path = accept_path(tree.token_BN, tree.parent_BN, tree.mask_BNN, tree.drafted_BN, pick_BN)
        return AcceptedPath(path.order_BN, path.count_B)
    if cpu.serves(torch.float32, pick_BN.device):
        return AcceptedPath(*trees.accept_path(tree.token_BN, tree.parent_BN, tree.drafted_BN, pick_BN))
    agrees = tree.drafted_BN & (tree.token_BN == pick_BN.gather(1, tree.parent_BN))
    agrees[:, 0] = True
    rejected_on_path = tree.mask_BNN & ~agrees[:, None, :]
    accepted = ~rejected_on_path.any(dim=2)
    order_BN = accepted.sort(dim=1, descending=True, stable=True).indices
    return AcceptedPath(order_BN, accepted.sum(dim=1))
