"""A small language model as the draft: it reads tokens only, so the target's features mean nothing to it."""

from pathlib import Path

import torch

from specbackend.attention.base import AttentionPlan
from specbackend.batch import ForwardBatch
from specbackend.cache.kv_pool import KVPool
from specbackend.models.draft import DraftVocabulary, check_pairing
from specbackend.models.llama import LlamaModel
from specbackend.models.model_config import ModelConfig


class CausalDraftModel:
    """Row t consumes token x_t, sits at position t and predicts x_{t+1}: the ordinary way, unlike a head's."""

    captured_layers = ()
    is_head = False

    def __init__(self, folder: Path, target: LlamaModel, dtype, device, num_positions: int):
        self.config = ModelConfig.read(folder).part(folder, target.ranks.size)
        check_pairing(folder, self.config, target.config)
        self.model = LlamaModel(folder, self.config, dtype, device, num_positions, target.ranks)
        self.num_kv_layers = self.model.num_kv_layers
        self.vocabulary = DraftVocabulary.of_target(self.model)

    def forward(self, batch: ForwardBatch, hidden_TD: torch.Tensor, plan: AttentionPlan, kv_pool: KVPool):
        return self.model.forward(batch, plan, kv_pool).hidden_TD

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.vocabulary.logits(hidden)
