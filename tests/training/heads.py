"""Fresh heads of all three algorithms, with norms and biases that are not trivial."""

import torch
from draft_training.eagle import EagleHead
from draft_training.eagle3 import Eagle3Head
from draft_training.head import DraftHead, HeadOptions
from draft_training.mtp import MtpHead
from draft_training.target import Target

HEADS = {"eagle3": Eagle3Head, "eagle": EagleHead, "mtp": MtpHead}
OPTIONS = HeadOptions(draft_vocab_size=24, intermediate_size=None, fc_bias=True, feature_noise=0.2)


def build(algorithm: str, target: Target, options: HeadOptions = OPTIONS) -> DraftHead:
    torch.manual_seed(1)
    counts_V = torch.arange(target.model.config.vocab_size) % 31  # all ids below 62 have another count than their like
    head = HEADS[algorithm].build(target, counts_V, options)
    with torch.no_grad():
        for name, weight in head.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            else:
                weight.uniform_(-0.3, 0.3)
    return head
