"""The one definition of how the target picks a token."""

from specbackend.sampling.pick import SamplingBatch, pick_tokens

__all__ = ["SamplingBatch", "pick_tokens"]
