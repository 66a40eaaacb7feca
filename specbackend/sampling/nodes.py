"""The places in texts after which the target picks a token."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Nodes:
    """N nodes for each of B requests. Node 0 is the root, the last token of the request's text so far (prompt and
    output); the others are drafts. What a node's token follows is the text before the root and the node's ancestors.
    """

    token_BN: torch.Tensor  # int64
    position_BN: torch.Tensor  # int64, of the token picked after the node
    mask_BNN: torch.Tensor  # bool; [n, m]: m is n or one of n's ancestors

    @classmethod
    def roots(cls, token_B: torch.Tensor, position_B: torch.Tensor) -> "Nodes":
        """Nothing is drafted: one node for each request."""
        mask_B11 = torch.ones(len(token_B), 1, 1, dtype=torch.bool, device=token_B.device)
        return cls(token_B[:, None], position_B[:, None], mask_B11)

    def drafted_count(self, vocab_size: int) -> torch.Tensor:
        """float32 [B, N, V]: how often each token occurs among the drafts on each node's path, itself included."""
        B, N = self.token_BN.shape
        drafted_BNN = self.mask_BNN.float()
        drafted_BNN[:, :, 0] = 0  # the root is no draft
        count_BNV = torch.zeros(B, N, vocab_size, device=self.token_BN.device)
        return count_BNV.scatter_add_(2, self.token_BN[:, None, :].expand(B, N, N), drafted_BNN)

    def last_tokens(self, before_root_BL: torch.Tensor) -> torch.Tensor:
        """int64 [B, N, L]: the last L tokens of each node's text, itself included, in order.

        before_root_BL: the last L tokens before the root; -1 where the text is shorter.
        """
        B, L = before_root_BL.shape
        N = self.token_BN.shape[1]
        depth_BN = self.mask_BNN.sum(dim=2) - 1
        distance_BNN = depth_BN[:, :, None] - depth_BN[:, None, :]
        column_BNN = (L - 1 - distance_BNN).where(self.mask_BNN & (distance_BNN < L), L)  # L: one column for the rest
        # what lies d tokens back from a node at depth k < d lies d - k back from the root
        before_BNL = torch.arange(L, device=depth_BN.device) + depth_BN[:, :, None] + 1
        before_BNL = before_root_BL[:, None, :].expand(B, N, L).gather(2, before_BNL.clamp(max=L - 1))
        last_BNL = torch.cat([before_BNL, before_BNL[:, :, :1]], dim=2)
        last_BNL.scatter_(2, column_BNN, self.token_BN[:, None, :].expand(B, N, N))
        return last_BNL[:, :, :L]

    def paths(self, rows: list[int]) -> list[list[tuple[int, ...]]]:
        """Of these requests, on the host in one copy: for each node the drafts on its path, itself included."""
        packed_RN = torch.cat([self.token_BN[rows][:, None], self.mask_BNN[rows]], dim=1).tolist()
        return [[_selected(tokens, on_path) for on_path in mask_NN] for tokens, *mask_NN in packed_RN]


def _selected(token_N: list[int], on_path_N: list[int]) -> tuple[int, ...]:
    """In order, as parents come before their children; without the root, which is no draft."""
    return tuple(token for token, on_path in zip(token_N[1:], on_path_N[1:], strict=True) if on_path)
