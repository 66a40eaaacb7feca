"""Nouns that cross from the scheduler to the decoders and from there to the networks."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from specbackend.request import Request, TokenLogprob
from specbackend.spec_trace import Round


@dataclass(frozen=True)
class ExtendBatch:
    """Prompt chunks to compute: `chunk_lens[i]` tokens of requests[i], from its `num_computed` on."""

    requests: list[Request]
    chunk_lens: list[int]
    started_ns: int = field(default_factory=time.monotonic_ns, compare=False)

    def is_final(self, index: int) -> bool:
        """Whether this chunk completes the request's known tokens, so that a new one is sampled after it."""
        request = self.requests[index]
        return request.num_computed + self.chunk_lens[index] == request.num_tokens


@dataclass(frozen=True)
class DecodeBatch:
    """Requests that take one decode step together."""

    requests: list[Request]
    started_ns: int = field(default_factory=time.monotonic_ns, compare=False)


def traced_rows(requests: list[Request]) -> list[int]:
    """Those of a batch that ask to be told of its step, by their place in it."""
    return [row for row, request in enumerate(requests) if request.params.return_spec_trace]


@dataclass(frozen=True)
class Sequences:
    """Where the requests of a decode step stand, on the device.

    Request b has length_B[b] tokens in the KV pool, at the slots of its table row; root_B[b] is the token after them,
    the last that the target picked.
    """

    requests: list[Request]
    row_B: torch.Tensor  # int64, of the request table
    length_B: torch.Tensor  # int64
    root_B: torch.Tensor  # int64
    prefix_slot_BL: torch.Tensor  # int64, see ForwardBatch


@dataclass(frozen=True)
class ForwardBatch:
    """Q new rows for each of B sequences, as every forward of target and draft sees them.

    A row attends to the sequence's prefix and, within the window, to what `window_mask_BQW` shows it. Chunked prefill,
    decoding, tree verification, drafting and draft extension differ in these tensors only.
    """

    token_BQ: torch.Tensor  # int64; padding rows hold any valid id
    position_BQ: torch.Tensor  # int64 RoPE positions
    slot_BQ: torch.Tensor  # int64, where each new row's K and V go; DUMMY_SLOT for padding
    prefix_slot_BL: torch.Tensor  # int64; columns from prefix_len on are ignored
    prefix_len_B: torch.Tensor  # int64
    window_slot_BW: torch.Tensor  # int64
    window_mask_BQW: torch.Tensor  # bool; every row sees at least itself
    window_is_causal: bool = False  # the mask is the lower triangle of Q = W, which a backend need not read
    row_T: torch.Tensor | None = None  # int64, of the B * Q rows those that are no padding; None: it is not worth it


@dataclass(frozen=True)
class Logprobs:
    """What the target thought of P tokens of each of R requests, and of the K likeliest tokens in their places."""

    rows: list[int]  # the requests, by their place in the batch
    token_RP: torch.Tensor  # int64
    logprob_RP: torch.Tensor  # float32
    rank_RP: torch.Tensor  # int64; 1: no token was likelier
    top_logprob_RPK: torch.Tensor  # float32, in falling order; -inf: may not be picked
    top_token_RPK: torch.Tensor  # int64

    def tolists(self, counts: list[int], tops: list[int]) -> list[list[TokenLogprob]]:
        """To the host: of request r the first counts[r] tokens, each with the tops[r] likeliest."""
        places = (self.token_RP, self.logprob_RP, self.rank_RP, self.top_token_RPK, self.top_logprob_RPK)
        tokens, logprobs, ranks, top_tokens, top_logprobs = (place.tolist() for place in places)
        return [
            [
                TokenLogprob(
                    tokens[r][p], logprobs[r][p], ranks[r][p], _best(top_tokens[r][p], top_logprobs[r][p], tops[r])
                )
                for p in range(counts[r])
            ]
            for r in range(len(self.rows))
        ]


def _best(tokens: list[int], logprobs: list[float], most: int) -> list[tuple[int, float]]:
    pairs = zip(tokens[:most], logprobs[:most], strict=True)
    return [(token, logprob) for token, logprob in pairs if logprob > -math.inf]


@dataclass(frozen=True)
class Accepted:
    """What a step adds to each request: the first count_B[b] tokens of token_BP[b]."""

    token_BP: torch.Tensor  # int64
    count_B: torch.Tensor  # int64
    logprobs: Logprobs | None = None  # of the tokens, for requests that ask
    rounds: Callable[[], dict[int, Round]] | None = None  # of a step with trees some of which are traced, by row

    def tolists(self) -> list[list[int]]:
        """To the host: from a device in one copy."""
        if self.token_BP.device.type == "cpu":
            pairs = zip(self.token_BP.tolist(), self.count_B.tolist(), strict=True)
            return [tokens[:count] for tokens, count in pairs]
        packed = torch.cat([self.count_B[:, None], self.token_BP], dim=1).tolist()
        return [row[1 : 1 + row[0]] for row in packed]
