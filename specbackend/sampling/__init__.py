"""The one definition of the target's distribution, and of how a token is picked from it."""

from specbackend.sampling.logprobs import note_prompt_logprobs
from specbackend.sampling.nodes import Nodes
from specbackend.sampling.pick import (
    Likeliest,
    SamplingBatch,
    forecast,
    has_processors,
    likeliest,
    pick_from,
    pick_tokens,
    picked_logprobs,
    target_logits,
)

__all__ = [
    "Likeliest",
    "Nodes",
    "SamplingBatch",
    "forecast",
    "has_processors",
    "likeliest",
    "note_prompt_logprobs",
    "pick_from",
    "pick_tokens",
    "picked_logprobs",
    "target_logits",
]
