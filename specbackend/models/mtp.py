"""MiMo's multi-token prediction layer: a draft head that the target's own checkpoint brings along.

The feature is the target's final hidden state. One layer serves every drafted step, as in SGLang and vLLM.
Source: XiaomiMiMo `modeling_mimo.py::MiMoMTPLayers`, SGLang `mimo_mtp.py`.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from specbackend.attention.base import AttentionPlan
from specbackend.batch import ForwardBatch
from specbackend.cache.kv_pool import KVPool
from specbackend.models.draft import DraftVocabulary
from specbackend.models.layers import DecoderLayer, RMSNorm
from specbackend.models.linear import linear
from specbackend.models.llama import MTP_PREFIX, LlamaModel
from specbackend.models.loader import Weights


class MtpModel:
    """The layer is one of the target's kind; embedding, LM head and RoPE are the target's own."""

    num_kv_layers = 1
    captured_layers = ()
    is_head = True

    def __init__(self, folder: Path, target: LlamaModel, vocabulary: DraftVocabulary, dtype, device):
        config, prefix, D = target.config, f"{MTP_PREFIX}0", target.config.hidden_size
        weights = Weights(folder, dtype, device, ranks=target.ranks)
        self.config, self.vocabulary = config, vocabulary
        self.embed_tokens, self.rope = target.embed_tokens, target.rope
        self.token_layernorm = RMSNorm.take(weights, f"{prefix}.token_layernorm", config)
        self.hidden_layernorm = RMSNorm.take(weights, f"{prefix}.hidden_layernorm", config)
        self.input_proj = linear(weights.take(f"{prefix}.input_proj.weight", D, 2 * D))
        self.layer = DecoderLayer(weights, prefix, config)
        self.final_layernorm = RMSNorm.take(weights, f"{prefix}.final_layernorm", config)
        weights.check_complete()

    def fuse(self, feature_TF: torch.Tensor) -> torch.Tensor:
        return feature_TF

    def forward(self, batch: ForwardBatch, hidden_TD: torch.Tensor, plan: AttentionPlan, kv_pool: KVPool):
        position_T = batch.position_BQ.flatten()
        embedded = F.embedding(batch.token_BQ.flatten(), self.embed_tokens)
        embedded = embedded.masked_fill(position_T[:, None] == 0, 0)  # as it was trained
        x = self.input_proj(torch.cat([self.hidden_layernorm(hidden_TD), self.token_layernorm(embedded)], dim=-1))
        rope, slot_T = self.rope[position_T], batch.slot_BQ.flatten()
        return self.final_layernorm(self.layer(x, x, rope, slot_T, plan, kv_pool.layer(0), batch.token_BQ.shape))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.vocabulary.logits(hidden)
