"""Candidates as the drafter proposes them, from a draft model that is a random number generator."""

import torch

from specbackend.speculative.draft_tree import Candidates, DraftTree, build_tree


def random_candidates(B, K, num_steps, vocab_size, generator, ties=False) -> Candidates:
    """Tokens distinct among siblings; a child never scores above its parent. Ties: scores are few whole numbers."""
    score_BK, token_BK = _children(torch.zeros(B, 1), K, vocab_size, generator, ties)
    candidate_BK = torch.arange(K).expand(B, K)
    scores, tokens, parents = [score_BK], [token_BK], [torch.full((B, K), -1)]
    for level in range(1, num_steps):
        score_BM, token_BM = _children(score_BK, K, vocab_size, generator, ties)
        scores.append(score_BM)
        tokens.append(token_BM)
        parents.append(candidate_BK.repeat_interleave(K, dim=1))
        score_BK, chosen_BK = score_BM.topk(K, dim=1)
        candidate_BK = chosen_BK + K + (level - 1) * K * K
    return Candidates(torch.cat(scores, 1), torch.cat(tokens, 1), torch.cat(parents, 1))


def _children(score_BK, K, vocab_size, generator, ties):
    """K children of each node: cumulative scores and tokens, [B, nodes * K]."""
    B, nodes = score_BK.shape
    token_BPV = torch.rand(B, nodes, vocab_size, generator=generator).argsort(-1)
    logprob_BPK = -torch.randint(0, 2, (B, nodes, K), generator=generator).float()
    if not ties:
        logprob_BPK = torch.rand(B, nodes, K, generator=generator).log()
    return (score_BK[:, :, None] + logprob_BPK).flatten(1), token_BPV[:, :, :K].flatten(1)


def full_tree(root_B: torch.Tensor, candidates: Candidates, num_nodes: int) -> DraftTree:
    """No request has a smaller tree than the others."""
    tree = build_tree(root_B, candidates, torch.full_like(root_B, num_nodes), num_nodes)
    assert tree.drafted_BN.all()
    return tree


def tree_of(token_N: list[int], parent_N: list[int]) -> DraftTree:
    """One tree written by hand."""
    return DraftTree.of(
        torch.tensor([token_N]), torch.tensor([parent_N]), torch.ones(1, len(token_N), dtype=torch.bool)
    )


def lowest_child(tree: DraftTree) -> torch.Tensor:
    """int64 [B]: the drafted token below the root with the lowest id, which the noise favours no more than others."""
    below_root_BN = tree.drafted_BN & (tree.parent_BN == 0)
    below_root_BN[:, 0] = False
    return tree.token_BN.masked_fill(~below_root_BN, torch.iinfo(torch.int64).max).amin(1)


def path_to(parent_N: list[int], node: int) -> list[int]:
    """Nodes from the root down to `node`."""
    return [0] if node == 0 else path_to(parent_N, parent_N[node]) + [node]
