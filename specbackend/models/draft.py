"""What all draft networks offer, and what they share: a vocabulary of their own and the rules of loading."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from specbackend.attention.base import AttentionPlan
from specbackend.batch import ForwardBatch
from specbackend.cache.kv_pool import KVPool
from specbackend.errors import ConfigError
from specbackend.models.linear import Linear
from specbackend.models.llama import LlamaModel
from specbackend.models.loader import Weights, read_pickle
from specbackend.models.model_config import ModelConfig
from specbackend.models.parallel_linear import VocabularyParallelLinear, vocabulary_parallel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DraftVocabulary:
    """The draft's LM head over W tokens, and which of the target's ids they are."""

    lm_head: Linear | VocabularyParallelLinear
    target_id_W: torch.Tensor  # int64, distinct

    @classmethod
    def of_target(cls, target: LlamaModel, token_ids: list[int] | None = None) -> "DraftVocabulary":
        """The target's own LM head, or its rows for some tokens only (FR-Spec)."""
        device = target.lm_head.device
        if token_ids is None:
            return cls(target.lm_head, torch.arange(target.config.vocab_size, device=device))
        ids = torch.tensor(token_ids, device=device)
        return cls(vocabulary_parallel(target.lm_head.rows(ids), target.ranks), ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the draft's tokens [..., W] after hidden [..., D]."""
        return self.lm_head(hidden)


class DraftModel(Protocol):
    """A network that drafts: a head on the target's features, or a language model of its own."""

    config: ModelConfig
    num_kv_layers: int
    captured_layers: tuple[int, ...]  # of the target, see LlamaModel
    is_head: bool  # is fed hidden states
    vocabulary: DraftVocabulary

    def forward(
        self, batch: ForwardBatch, hidden_TD: torch.Tensor | None, plan: AttentionPlan, kv_pool: KVPool
    ) -> torch.Tensor:
        """One pass over T = B * Q rows; returns hidden_TD, which a head consumes in the next drafted row."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As DraftVocabulary.logits, from what `forward` returned."""


class HeadModel(DraftModel, Protocol):
    """Row t consumes the target's feature at t and token x_{t+1}, sits at RoPE position t and predicts x_{t+2}."""

    def fuse(self, feature_TF: torch.Tensor) -> torch.Tensor:
        """The target's features [T, F] as hidden states [T, D], which `forward` consumes."""


def read_token_map(path: Path, vocab_size: int) -> list[int]:
    """FR-Spec's freq_*.pt: a list of the target's most frequent ids. Source: thunlp/FR-Spec `fr/fr.py`."""
    try:
        ids = read_pickle(path)
    except ConfigError as error:
        raise ConfigError(f"speculative_token_map: {error}") from error
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise ConfigError(f"speculative_token_map: {path} is not a list of token ids")
    if len(set(ids)) != len(ids) or not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ConfigError(
            f"speculative_token_map: {path} holds {len(ids)} ids from {min(ids)} to {max(ids)}, which are not distinct "
            f"ids of the target's vocabulary of {vocab_size}"
        )
    return ids


def check_pairing(folder: Path, draft: ModelConfig, target: ModelConfig) -> None:
    """Refuse a draft that was made for another target, as far as its config tells."""
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(f"{folder}: made for a vocabulary of {draft.vocab_size}, the target has {target.vocab_size}")
    made_for = draft.raw.get("target_hidden_size") or target.hidden_size
    if made_for != target.hidden_size:
        raise ConfigError(f"{folder}: made for a target of width {made_for}, this one has {target.hidden_size}")


def take_embedding(weights: Weights, config: ModelConfig, target: LlamaModel) -> torch.Tensor:
    """The draft's own embedding if the file has one, else the target's."""
    V, D, width = target.config.vocab_size, config.hidden_size, target.config.hidden_size
    if "embed_tokens.weight" in weights:
        return weights.take("embed_tokens.weight", V, D)
    if width != D:
        raise ConfigError(
            f"{weights.folder}: no embed_tokens, and the target's cannot serve: width {width}, the draft has {D}"
        )
    return target.embed_tokens


def check_one_layer(weights: Weights) -> None:
    """Heads of several layers, and those that draft in parallel, are other networks under the same names."""
    if "mask_hidden" in weights:
        raise ConfigError(f"{weights.folder}: a head that drafts in parallel (mask_hidden) is not served")
    names = [name.split(".") for name in weights.remaining() if name.startswith(("layers.", "midlayer."))]
    count = 1 + max((int(number) for _, number, *_ in names if number.isdigit()), default=0)
    if count > 1:
        raise ConfigError(f"{weights.folder}: the head has {count} layers, heads of 1 are served")


def finish_draft(weights: Weights) -> None:
    """A missing tensor is an error. One too many costs acceptance at worst, never exactness: it is named, once."""
    weights.check_complete()
    if unknown := weights.remaining():
        log.warning("%s: tensors of an unknown kind are ignored: %s", weights.folder, ", ".join(unknown))


def shaped_by_file(config: ModelConfig, weights: Weights, layer: str) -> ModelConfig:
    """The draft's config with the options that its tensors decide: published configs are often silent or wrong here."""
    return dataclasses.replace(
        config,
        qkv_bias=f"{layer}.self_attn.q_proj.bias" in weights,
        output_bias=f"{layer}.self_attn.o_proj.bias" in weights,
        mlp_bias=f"{layer}.mlp.gate_proj.bias" in weights,
        qk_norm=f"{layer}.self_attn.q_norm.weight" in weights,
    )
