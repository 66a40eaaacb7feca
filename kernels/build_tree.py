"""A draft tree from the candidates of the draft loop, in one launch.

B = requests, C = candidates, N = nodes of a tree; node 0 is the root, which comes before all candidates.
"""

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from specbackend.kernels.dependent_launch import launch_options, wait_for_previous
from specbackend.kernels.rank_key import key_index, rank_key


@dataclass(frozen=True)
class DraftTree:
    token_BN: torch.Tensor  # int64
    parent_BN: torch.Tensor  # int64; lower than the node, and 0 for the root
    mask_BNN: torch.Tensor  # bool; [n, m]: m is n or one of n's ancestors
    depth_BN: torch.Tensor  # int64; the root has 0
    drafted_BN: torch.Tensor  # bool; False: only there because other trees of the batch are larger. True for the root


def build_tree_ref(
    root_token_B: torch.Tensor,
    score_BC: torch.Tensor,
    token_BC: torch.Tensor,
    parent_BC: torch.Tensor,
    num_nodes_B: torch.Tensor,
    most: int,
) -> DraftTree:
    # The root joins the candidates in front, as their best. Its parent -1 then becomes 0, and others' go up by one.
    score = torch.nn.functional.pad(score_BC, (1, 0), value=torch.inf)
    token = torch.cat([root_token_B[:, None], token_BC], dim=1)
    parent = torch.nn.functional.pad(parent_BC + 1, (1, 0))
    kept_BN, rank_BN = score.sort(dim=1, descending=True, stable=True).indices[:, :most].sort(dim=1)
    parent_BN = (kept_BN[:, None, :] < parent.gather(1, kept_BN)[:, :, None]).sum(dim=2)
    mask_BNN = _ancestor_mask_ref(parent_BN)
    return DraftTree(
        token_BN=token.gather(1, kept_BN),
        parent_BN=parent_BN,
        mask_BNN=mask_BNN,
        depth_BN=mask_BNN.sum(dim=2) - 1,
        drafted_BN=(rank_BN < num_nodes_B[:, None]) & (score.gather(1, kept_BN) > -torch.inf),
    )


def _ancestor_mask_ref(parent_BN: torch.Tensor) -> torch.Tensor:
    B, N = parent_BN.shape
    mask_BNN = torch.eye(N, dtype=torch.bool, device=parent_BN.device).repeat(B, 1, 1)
    ancestor_BN = parent_BN
    for _ in range(N - 1):
        mask_BNN.scatter_(2, ancestor_BN[:, :, None], True)
        ancestor_BN = parent_BN.gather(1, ancestor_BN)
    return mask_BNN


@triton.jit
def _build_tree_kernel(
    root_token_ptr,  # [B]
    score_ptr,  # [B, C]
    candidate_token_ptr,  # [B, C]
    candidate_parent_ptr,  # [B, C]
    num_nodes_ptr,  # [B]
    token_ptr,  # [B, N] out
    parent_ptr,  # [B, N] out
    mask_ptr,  # [B, N, N] out
    depth_ptr,  # [B, N] out
    drafted_ptr,  # [B, N] out
    C,
    N,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOG_N: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)

    # Rank: the root is candidate 0, its score is infinite, and the others' numbers go up by one.
    c = tl.arange(0, BLOCK_C)
    wait_for_previous(DEPENDENT)
    score = tl.load(score_ptr + b * C + c - 1, mask=(c > 0) & (c <= C), other=float("-inf"))
    best = key_index(tl.topk(rank_key(tl.where(c == 0, float("inf"), score), c), BLOCK_N)).to(tl.int32)

    # Keep the N best in index order. Lane n is node n from here on; lanes past the tree come last.
    n = tl.arange(0, BLOCK_N)
    kept_and_rank = tl.sort(tl.where(n < N, best * BLOCK_N + n, 2147483647))
    kept, rank = kept_and_rank // BLOCK_N, kept_and_rank % BLOCK_N
    in_tree, below_root = n < N, (n > 0) & (n < N)
    place = b * C + kept - 1
    token = tl.load(candidate_token_ptr + place, mask=below_root, other=0)
    token = tl.where(n == 0, tl.load(root_token_ptr + b), token)
    kept_score = tl.load(score_ptr + place, mask=below_root, other=float("inf"))
    drafted = (rank < tl.load(num_nodes_ptr + b)) & (kept_score > float("-inf"))
    parent_kept = tl.load(candidate_parent_ptr + place, mask=below_root, other=-1) + 1
    parent = tl.sum((kept[None, :] < parent_kept[:, None]).to(tl.int32), axis=1)

    # Ancestors: whom a node reaches in one generation, in two, in four, ... Sums of 0 and 1 are exact in float16.
    reach = ((parent[:, None] == n[None, :]) | (n[:, None] == n[None, :])).to(tl.float16)
    for _ in range(LOG_N):
        reach = (tl.dot(reach, reach) > 0).to(tl.float16)
    depth = tl.sum(reach.to(tl.int32), axis=1) - 1

    node = b * N + n
    tl.store(token_ptr + node, token, mask=in_tree)
    tl.store(parent_ptr + node, parent, mask=in_tree)
    tl.store(depth_ptr + node, depth, mask=in_tree)
    tl.store(drafted_ptr + node, drafted, mask=in_tree)
    tl.store(mask_ptr + node[:, None] * N + n[None, :], reach > 0, mask=in_tree[:, None] & in_tree[None, :])


def build_tree(
    root_token_B: torch.Tensor,
    score_BC: torch.Tensor,
    token_BC: torch.Tensor,
    parent_BC: torch.Tensor,
    num_nodes_B: torch.Tensor,
    most: int,
) -> DraftTree:
    """Keep the root and each request's num_nodes - 1 best candidates, in index order; `most` is the largest num_nodes.

    score_BC: float32; -inf: not a candidate. token_BC: int64. parent_BC: int64, index of the parent candidate, which is
    lower and scores no less; -1 below the root. num_nodes_B: int64. All are contiguous. Among equal scores the lower
    index is better, so what is kept is closed under ancestors. Trees have N = min(most, C + 1) nodes, at most 128.
    """
    inputs = (root_token_B, score_BC, token_BC, parent_BC, num_nodes_B)
    B, C = score_BC.shape
    N = min(most, C + 1)
    assert token_BC.shape == parent_BC.shape == (B, C) and root_token_B.shape == num_nodes_B.shape == (B,)
    assert 1 <= N <= 128 and all(tensor.is_contiguous() for tensor in inputs)

    def new(*shape, dtype=torch.int64):
        return torch.empty((B, N, *shape), dtype=dtype, device=score_BC.device)

    tree = DraftTree(new(), new(), new(N, dtype=torch.bool), new(), new(dtype=torch.bool))
    BLOCK_N = max(16, triton.next_power_of_2(N))  # what tl.dot takes
    _build_tree_kernel[(B,)](
        *inputs, tree.token_BN, tree.parent_BN, tree.mask_BNN, tree.depth_BN, tree.drafted_BN, C, N,
        BLOCK_C=max(BLOCK_N, triton.next_power_of_2(C + 1)), BLOCK_N=BLOCK_N, LOG_N=BLOCK_N.bit_length() - 1,
        num_warps=8 if BLOCK_N == 128 else 4, **launch_options(),
    )  # fmt: skip
    return tree


def example_inputs(B: int, K: int, num_steps: int, most: int, device="cpu", seed: int = 0) -> dict:
    """K candidates of level 1, then K * K of each further level, below the K best of the level before.

    Scores are multiples of 1/4, so many are equal; the last candidate of each request is none. Siblings' tokens differ.
    """
    g = torch.Generator().manual_seed(seed)
    parent, level_score = torch.full((B, 1), -1), torch.zeros(B, 1)
    scores, tokens, parents, num_candidates = [], [], [], 0
    for _ in range(num_steps):
        parents.append(parent.repeat_interleave(K, dim=1))
        drop = torch.randint(0, 8, parents[-1].shape, generator=g) / 4
        scores.append(level_score.repeat_interleave(K, dim=1) - drop)
        tokens.append(torch.arange(K).repeat(B, parent.shape[1]) + K * torch.randint(0, 100, (B, 1), generator=g))
        level_score, best = scores[-1].topk(K, dim=1)
        parent, num_candidates = best + num_candidates, num_candidates + scores[-1].shape[1]
    score_BC = torch.cat(scores, dim=1)
    score_BC[:, -1] = -torch.inf
    tensors = {
        "root_token_B": torch.randint(0, 1000, (B,), generator=g),
        "score_BC": score_BC,
        "token_BC": torch.cat(tokens, dim=1),
        "parent_BC": torch.cat(parents, dim=1),
        "num_nodes_B": torch.randint(1, most + 1, (B,), generator=g),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()} | {"most": most}


VARIANTS = [
    (build_tree, partial(example_inputs, B=8, K=K, num_steps=steps, most=most))
    for K, steps, most in [(4, 5, 8), (10, 12, 128)]
]
