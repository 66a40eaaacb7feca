"""Picking a token from the target's logits: the same code for prefill, plain decoding and every node of a draft tree.

The logits of a node become the target's distribution by the parameters of its request, in one order for all:

    logit_bias -> repetition_penalty -> frequency_penalty, presence_penalty -> min_new_tokens -> allowed_token_ids,
    bad words -> grammar -> temperature -> top_k and top_p jointly -> min_p

Greedy requests (temperature 0) take the best token after all that comes before temperature.

A sampled token is argmax(scaled logits + Gumbel noise), which is distributed as their softmax. The noise is a function
of (seed, position, token) alone, and the logits are one of the node's text. So verification needs no acceptance rule of
its own: a drafted token is kept if it is what the target picks at that position anyway. It accepts with probability sum
p(children), the most any rule can for deterministic drafts, and a seeded request gives the same text alone or in a
batch, with speculation on or off, before and after preemption.
"""

from dataclasses import dataclass

import torch

from specbackend.request import Request
from specbackend.sampling.nodes import Nodes
from specbackend.sampling.processors import AFTER_TEMPERATURE, BEFORE_TEMPERATURE, Processor, processors_of


@dataclass(frozen=True)
class SamplingBatch:
    """Sampling parameters on the device. What a batch does not use is known on the host, and costs nothing."""

    temperature_B: torch.Tensor  # float32; 0 is greedy
    seed_B: torch.Tensor  # int64
    any_sampled: bool
    before_temperature: tuple[Processor, ...] = ()
    after_temperature: tuple[Processor, ...] = ()

    @classmethod
    def of(cls, requests: list[Request], device) -> "SamplingBatch":
        temperatures = [request.params.temperature for request in requests]
        return cls(
            temperature_B=torch.tensor(temperatures, dtype=torch.float32, device=device),
            seed_B=torch.tensor([_signed(request.seed) for request in requests], device=device),
            any_sampled=any(temperatures),
            before_temperature=processors_of(BEFORE_TEMPERATURE, requests, device),
            after_temperature=processors_of(AFTER_TEMPERATURE, requests, device),
        )


def pick_tokens(logits_BNV: torch.Tensor, nodes: Nodes, sampling: SamplingBatch) -> torch.Tensor:
    """Pick the token that follows each node: int64 [B, N]."""
    logits_BNV = target_logits(logits_BNV, nodes, sampling)
    if not sampling.any_sampled:
        return logits_BNV.argmax(dim=-1)
    greedy_B11 = sampling.temperature_B[:, None, None] == 0
    noise = gumbel_noise(sampling.seed_B, nodes.position_BN, logits_BNV.shape[-1])
    return torch.where(greedy_B11, logits_BNV, logits_BNV + noise).argmax(dim=-1)


def target_logits(logits_BNV: torch.Tensor, nodes: Nodes, sampling: SamplingBatch) -> torch.Tensor:
    """The distribution that each node's next token is picked from: sampled requests' tokens follow its softmax."""
    if sampling.before_temperature:
        logits_BNV = logits_BNV.to(torch.float32, copy=True)
        for processor in sampling.before_temperature:
            processor.apply(logits_BNV, nodes)
    if not sampling.any_sampled:
        return logits_BNV
    temperature_B11 = sampling.temperature_B[:, None, None]
    logits_BNV = logits_BNV.float()
    below_best = logits_BNV - logits_BNV.amax(dim=-1, keepdim=True)  # so that a tiny temperature cannot overflow to inf
    scaled_BNV = below_best / temperature_B11.masked_fill(temperature_B11 == 0, 1.0)
    for processor in sampling.after_temperature:
        processor.apply(scaled_BNV, nodes)
    return scaled_BNV


def gumbel_noise(seed_B: torch.Tensor, position_BN: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise [B, N, V] float32, a pure function of (seed, position, token id)."""
    token_V = torch.arange(vocab_size, device=seed_B.device)
    stream_BN = _mix(_mix(seed_B)[:, None] + position_BN)
    bits = _mix(stream_BN[:, :, None] + token_V) >> 41 & ((1 << 23) - 1)
    uniform = (bits + 0.5) * 2.0**-23  # 23 bits: both ends stay strictly inside (0, 1) in float32
    return -torch.log(-torch.log(uniform))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finalizer on int64 with wrap-around. Source: Steele, Lea, Flood 2014."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift; torch's >> on int64 keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """An unsigned 64-bit number as the int64 of the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value
