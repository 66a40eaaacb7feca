"""What top_k, top_p and min_p leave of a distribution. They come after the temperature.

B = requests, N = nodes, V = vocabulary.
"""

import math
from dataclasses import dataclass

import torch

from specbackend import kernels
from specbackend.kernels import cpu
from specbackend.kernels.cpu import trees
from specbackend.request import Request
from specbackend.sampling.processors import BANNED
from specbackend.sampling_params import SamplingParams

UNLIMITED = torch.iinfo(torch.int64).max
NO_LIMITS = UNLIMITED, math.inf, -math.inf


def limits_of(params: SamplingParams) -> tuple[int, float, float]:
    """top_k, top_p and the logarithm of min_p; NO_LIMITS is all tokens.

    Limits are of sampled requests alone: they would narrow a greedy one's drafts.
    """
    if not params.temperature:
        return NO_LIMITS
    top_k = UNLIMITED if params.top_k == -1 else params.top_k
    top_p = math.inf if params.top_p == 1 else params.top_p
    return top_k, top_p, math.log(params.min_p) if params.min_p else -math.inf


@dataclass(frozen=True)
class Limits:
    """top_k and top_p are of the same distribution, neither of what the other left, and tokens that tie stay together.

    min_p: no token less likely than min_p times the best.
    """

    top_k_B: torch.Tensor  # int64
    top_p_B: torch.Tensor  # float64
    log_min_p_B: torch.Tensor  # float32
    most: int  # no request keeps more tokens

    @classmethod
    def of(cls, requests: list[Request], device) -> "Limits | None":
        """None if they leave every request all tokens, so that it costs nothing."""
        limits = [limits_of(request.params) for request in requests]
        if all(each == NO_LIMITS for each in limits):
            return None
        top_ks, top_ps, log_min_ps = zip(*limits, strict=True)
        return cls(
            torch.tensor(top_ks, device=device),
            torch.tensor(top_ps, dtype=torch.float64, device=device),
            torch.tensor(log_min_ps, dtype=torch.float32, device=device),
            max(top_ks),
        )

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.top_k_B, self.top_p_B, self.log_min_p_B

    def apply(self, logits_BNV: torch.Tensor, temperature_B: torch.Tensor) -> torch.Tensor:
        """-inf instead of the logits of tokens that are left out; the others stay as they are."""
        if cpu.serves(logits_BNV.dtype, logits_BNV.device):
            return trees.limit(logits_BNV, temperature_B, *self.tensors)
        scaled_BNV = scaled(logits_BNV, temperature_B)
        threshold_BN = self.threshold(scaled_BNV).maximum(self.log_min_p_B[:, None])
        return logits_BNV.masked_fill(scaled_BNV < threshold_BN[:, :, None], BANNED)

    def threshold(self, scaled_BNV: torch.Tensor) -> torch.Tensor:
        """The smallest scaled logit that top_k and top_p let stay, [B, N]."""
        if kernels.run_on(scaled_BNV.device):
            from specbackend.kernels.limit_threshold import limit_threshold

            threshold_R = limit_threshold(scaled_BNV.flatten(0, 1), self.top_k_B, self.top_p_B)
            return threshold_R.view(scaled_BNV.shape[:2])
        best_BNK = scaled_BNV.topk(min(self.most, scaled_BNV.shape[-1])).values
        fewest_BN = torch.minimum(self.top_k_B[:, None], self._nucleus_size(scaled_BNV, best_BNK))
        return best_BNK.gather(2, fewest_BN[:, :, None] - 1)[:, :, 0]

    def _nucleus_size(self, scaled_BNV: torch.Tensor, best_BNK: torch.Tensor) -> torch.Tensor:
        """How many tokens have less than top_p of the probability before them; at most K."""
        probability_BNK = (best_BNK - scaled_BNV.logsumexp(dim=2, keepdim=True)).exp()
        before_BNK = probability_BNK[:, :, :-1].cumsum(dim=2, dtype=torch.float64)  # before all but the first
        return 1 + (before_BNK < self.top_p_B[:, None, None]).sum(dim=2)


def scaled(logits_BNV: torch.Tensor, temperature_B: torch.Tensor) -> torch.Tensor:
    """float32, the best 0: what sampled requests' tokens follow the softmax of. Of greedy requests at temperature 1."""
    logits_BNV = logits_BNV.float()
    below_best = logits_BNV - logits_BNV.amax(dim=-1, keepdim=True)  # so that a tiny temperature cannot overflow to inf
    return below_best / temperature_B.masked_fill(temperature_B == 0, 1.0)[:, None, None]
