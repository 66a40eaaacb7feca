"""The EAGLE-1 and EAGLE-2 draft head: one decoder layer over fc([token embedding, feature]), with the target's LM head.

The feature is the target's final hidden state. EAGLE-2 grows its trees differently, the weights are the same.
Source: SafeAILab/EAGLE cnets1.py; weight names as published there and by SGLang.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from specbackend.attention.base import AttentionPlan
from specbackend.batch import ForwardBatch
from specbackend.cache.kv_pool import KVPool
from specbackend.errors import ConfigError
from specbackend.models.draft import (
    DraftVocabulary,
    check_one_layer,
    check_pairing,
    finish_draft,
    shaped_by_file,
    take_embedding,
)
from specbackend.models.layers import DecoderLayer, rope_table
from specbackend.models.linear import linear
from specbackend.models.llama import LlamaModel
from specbackend.models.loader import Weights
from specbackend.models.model_config import ModelConfig


class EagleModel:
    """The layer has no norm before its attention, and there is none before the LM head."""

    num_kv_layers = 1
    captured_layers = ()
    is_head = True

    def __init__(self, folder: Path, target: LlamaModel, vocabulary: DraftVocabulary, dtype, device, num_positions):
        config = ModelConfig.read(folder).part(folder, target.ranks.size)
        config.check_implemented(folder)
        check_pairing(folder, config, target.config)
        D = config.hidden_size
        if target.config.hidden_size != D:
            raise ConfigError(f"{folder}: the head has width {D}, the target {target.config.hidden_size}")
        weights = Weights(folder, dtype, device, lambda name: name.removeprefix("model."), target.ranks)
        check_one_layer(weights)
        config = shaped_by_file(config, weights, "layers.0")
        self.config, self.vocabulary = config, vocabulary
        self.embed_tokens = take_embedding(weights, config, target)
        fc_bias = weights.take_if_there("fc.bias", D)  # published with and without, whatever the config says
        self.fc = linear(weights.take("fc.weight", D, 2 * D), fc_bias)
        self.layer = DecoderLayer(weights, "layers.0", config, head_input_size=D)
        weights.discard("lm_head.weight")  # a copy of the target's
        finish_draft(weights)
        self.rope = rope_table(config, num_positions, device)

    def fuse(self, feature_TF: torch.Tensor) -> torch.Tensor:
        return feature_TF

    def forward(self, batch: ForwardBatch, hidden_TD: torch.Tensor, plan: AttentionPlan, kv_pool: KVPool):
        embedded = F.embedding(batch.token_BQ.flatten(), self.embed_tokens)
        x = self.fc(torch.cat([embedded, hidden_TD], dim=-1))
        rope = self.rope[batch.position_BQ.flatten()]
        return self.layer(x, x, rope, batch.slot_BQ.flatten(), plan, kv_pool.layer(0), batch.token_BQ.shape)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.vocabulary.logits(hidden)
