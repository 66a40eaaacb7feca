"""The one definition of the target's distribution, and of how a token is picked from it."""

from specbackend.sampling.nodes import Nodes
from specbackend.sampling.pick import SamplingBatch, pick_tokens

__all__ = ["Nodes", "SamplingBatch", "pick_tokens"]
