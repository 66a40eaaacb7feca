"""Hugging Face generate as a peer. Settings: model_path, dtype, and what generate is told beyond a prompt.

An `assistant_model` is given as the path of its checkpoint.
"""

from functools import cache

import torch
import transformers
from transformers import AutoModelForCausalLM

from peers.worker import Answers, Contestant, Peer, Prompts, serve


@cache
def model(path: str, dtype: str) -> torch.nn.Module:
    """One for all contestants that have the same."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()


def greedy(model: torch.nn.Module, prompts: Prompts, max_new_tokens: int, **options) -> list[list[int]]:
    """Batches are padded on the left, as generate wants them; padding after an answer's end is cut off again."""
    width, ends = max(map(len, prompts)), model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    ids = torch.tensor([[ends[0]] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=ends[0], **options
    )
    rows = output[:, width:].tolist()
    lengths = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def load(settings: dict) -> Contestant:
    options = dict(settings)
    dtype, target = options.pop("dtype"), model(options.pop("model_path"), settings["dtype"])
    if "assistant_model" in options:
        options["assistant_model"] = model(options["assistant_model"], dtype)
    return lambda prompts, max_new_tokens: Answers(greedy(target, prompts, max_new_tokens, **options))


if __name__ == "__main__":
    serve(Peer(transformers.__version__, load))
