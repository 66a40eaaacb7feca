"""Which of a draft tree's nodes are continued: the best of each level.

P = nodes of a level, which is the root alone or K = topk; W = drafted rows of all levels.
"""

from dataclasses import dataclass

import torch

from specbackend.sampling import Likeliest
from specbackend.speculative.draft_tree import Candidates
from specbackend.speculative.tree_shapes import TreeShapes


@dataclass(frozen=True)
class Beam:
    """The nodes of a level that are continued, and what is known of the rows above them."""

    score_BP: torch.Tensor  # float32, log-probability of the whole path down to the node
    token_BP: torch.Tensor
    candidate_BP: torch.Tensor  # each node's index among all candidates; -1: the root
    hidden_BPD: torch.Tensor | None  # the draft's hidden state at the node's parent; None: the root has none
    seen_BPW: torch.Tensor  # bool: the drafted rows that the node's own row sees, which are those above it and itself

    @classmethod
    def root(cls, token_B: torch.Tensor, num_rows: int) -> "Beam":
        """The root is no drafted row."""
        token_B1 = token_B[:, None]
        score_B1 = torch.zeros_like(token_B1, dtype=torch.float32)
        seen_B1W = torch.zeros(len(token_B), 1, num_rows, dtype=torch.bool, device=token_B.device)
        return cls(score_B1, token_B1, torch.full_like(token_B1, -1), None, seen_B1W)


def next_level(
    level: int,
    beam: Beam,
    likely: Likeliest,
    hidden_BPD: torch.Tensor,
    shapes: TreeShapes,
    own_KW: torch.Tensor | None,
) -> tuple[Candidates, Beam | None]:
    """The children of a beam's nodes, and the best of them as the next beam.

    level: the children's, counted from 0. likely: K tokens after each node. hidden_BPD: the draft's at the nodes.
    own_KW: which row each node of the next beam has; None if there is none.
    """
    K = likely.token_BNK.shape[2]
    first = K + (level - 1) * K * K if level else 0  # of the level among all candidates
    logprob_BPK = shapes.within(level, likely.logprob_BNK)
    children = Candidates(
        score_BC=(beam.score_BP[:, :, None] + logprob_BPK).flatten(1),
        token_BC=likely.token_BNK.flatten(1),
        parent_BC=beam.candidate_BP[:, :, None].expand_as(likely.token_BNK).flatten(1),
    )
    if own_KW is None:
        return children, None
    score_BK, chosen_BK = children.score_BC.topk(K, dim=1)
    parent_BK1 = chosen_BK.div(K, rounding_mode="floor")[:, :, None]
    return children, Beam(
        score_BP=shapes.within(level, score_BK[:, None])[:, 0],
        token_BP=children.token_BC.gather(1, chosen_BK),
        candidate_BP=chosen_BK + first,
        hidden_BPD=hidden_BPD.gather(1, parent_BK1.expand(-1, -1, hidden_BPD.shape[2])),
        seen_BPW=beam.seen_BPW.gather(1, parent_BK1.expand(-1, -1, beam.seen_BPW.shape[2])) | own_KW,
    )
