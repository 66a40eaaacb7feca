"""The places in texts after which the target picks a token."""

from dataclasses import dataclass
from itertools import compress

import torch


@dataclass(frozen=True)
class Nodes:
    """N places for each of B requests. Each follows the text before the root and a path of tokens from the root down.

    Token 0 is the root, the last of the request's text so far (prompt and output); the others are drafts, parents
    before their children. In verification every token is a place, so M is N; while a tree grows, only the last ones.
    """

    token_BM: torch.Tensor  # int64
    position_BN: torch.Tensor  # int64, of the token picked in this place
    mask_BNM: torch.Tensor  # bool; [n, m]: token m is on the path to place n

    @classmethod
    def roots(cls, token_B: torch.Tensor, position_B: torch.Tensor) -> "Nodes":
        """Nothing is drafted: one place for each request."""
        mask_B11 = torch.ones(len(token_B), 1, 1, dtype=torch.bool, device=token_B.device)
        return cls(token_B[:, None], position_B[:, None], mask_B11)

    @classmethod
    def positions(cls, position_BN: torch.Tensor) -> "Nodes":
        """For where nobody looks at the texts."""
        B, N = position_BN.shape
        return cls(position_BN.new_empty(B, 0), position_BN, position_BN.new_empty(B, N, 0, dtype=torch.bool))

    def drafted_count(self, vocab_size: int) -> torch.Tensor:
        """float32 [B, N, V]: how often each token occurs among the drafts on each path."""
        drafted_BNM = self.mask_BNM.float()
        drafted_BNM[:, :, 0] = 0  # the root is no draft
        count_BNV = torch.zeros(*self.position_BN.shape, vocab_size, device=self.token_BM.device)
        return count_BNV.scatter_add_(2, self.token_BM[:, None, :].expand_as(drafted_BNM), drafted_BNM)

    def last_tokens(self, before_root_BL: torch.Tensor) -> torch.Tensor:
        """int64 [B, N, L]: the last L tokens of the text in each place, in order.

        before_root_BL: the last L tokens before the root; -1 where the text is shorter.
        """
        (B, L), N = before_root_BL.shape, self.position_BN.shape[1]
        back_BNM = self.mask_BNM.flip(2).cumsum(2).flip(2) - 1  # from the path's end
        column_BNM = (L - 1 - back_BNM).where(self.mask_BNM & (back_BNM < L), L)  # L: one column for the rest
        # what lies d tokens back from the end of a path of k < d drafts lies d - k back from the root
        before_BNL = torch.arange(L, device=back_BNM.device) + self.mask_BNM.sum(dim=2, keepdim=True)
        before_BNL = before_root_BL[:, None, :].expand(B, N, L).gather(2, before_BNL.clamp(max=L - 1))
        last_BNL = torch.cat([before_BNL, before_BNL[:, :, :1]], dim=2)
        last_BNL.scatter_(2, column_BNM, self.token_BM[:, None, :].expand_as(column_BNM))
        return last_BNL[:, :, :L]

    def paths(self, rows: list[int]) -> list[list[tuple[int, ...]]]:
        """Of these requests, on the host in one copy: the drafts that lead to each place."""
        packed_RNM = torch.cat([self.token_BM[rows][:, None], self.mask_BNM[rows]], dim=1)[:, :, 1:].tolist()
        return [[tuple(compress(tokens, on_path)) for on_path in mask_NM] for tokens, *mask_NM in packed_RNM]
