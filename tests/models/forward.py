"""Load a checkpoint and run a whole prompt through it, without engine, cache or scheduler."""

from pathlib import Path

import torch

from specbackend.attention.torch_sdpa import TorchAttention
from specbackend.batch import ForwardBatch
from specbackend.cache.kv_pool import KVPool
from specbackend.models.llama import LlamaModel, TargetOutput
from specbackend.models.model_config import ModelConfig
from specbackend.runner import causal_mask

CPU = torch.device("cpu")


def load_llama(folder: Path, num_positions: int = 128) -> LlamaModel:
    return LlamaModel(folder, ModelConfig.read(folder), torch.float32, CPU, num_positions)


def prompt_logits(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """[T, V]: the logits after every token of the prompt."""
    model = load_llama(folder)
    return model.logits(run_prompt(model, token_ids).hidden_TD)


def prompt_output(folder: Path, token_ids: list[int], captured_layers: tuple[int, ...] = ()) -> TargetOutput:
    model = load_llama(folder)
    model.captured_layers = captured_layers
    return run_prompt(model, token_ids)


@torch.inference_mode()
def run_prompt(model: LlamaModel, token_ids: list[int]) -> TargetOutput:
    T = len(token_ids)
    slot_1Q = torch.arange(1, T + 1)[None]
    batch = ForwardBatch(
        token_BQ=torch.tensor([token_ids]),
        position_BQ=torch.arange(T)[None],
        slot_BQ=slot_1Q,
        prefix_slot_BL=torch.zeros(1, 0, dtype=torch.int64),
        prefix_len_B=torch.zeros(1, dtype=torch.int64),
        window_slot_BW=slot_1Q,
        window_mask_BQW=causal_mask(T, CPU)[None],
    )
    config = model.config
    pool = KVPool(model.num_kv_layers, T + 1, config.num_key_value_heads, config.head_dim, torch.float32, CPU)
    return model.forward(batch, TorchAttention().plan(batch, torch.float32), pool)
