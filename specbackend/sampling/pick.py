"""Picking a token from the target's logits: the same code for prefill, plain decoding and every node of a draft tree.

The logits of a node become the target's distribution by the parameters of its request, in one order for all:

    logit_bias -> the server's own processors -> repetition_penalty -> frequency_penalty, presence_penalty
    -> min_new_tokens -> allowed_token_ids, bad words -> grammar -> temperature -> top_k and top_p jointly -> min_p

Greedy requests (temperature 0) take the best token after all that comes before temperature.

A sampled token is argmax(scaled logits + Gumbel noise), which is distributed as their softmax. The noise is a function
of (seed, position, token) alone, and the logits are one of the node's text. So verification needs no acceptance rule of
its own: a drafted token is kept if it is what the target picks at that position anyway. A seeded request gives the same
text alone or in a batch, with speculation on or off, before and after preemption. And drafts can be made with the same
noise (`forecast`), which is why they are right about sampled tokens nearly as often as about the best ones.
"""

from dataclasses import dataclass

import torch

from specbackend import kernels
from specbackend.batch import Logprobs
from specbackend.kernels import cpu
from specbackend.kernels.cpu import trees
from specbackend.request import Request
from specbackend.sampling.custom import CustomProcessors
from specbackend.sampling.limits import Limits, scaled
from specbackend.sampling.logprobs import logprobs_of
from specbackend.sampling.nodes import Nodes
from specbackend.sampling.processors import BANNED, BEFORE_TEMPERATURE, Processor, processors_of

# Below this, forecasts would be surer than the draft can be: at 0, of the best token alone, which leaves a chain for a
# tree. The demo's EAGLE-3 head accepts 3.62 tokens a step with forecasts at 1 and 3.95 at 0.5.
LOWEST_FORECAST_TEMPERATURE = 0.5

MOST_OF_TOPK_KERNEL = 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class SamplingBatch:
    """Sampling parameters on the device. What a batch does not use is known on the host, and costs nothing."""

    temperature_B: torch.Tensor  # float32; 0 is greedy
    seed_B: torch.Tensor  # int64
    any_sampled: bool
    before_temperature: tuple[Processor, ...] = ()
    limits: Limits | None = None
    logprob_rows: tuple[int, ...] = ()  # the requests that ask for logprobs
    most_logprobs: int = 0  # that any of them asks for

    @property
    def noise(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Seeds, and temperatures or None if all requests are greedy."""
        return self.seed_B, self.temperature_B if self.any_sampled else None

    @property
    def greedy_B11(self) -> torch.Tensor:
        return self.temperature_B[:, None, None] == 0

    @classmethod
    def of(cls, requests: list[Request], device) -> "SamplingBatch":
        temperatures = [request.params.temperature for request in requests]
        return cls(
            temperature_B=torch.tensor(temperatures, dtype=torch.float32, device=device),
            seed_B=torch.tensor([signed(request.seed) for request in requests], device=device),
            any_sampled=any(temperatures),
            logprob_rows=tuple(row for row, request in enumerate(requests) if request.params.logprobs is not None),
            most_logprobs=max(request.params.logprobs or 0 for request in requests),
            before_temperature=processors_of(requests, device),
            limits=Limits.of(requests, device),
        )


def has_processors(requests: list[Request]) -> bool:
    """Whether anything but a temperature and limits stands between logits and the requests' next picks."""
    return any(kind.of(requests, CPU) is not None for kind in BEFORE_TEMPERATURE)


def pick_tokens(logits_BNV: torch.Tensor, nodes: Nodes, sampling: SamplingBatch) -> torch.Tensor:
    """Pick the token that follows in each place: int64 [B, N]."""
    return pick_from(target_logits(logits_BNV, nodes, sampling), nodes, sampling)


def target_logits(logits_BNV: torch.Tensor, nodes: Nodes, sampling: SamplingBatch) -> torch.Tensor:
    """What each next token is picked from: sampled requests' tokens follow softmax(target logits / temperature)."""
    return _limited(_adjusted(logits_BNV, nodes, sampling.before_temperature), sampling)


def pick_from(logits_BNV: torch.Tensor, nodes: Nodes, sampling: SamplingBatch) -> torch.Tensor:
    """The second half of `pick_tokens`: what is picked from target logits."""
    if kernels.run_on(logits_BNV.device):
        return _pick_by_kernel(logits_BNV, nodes, sampling)
    if cpu.serves(logits_BNV.dtype, logits_BNV.device):
        return trees.pick(logits_BNV, *sampling.noise, nodes.position_BN)
    if sampling.any_sampled:
        token_V = torch.arange(logits_BNV.shape[-1], device=logits_BNV.device)
        noise_BNV = gumbel_noise(sampling.seed_B, nodes.position_BN, token_V)
        logits_BNV = logits_BNV.where(sampling.greedy_B11, scaled(logits_BNV, sampling.temperature_B) + noise_BNV)
    return logits_BNV.argmax(dim=-1)


def _pick_by_kernel(logits_BNV: torch.Tensor, nodes: Nodes, sampling: SamplingBatch) -> torch.Tensor:
    from specbackend.kernels.argmax_pick import argmax_pick

    position_R = nodes.position_BN.flatten().contiguous()
    picked_R = argmax_pick(logits_BNV.flatten(0, 1), sampling.temperature_B, sampling.seed_B, position_R)
    return picked_R.view(nodes.position_BN.shape)


def picked_logprobs(
    logits_BNV: torch.Tensor, place_BP: torch.Tensor, token_BP: torch.Tensor, sampling: SamplingBatch
) -> Logprobs | None:
    """Of tokens picked from target logits in P of the N places, for the requests that ask."""
    if not sampling.logprob_rows:
        return None
    rows = list(sampling.logprob_rows)
    logits_RPV = logits_BNV[torch.tensor(rows, device=logits_BNV.device)[:, None], place_BP[rows]]
    scaled_RPV = scaled(logits_RPV, sampling.temperature_B[rows])
    return logprobs_of(rows, scaled_RPV, token_BP[rows], sampling.most_logprobs)


@dataclass(frozen=True)
class Likeliest:
    """The best of a forecast, in falling order."""

    logprob_BNK: torch.Tensor  # float32
    token_BNK: torch.Tensor  # int64, the target's ids


def likeliest(
    K: int,
    draft_logits_BNW: torch.Tensor,
    token_W: torch.Tensor,
    vocab_size: int,
    nodes: Nodes,
    sampling: SamplingBatch,
) -> Likeliest:
    """The K best of `forecast`. token_W: the draft's tokens."""
    if K <= MOST_OF_TOPK_KERNEL and kernels.run_on(draft_logits_BNW.device):
        known_BNW = _known_logits(draft_logits_BNW, token_W, vocab_size, nodes, sampling)
        return _likeliest_by_kernel(K, known_BNW, token_W, nodes, sampling)
    if cpu.serves(draft_logits_BNW.dtype, draft_logits_BNW.device):
        known_BNW = _known_logits(draft_logits_BNW, token_W, vocab_size, nodes, sampling)
        noise = (LOWEST_FORECAST_TEMPERATURE, *sampling.noise, nodes.position_BN)
        return Likeliest(*trees.topk_logprob(K, known_BNW, token_W, *noise))
    best = forecast(draft_logits_BNW, token_W, vocab_size, nodes, sampling).topk(K, dim=-1)
    return Likeliest(best.values, token_W[best.indices])


def _likeliest_by_kernel(
    K: int, known_BNW: torch.Tensor, token_W: torch.Tensor, nodes: Nodes, sampling: SamplingBatch
) -> Likeliest:
    from specbackend.kernels.topk_logprob import topk_logprob, topk_noisy_logprob

    logits_RW, position_R = known_BNW.flatten(0, 1), nodes.position_BN.flatten().contiguous()
    divisor_B = sampling.temperature_B.clamp(min=LOWEST_FORECAST_TEMPERATURE)
    if sampling.any_sampled:
        noise = (sampling.temperature_B / divisor_B, sampling.seed_B, position_R, token_W)
        best = topk_noisy_logprob(logits_RW, divisor_B.reciprocal(), *noise, K)
    else:
        best = topk_logprob(logits_RW, divisor_B.reciprocal(), K)
    shape_BNK = (*nodes.position_BN.shape, K)
    return Likeliest(best.logprob_RK.view(shape_BNK), token_W[best.index_RK].view(shape_BNK))


def forecast(
    draft_logits_BNW: torch.Tensor, token_W: torch.Tensor, vocab_size: int, nodes: Nodes, sampling: SamplingBatch
) -> torch.Tensor:
    """How likely the target is to pick each of the draft's tokens, as far as the draft knows: logarithms, float32.

    The target picks argmax(logits + temperature * noise), and all but its logits is known. With the draft's logits in
    their place the same argmax is the best guess, and their softmax says how far the others are behind. So sampled text
    is drafted as greedy text is, not as if its noise could not be foreseen. Tokens that the request forbids get -inf.
    The server's own processors are left out: they see the target's logits only, and are slow.

    Source: Daliri, Musco, Suresh 2024, "Coupling without communication", for drafts that share the target's noise.
    """
    known_BNW = _known_logits(draft_logits_BNW, token_W, vocab_size, nodes, sampling).float()
    temperature_B11 = sampling.temperature_B[:, None, None]
    divisor_B11 = temperature_B11.clamp(min=LOWEST_FORECAST_TEMPERATURE)
    score_BNW = known_BNW / divisor_B11
    if sampling.any_sampled:
        noise_BNW = gumbel_noise(sampling.seed_B, nodes.position_BN, token_W)
        score_BNW = score_BNW + noise_BNW * (temperature_B11 / divisor_B11)
    logprob_BNW = torch.log_softmax(score_BNW, dim=-1)
    if not sampling.before_temperature:
        return logprob_BNW
    return logprob_BNW.nan_to_num(nan=BANNED, neginf=BANNED)  # nan: all are forbidden


def _known_logits(
    draft_logits_BNW: torch.Tensor, token_W: torch.Tensor, vocab_size: int, nodes: Nodes, sampling: SamplingBatch
) -> torch.Tensor:
    """The draft's logits after what is known of its request to be done to the target's."""
    processors = tuple(p for p in sampling.before_temperature if not isinstance(p, CustomProcessors))
    if processors:
        logits_BNV = draft_logits_BNW.new_full((*nodes.position_BN.shape, vocab_size), BANNED, dtype=torch.float32)
        logits_BNV[:, :, token_W] = draft_logits_BNW.float()
        draft_logits_BNW = _adjusted(logits_BNV, nodes, processors)[:, :, token_W]
    return _limited(draft_logits_BNW, sampling)


def _limited(logits_BNV: torch.Tensor, sampling: SamplingBatch) -> torch.Tensor:
    return sampling.limits.apply(logits_BNV, sampling.temperature_B) if sampling.limits else logits_BNV


def _adjusted(logits_BNV: torch.Tensor, nodes: Nodes, processors: tuple[Processor, ...]) -> torch.Tensor:
    if not processors:
        return logits_BNV
    logits_BNV = logits_BNV.to(torch.float32, copy=True)
    for processor in processors:
        processor.apply(logits_BNV, nodes)
    return logits_BNV


def gumbel_noise(seed_B: torch.Tensor, position_BN: torch.Tensor, token_V: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise [B, N, V] float32, a pure function of (seed, position, token id)."""
    stream_BN = _mix(_mix(seed_B)[:, None] + position_BN)
    bits = _mix(stream_BN[:, :, None] + token_V) >> 41 & ((1 << 23) - 1)
    uniform = (bits + 0.5) * 2.0**-23  # 23 bits: both ends stay strictly inside (0, 1) in float32
    return -torch.log(-torch.log(uniform))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finalizer on int64 with wrap-around. Source: Steele, Lea, Flood 2014."""
    x = x + signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift; torch's >> on int64 keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed(value: int) -> int:
    """An unsigned 64-bit number as the int64 of the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value
