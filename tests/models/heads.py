"""Load a draft as the engine loads it, run a whole prompt through it, and ask the reference what comes out."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import PreTrainedModel

from specbackend.config import EngineConfig
from specbackend.models.draft import DraftModel
from specbackend.models.llama import LlamaModel
from specbackend.models.registry import load_draft
from tests.models.forward import CPU, run_prompt
from tests.speculative.reference_heads import ReferenceEagle, ReferenceEagle3

TOKENS = torch.randint(64, (20,), generator=torch.Generator().manual_seed(1)).tolist()
REFERENCES = {"EAGLE": ReferenceEagle, "EAGLE3": ReferenceEagle3}


@dataclass(frozen=True)
class Target:
    folder: Path
    hf: PreTrainedModel
    model: LlamaModel


def load_head(target: Target, kind: str, folder: Path, num_positions: int = 128, **params) -> DraftModel:
    paths = {"model_path": str(target.folder), "speculative_draft_model_path": str(folder)}
    config = EngineConfig.from_params({**paths, "speculative_algorithm": kind, **params})
    return load_draft(config, target.model, target.model.lm_head.dtype, CPU, num_positions)


@torch.inference_mode()
def drafts(target: Target, head: DraftModel, k: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The head's hidden states after TOKENS, and the log-probabilities and ids of its k likeliest tokens."""
    target.model.captured_layers = head.captured_layers
    hidden_TD = head.fuse(run_prompt(target.model, TOKENS[:-1]).feature_TF)

    def forward(batch, plan, kv_pool):
        return head.forward(batch, hidden_TD, plan, kv_pool)

    # in the shape of a target, which is what run_prompt runs
    as_target = SimpleNamespace(forward=forward, config=head.config, num_kv_layers=head.num_kv_layers)
    output_TD = run_prompt(as_target, TOKENS[1:])
    logprob_TK, draft_id_TK = head.logits(output_TD).log_softmax(dim=-1).topk(k)
    return output_TD, logprob_TK, head.vocabulary.target_id_W[draft_id_TK]


@torch.no_grad()
def reference_drafts(target: Target, kind: str, folder: Path, k: int = 5, **options):
    """The same by the published code, from a head that is written in the official format."""
    reference = REFERENCES[kind](folder, target.hf, **options)
    hidden_TD = reference.fuse(reference.features(TOKENS[:-1]))
    output_TD = reference.hidden(hidden_TD, torch.tensor(TOKENS[1:]))
    logits_TW = torch.stack([reference.logits(hidden_D) for hidden_D in output_TD])
    logprob_TK, draft_id_TK = torch.log_softmax(logits_TW, dim=-1).topk(k)
    token_TK = draft_id_TK.clone().apply_(reference.target_id)
    return output_TD, logprob_TK, token_TK


def assert_drafts_as(target: Target, kind: str, folder: Path, official: Path | None = None, **params) -> None:
    """The head in `folder` is the network whose official format is in `official`."""
    expected = reference_drafts(target, kind, official or folder)
    actual = drafts(target, load_head(target, kind, folder, **params))
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
