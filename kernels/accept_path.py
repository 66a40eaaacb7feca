"""Which part of a draft tree the target agrees with.

B = requests, N = nodes of a tree. Node 0 is the root; a parent has a lower index than its children, and siblings have
distinct tokens.
"""

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from specbackend.kernels import build_tree
from specbackend.kernels.dependent_launch import launch_options, wait_for_previous


@dataclass(frozen=True)
class AcceptedPath:
    """`order_BN` lists the accepted nodes from the root down, then all others; the first `count_B` are the path."""

    order_BN: torch.Tensor  # int64
    count_B: torch.Tensor  # int64


def accept_path_ref(
    token_BN: torch.Tensor,
    parent_BN: torch.Tensor,
    mask_BNN: torch.Tensor,
    drafted_BN: torch.Tensor,
    pick_BN: torch.Tensor,
) -> AcceptedPath:
    """A node is on the path if it and all its ancestors equal what was picked after their parents."""
    agrees_BN = drafted_BN & (token_BN == pick_BN.gather(1, parent_BN))
    agrees_BN[:, 0] = True
    accepted_BN = ~(mask_BNN & ~agrees_BN[:, None, :]).any(dim=2)
    order_BN = accepted_BN.sort(dim=1, descending=True, stable=True).indices
    return AcceptedPath(order_BN, accepted_BN.sum(dim=1))


@triton.jit
def _accept_path_kernel(
    token_ptr,  # [B, N]
    parent_ptr,  # [B, N]
    mask_ptr,  # [B, N, N]
    drafted_ptr,  # [B, N]
    pick_ptr,  # [B, N]
    order_ptr,  # [B, N] out
    count_ptr,  # [B] out
    N,
    BLOCK_N: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    in_tree = n < N
    wait_for_previous(DEPENDENT)
    token = tl.load(token_ptr + b * N + n, mask=in_tree)
    drafted = tl.load(drafted_ptr + b * N + n, mask=in_tree, other=0) != 0
    parent = tl.load(parent_ptr + b * N + n, mask=in_tree, other=0)
    pick = tl.load(pick_ptr + b * N + parent, mask=in_tree)
    agrees = (drafted & (token == pick)) | (n == 0)

    row, ancestor = n[:, None], n[None, :]
    mask = tl.load(mask_ptr + (b * N + row) * N + ancestor, mask=(row < N) & (ancestor < N), other=0) != 0
    num_rejected = tl.sum((mask & ~agrees[None, :]).to(tl.int32), axis=1)
    accepted = ((num_rejected == 0) & in_tree).to(tl.int64)
    count = tl.sum(accepted)
    accepted_before = tl.cumsum(accepted) - accepted
    place = tl.where(accepted == 1, accepted_before, count + n - accepted_before)
    tl.store(order_ptr + b * N + place, n.to(tl.int64), mask=in_tree)
    tl.store(count_ptr + b, count)


def accept_path(
    token_BN: torch.Tensor,
    parent_BN: torch.Tensor,
    mask_BNN: torch.Tensor,
    drafted_BN: torch.Tensor,
    pick_BN: torch.Tensor,
) -> AcceptedPath:
    """Return the nodes, from the root down, for as long as the drafted child is the target's pick.

    token_BN, parent_BN and pick_BN: int64; what the target picks after a node. mask_BNN: bool; [n, m]: m is n or one of
    n's ancestors. drafted_BN: bool; False for nodes that only fill up the tree. All are contiguous; N is at most 128.
    """
    tensors = (token_BN, parent_BN, mask_BNN, drafted_BN, pick_BN)
    B, N = token_BN.shape
    assert parent_BN.shape == drafted_BN.shape == pick_BN.shape == (B, N) and mask_BNN.shape == (B, N, N)
    assert N <= 128 and all(tensor.is_contiguous() for tensor in tensors)
    path = AcceptedPath(torch.empty_like(token_BN), torch.empty(B, dtype=torch.int64, device=token_BN.device))
    BLOCK_N = triton.next_power_of_2(N)
    _accept_path_kernel[(B,)](
        *tensors, path.order_BN, path.count_B, N,
        BLOCK_N=BLOCK_N, num_warps=8 if BLOCK_N == 128 else 4, **launch_options(),
    )  # fmt: skip
    return path


def example_inputs(B: int, N: int, K: int, num_steps: int, device="cpu", seed: int = 0) -> dict:
    """Random trees, of which the target follows a random path for three nodes in four."""
    tree = build_tree.build_tree_ref(**build_tree.example_inputs(B, K, num_steps, N, seed=seed))
    g = torch.Generator().manual_seed(seed)
    pick_BN = torch.full_like(tree.token_BN, -1)
    for b in range(B):
        for node in range(1, tree.token_BN.shape[1]):
            if torch.rand((), generator=g) < 0.75:
                pick_BN[b, tree.parent_BN[b, node]] = tree.token_BN[b, node]
    tensors = {
        "token_BN": tree.token_BN,
        "parent_BN": tree.parent_BN,
        "mask_BNN": tree.mask_BNN,
        "drafted_BN": tree.drafted_BN,
        "pick_BN": pick_BN,
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


VARIANTS = [
    (accept_path, partial(example_inputs, B=8, N=N, K=K, num_steps=steps)) for N, K, steps in [(8, 4, 5), (128, 10, 12)]
]
