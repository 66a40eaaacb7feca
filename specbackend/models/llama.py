"""The target: a decoder of the Llama kind (Llama, Mistral, Qwen2, Qwen3, MiMo) from a Hugging Face checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from specbackend.attention.base import AttentionPlan
from specbackend.batch import ForwardBatch
from specbackend.cache.kv_pool import KVPool
from specbackend.errors import ConfigError
from specbackend.models.layers import DecoderLayer, RMSNorm, rope_table
from specbackend.models.loader import Weights
from specbackend.models.model_config import FAMILIES, ModelConfig
from specbackend.models.parallel_linear import vocabulary_parallel
from specbackend.ranks import ONE_RANK, Ranks

MTP_PREFIX = "model.mtp_layers."  # MiMo's own draft layers, which are `models.mtp`'s to load


@dataclass(frozen=True)
class TargetOutput:
    """hidden_TD: after the final norm. feature_TF: what a draft is fed, see `LlamaModel.captured_layers`."""

    hidden_TD: torch.Tensor
    feature_TF: torch.Tensor


class LlamaModel:
    """A target network.

    A draft's features are the inputs of `captured_layers` side by side, or the final hidden state if it lists none.
    config: of this rank's part. The layers and the LM head are spread over the ranks; each has the whole embedding, as
    rows of a part would have to be summed.
    """

    def __init__(self, folder: Path, config: ModelConfig, dtype, device, num_positions: int, ranks: Ranks = ONE_RANK):
        config.check_implemented(folder)
        if config.architecture not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise ConfigError(f"{folder}: architecture {config.architecture} is not served; served are {known}")
        weights = Weights(folder, dtype, device, ranks=ranks)
        self.config, self.ranks = config, ranks
        self.num_kv_layers = config.num_hidden_layers
        self.captured_layers: tuple[int, ...] = ()
        self.embed_tokens = weights.take("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(weights, f"model.layers.{i}", config) for i in range(config.num_hidden_layers)]
        self.norm = RMSNorm.take(weights, "model.norm", config)
        if config.tie_word_embeddings:
            weights.discard("lm_head.weight")
            lm_head = self.embed_tokens  # if packed a second copy, as embedding takes rows of the first
        else:
            lm_head = weights.take("lm_head.weight", config.vocab_size, config.hidden_size)
        self.lm_head = vocabulary_parallel(lm_head, ranks)
        weights.discard_prefix(MTP_PREFIX)
        weights.finish()  # a tensor that nobody takes, such as a bias, would change what the model says
        self.rope = rope_table(config, num_positions, device)

    @property
    def feature_size(self) -> int:
        return max(1, len(self.captured_layers)) * self.config.hidden_size

    def forward(self, batch: ForwardBatch, plan: AttentionPlan, kv_pool: KVPool) -> TargetOutput:
        """Run all layers over the batch's T = B * Q rows, writing their K and V to the pool."""
        x_TD = F.embedding(batch.token_BQ.flatten(), self.embed_tokens)
        rope = self.rope[batch.position_BQ.flatten()]
        slot_T = batch.slot_BQ.flatten()
        captured = []
        for index, layer in enumerate(self.layers):
            if index in self.captured_layers:
                captured.append(x_TD.clone())  # the layer may overwrite it
            x_TD = layer(x_TD, x_TD, rope, slot_T, plan, kv_pool.layer(index), batch.token_BQ.shape)
        hidden_TD = self.norm(x_TD)
        return TargetOutput(hidden_TD, torch.cat(captured, dim=-1) if captured else hidden_TD)

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """[T, V] in the engine's dtype."""
        return self.lm_head(hidden_TD)
