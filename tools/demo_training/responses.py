"""The target's own greedy answers to the training questions, which are what the draft head learns to foresee."""

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

DROP_FINISHED_EVERY = 16


def decode_step(model: LlamaForCausalLM, tokens_B: Tensor, t: int, keys: Tensor, values: Tensor) -> Tensor:
    """Logits [B, V] after the tokens at position t, whose keys and values enter the caches [L, B, G, T, N].

    No mask and no padding: all rows are equally long. The query heads that share a key are laid out as if they were
    positions, so nothing is copied for grouped-query attention.
    """
    config = model.config
    h_BD = model.model.embed_tokens(tokens_B)
    cos, sin = model.model.rotary_emb(h_BD, torch.tensor([[t]]))
    for layer, k_BGTN, v_BGTN in zip(model.model.layers, keys, values, strict=True):
        attention, x_BD = layer.self_attn, layer.input_layernorm(h_BD)
        q, k, v = (
            projection(x_BD).view(len(x_BD), config.num_key_value_heads, -1, config.head_dim)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        k_BGTN[:, :, t : t + 1], v_BGTN[:, :, t : t + 1] = k, v
        mixed = F.scaled_dot_product_attention(q, k_BGTN[:, :, : t + 1], v_BGTN[:, :, : t + 1])
        h_BD = h_BD + attention.o_proj(mixed.flatten(1))
        h_BD = h_BD + layer.mlp(layer.post_attention_layernorm(h_BD))
    return model.lm_head(model.model.norm(h_BD))


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, prompts_BT: Tensor, max_new_tokens: int) -> list[list[int]]:
    """Greedy continuations of equally long prompts, each up to and including the end token."""
    batch, length = prompts_BT.shape
    cache = DynamicCache(config=model.config)
    logits_BV = model(prompts_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    keys, values = (
        F.pad(torch.stack([getattr(layer, name) for layer in cache.layers]), (0, 0, 0, max_new_tokens))
        for name in ("keys", "values")
    )
    responses: list[list[int]] = [[] for _ in range(batch)]
    alive = torch.arange(batch)
    for i in range(max_new_tokens):
        tokens = logits_BV.argmax(-1)
        for row, token in zip(alive.tolist(), tokens.tolist(), strict=True):
            if responses[row][-1:] != [model.config.eos_token_id]:
                responses[row].append(token)
        if i % DROP_FINISHED_EVERY == DROP_FINISHED_EVERY - 1:
            running = torch.tensor([responses[row][-1] != model.config.eos_token_id for row in alive.tolist()])
            if not running.any():
                break
            alive, tokens, keys, values = alive[running], tokens[running], keys[:, running], values[:, running]
        logits_BV = decode_step(model, tokens, length + i, keys, values)
    return responses


def respond(
    model: LlamaForCausalLM, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int = 64
) -> list[list[int]]:
    """Greedy responses to all prompts, in their order."""
    by_length = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    responses: list[list[int]] = [[] for _ in prompts]
    with tqdm(total=len(prompts), desc="responses", mininterval=5) as bar:
        for same in by_length.values():
            for start in range(0, len(same), batch_size):
                batch = same[start : start + batch_size]
                for i, response in zip(
                    batch, greedy(model, torch.tensor([prompts[i] for i in batch]), max_new_tokens), strict=True
                ):
                    responses[i] = response
                bar.update(len(batch))
    return responses
