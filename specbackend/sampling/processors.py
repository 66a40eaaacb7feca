"""What request parameters do to the target's logits.

Each class holds one group of parameters of a batch as tensors. `of` returns None if no request of the batch uses it, so
that it costs nothing; requests that do not, in a batch where others do, have values that change nothing, bit for bit.
`apply` changes float32 logits [B, N, V] in place, each node's from nothing but the node's own text: see Nodes.

B = requests, N = nodes, V = vocabulary, E = entries of a sparse [B, V], W = words, L = tokens of a word but its last.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from specbackend import kernels
from specbackend.grammar import GrammarState
from specbackend.request import Request
from specbackend.sampling.custom import CustomProcessors
from specbackend.sampling.nodes import Nodes

BANNED = -torch.inf
NO_TOKEN = -1


@dataclass(frozen=True)
class Entries:
    """Places in [B, V]: token_E[e] of request row_E[e]."""

    row_E: torch.Tensor  # int64
    token_E: torch.Tensor  # int64

    @classmethod
    def of(cls, tokens: Iterable[Sequence[int]], device) -> "Entries":
        """One list of token ids for each request."""
        arrays = [np.asarray(ids, dtype=np.int64) for ids in tokens]
        row_E = np.arange(len(arrays)).repeat([len(ids) for ids in arrays])
        return cls(torch.from_numpy(row_E).to(device), torch.from_numpy(np.concatenate(arrays)).to(device))

    def count(self, B: int, V: int) -> torch.Tensor:
        """float32 [B, V]: how many entries there are in each place."""
        count_BV = torch.zeros(B, V, device=self.row_E.device)
        return count_BV.index_put_((self.row_E, self.token_E), count_BV.new_ones(()), accumulate=True)

    def add_to(self, logits_BNV: torch.Tensor, value_EN: torch.Tensor) -> None:
        """Several entries may share a place."""
        node_N = torch.arange(logits_BNV.shape[1], device=logits_BNV.device)
        logits_BNV.index_put_((self.row_E[:, None], node_N, self.token_E[:, None]), value_EN, accumulate=True)


@dataclass(frozen=True)
class LogitBias:
    entries: Entries
    bias_E: torch.Tensor  # float32

    @classmethod
    def of(cls, requests: list[Request], device) -> "LogitBias | None":
        biases = [request.params.logit_bias for request in requests]
        if not any(biases):
            return None
        entries = Entries.of(([token for token, _ in pairs] for pairs in biases), device)
        return cls(entries, _floats((bias for pairs in biases for _, bias in pairs), device))

    def apply(self, logits_BNV: torch.Tensor, nodes: Nodes) -> None:
        self.entries.add_to(logits_BNV, self.bias_E[:, None].expand(-1, logits_BNV.shape[1]))


@dataclass(frozen=True)
class RepetitionPenalty:
    """Of tokens in prompt and output. Source: Keskar et al. 2019 (CTRL), as in Hugging Face and vLLM."""

    penalty_B: torch.Tensor  # float32; 1 changes nothing
    said: Entries  # tokens of prompt and output, root included

    @classmethod
    def of(cls, requests: list[Request], device) -> "RepetitionPenalty | None":
        penalties = [request.params.repetition_penalty for request in requests]
        if not any(penalty != 1 for penalty in penalties):
            return None
        said = (r.text_array() if penalty != 1 else () for r, penalty in zip(requests, penalties, strict=True))
        return cls(_floats(penalties, device), Entries.of(said, device))

    def apply(self, logits_BNV: torch.Tensor, nodes: Nodes) -> None:
        B, N, V = logits_BNV.shape
        said_BNV = self.said.count(B, V)[:, None] > 0
        if N > 1:
            said_BNV = said_BNV | (nodes.drafted_count(V) > 0)
        penalty_B11 = self.penalty_B[:, None, None]
        penalised_BNV = torch.where(logits_BNV > 0, logits_BNV / penalty_B11, logits_BNV * penalty_B11)
        largest = torch.finfo(logits_BNV.dtype).max  # a tiny penalty must not make infinities that cannot be compared
        logits_BNV.copy_(penalised_BNV.clamp_(-largest, largest).where(said_BNV, logits_BNV))


@dataclass(frozen=True)
class OutputPenalties:
    """frequency_penalty and presence_penalty, of tokens in the output alone. Source: OpenAI's API, as in vLLM."""

    frequency_B: torch.Tensor  # float32; 0 changes nothing
    presence_B: torch.Tensor  # float32; 0 changes nothing
    output: Entries  # root included

    @classmethod
    def of(cls, requests: list[Request], device) -> "OutputPenalties | None":
        used = [bool(request.params.frequency_penalty or request.params.presence_penalty) for request in requests]
        if not any(used):
            return None
        output = (_output_array(r) if uses else () for r, uses in zip(requests, used, strict=True))
        return cls(
            _floats((request.params.frequency_penalty for request in requests), device),
            _floats((request.params.presence_penalty for request in requests), device),
            Entries.of(output, device),
        )

    def apply(self, logits_BNV: torch.Tensor, nodes: Nodes) -> None:
        B, N, V = logits_BNV.shape
        count_BNV = self.output.count(B, V)[:, None]
        if N > 1:
            count_BNV = count_BNV + nodes.drafted_count(V)
        logits_BNV -= self.frequency_B[:, None, None] * count_BNV
        logits_BNV -= self.presence_B[:, None, None] * (count_BNV > 0)


@dataclass(frozen=True)
class MinNewTokens:
    """No token that ends the text before a position."""

    ends: Entries
    position_E: torch.Tensor  # int64, the first at which the token may be picked

    @classmethod
    def of(cls, requests: list[Request], device) -> "MinNewTokens | None":
        waiting = [len(request.output_ids) < request.params.min_new_tokens for request in requests]
        if not any(waiting):
            return None
        ids = [r.end_ids if waits else () for r, waits in zip(requests, waiting, strict=True)]
        first = [len(request.input_ids) + request.params.min_new_tokens for request in requests]
        position_B = torch.tensor(first, device=device)
        ends = Entries.of(ids, device)
        return cls(ends, position_B[ends.row_E])

    def apply(self, logits_BNV: torch.Tensor, nodes: Nodes) -> None:
        early_EN = nodes.position_BN[self.ends.row_E] < self.position_E[:, None]
        self.ends.add_to(logits_BNV, _ban(early_EN))


@dataclass(frozen=True)
class AllowedTokens:
    allowed: Entries
    everything_B: torch.Tensor  # bool: the request allows all tokens

    @classmethod
    def of(cls, requests: list[Request], device) -> "AllowedTokens | None":
        allowed = [request.params.allowed_token_ids for request in requests]
        if not any(allowed):
            return None
        return cls(Entries.of(allowed, device), torch.tensor([not ids for ids in allowed], device=device))

    def apply(self, logits_BNV: torch.Tensor, nodes: Nodes) -> None:
        B, _, V = logits_BNV.shape
        allowed_BV = (self.allowed.count(B, V) > 0) | self.everything_B[:, None]
        logits_BNV.masked_fill_(~allowed_BV[:, None], BANNED)


@dataclass(frozen=True)
class BadWords:
    """No token that would complete one of the words, wherever it began."""

    ends: Entries  # the last token of each word: E is W
    start_WL: torch.Tensor  # int64, the tokens before it; NO_TOKEN in front of shorter words
    before_root_BL: torch.Tensor  # int64, see Nodes.last_tokens

    @classmethod
    def of(cls, requests: list[Request], device) -> "BadWords | None":
        words = [request.params.bad_words_ids for request in requests]
        if not any(words):
            return None
        L = max(1, *(len(word) - 1 for of_request in words for word in of_request))
        starts = [_pad_left(word[:-1], L) for of_request in words for word in of_request]
        before_root = [_pad_left(_tail_before_root(request, L), L) for request in requests]
        return cls(
            Entries.of(([word[-1] for word in of_request] for of_request in words), device),
            torch.tensor(starts, device=device),
            torch.tensor(before_root, device=device),
        )

    def apply(self, logits_BNV: torch.Tensor, nodes: Nodes) -> None:
        last_BNL = nodes.last_tokens(self.before_root_BL)
        start_W1L = self.start_WL[:, None]
        begun_WN = ((last_BNL[self.ends.row_E] == start_W1L) | (start_W1L == NO_TOKEN)).all(dim=2)
        self.ends.add_to(logits_BNV, _ban(begun_WN))


@dataclass(frozen=True)
class GrammarMask:
    """Only tokens that the request's grammar allows.

    Behind a node that the grammar itself forbids everything stays allowed: the target never picks the node's token, so
    nothing that follows it matters.
    """

    rows: list[int]  # the requests that have a grammar
    grammars: list[GrammarState]

    @classmethod
    def of(cls, requests: list[Request], device) -> "GrammarMask | None":
        rows = [row for row, request in enumerate(requests) if request.grammar is not None]
        return cls(rows, [requests[row].grammar for row in rows]) if rows else None

    def apply(self, logits_BNV: torch.Tensor, nodes: Nodes) -> None:
        bits_RNW = torch.from_numpy(self._masks(nodes, logits_BNV.shape[2])).to(logits_BNV.device)
        for row, bits_NW in zip(self.rows, bits_RNW, strict=True):
            _ban_unset(logits_BNV[row], bits_NW)

    def _masks(self, nodes: Nodes, V: int) -> np.ndarray:
        """uint8 [R, N, W], eight tokens in each; W is a multiple of four."""
        R, N = len(self.grammars), nodes.position_BN.shape[1]
        masks_RNW = np.full((R, N, 4 * -(-V // 32)), 0xFF, dtype=np.uint8)
        for masks_NW, grammar, paths in zip(masks_RNW, self.grammars, nodes.paths(self.rows), strict=True):
            for mask_W, path in zip(masks_NW, paths, strict=True):
                legal_W = grammar.mask_after(path)
                if legal_W is not None:
                    mask_W[: len(legal_W)] = legal_W
        return masks_RNW


Processor = (
    LogitBias
    | CustomProcessors
    | RepetitionPenalty
    | OutputPenalties
    | MinNewTokens
    | AllowedTokens
    | BadWords
    | GrammarMask
)

# The order is the definition.
BEFORE_TEMPERATURE = (
    LogitBias,
    CustomProcessors,
    RepetitionPenalty,
    OutputPenalties,
    MinNewTokens,
    AllowedTokens,
    BadWords,
    GrammarMask,
)


def processors_of(requests: list[Request], device) -> tuple[Processor, ...]:
    """Those that the batch needs, in order."""
    return tuple(made for kind in BEFORE_TEMPERATURE if (made := kind.of(requests, device)) is not None)


def _floats(values: Iterable[float], device) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.float32, device=device)


def _ban_unset(logits_NV: torch.Tensor, bits_NW: torch.Tensor) -> None:
    """In place, the tokens whose bit is 0. bits_NW: uint8, the first token in the lowest bit."""
    if kernels.run_on(logits_NV.device):
        from specbackend.kernels.apply_bitmask import apply_bitmask_

        apply_bitmask_(logits_NV, bits_NW.view(torch.int32))
        return
    set_NV = torch.stack([bits_NW >> bit & 1 for bit in range(8)], dim=2).flatten(1)[:, : logits_NV.shape[1]] > 0
    logits_NV.masked_fill_(~set_NV, BANNED)


def _ban(where: torch.Tensor) -> torch.Tensor:
    """What to add to logits: nothing, or what makes them -inf."""
    return torch.zeros_like(where, dtype=torch.float32).masked_fill_(where, BANNED)


def _output_array(request: Request) -> np.ndarray:
    return np.asarray(request.text_array())[len(request.input_ids) :]


def _pad_left(tokens: Iterable[int], length: int) -> list[int]:
    tokens = list(tokens)
    return [NO_TOKEN] * (length - len(tokens)) + tokens


def _tail_before_root(request: Request, length: int) -> list[int]:
    """At most `length` tokens."""
    return (request.input_ids[-length - 1 :] + request.output_ids[-length - 1 :])[-length - 1 : -1]
