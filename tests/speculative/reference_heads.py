"""EAGLE-3's draft, slowly: no cache, no batch, one forward over the whole sequence per question asked.

Written from the published algorithm (SafeAILab/EAGLE `cnets.py`: LlamaDecoderLayeremb.forward, topK_genrate) and from
nothing in specbackend, in Hugging Face's rotate-half layout, so that the two can only agree by both being right.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file


class ReferenceDraft:
    def __init__(self, folder: Path, target):
        """target: the Hugging Face model the head was made for."""
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")
        self.embedding = target.model.embed_tokens.weight
        self.target_id = torch.arange(len(self.weights["d2t"])) + self.weights["d2t"]

    def hidden(self, hidden_TD: torch.Tensor, token_T: torch.Tensor) -> torch.Tensor:
        """The decoder layer over a whole sequence: row t sits at position t and sees rows 0..t."""
        w = {name.removeprefix("midlayer."): tensor for name, tensor in self.weights.items()}
        embedded = self._norm(self.embedding[token_T], w["input_layernorm.weight"])
        x = torch.cat([embedded, self._norm(hidden_TD, w["hidden_norm.weight"])], dim=-1)
        y = hidden_TD + self._attention(x, w)
        z = self._norm(y, w["post_attention_layernorm.weight"])
        gated = torch.nn.functional.silu(z @ w["mlp.gate_proj.weight"].T) * (z @ w["mlp.up_proj.weight"].T)
        return y + gated @ w["mlp.down_proj.weight"].T

    def logprobs(self, hidden_D: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(
            self._norm(hidden_D, self.weights["norm.weight"]) @ self.weights["lm_head.weight"].T, -1
        )

    def _norm(self, x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]) * weight

    def _attention(self, x, w):
        T, H, G = len(x), self.config["num_attention_heads"], self.config["num_key_value_heads"]
        D = self.config["head_dim"]
        q = self._rope((x @ w["self_attn.q_proj.weight"].T).view(T, H, D))
        k = self._rope((x @ w["self_attn.k_proj.weight"].T).view(T, G, D)).repeat_interleave(H // G, dim=1)
        v = (x @ w["self_attn.v_proj.weight"].T).view(T, G, D).repeat_interleave(H // G, dim=1)
        score = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(D)
        score = score.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), float("-inf"))
        return torch.einsum("hqk,khd->qhd", score.softmax(-1), v).reshape(T, H * D) @ w["self_attn.o_proj.weight"].T

    def _rope(self, x):
        T, _, D = x.shape
        theta = self.config.get("rope_theta") or self.config.get("rope_parameters", {}).get("rope_theta", 10000.0)
        angle = torch.arange(T)[:, None] / theta ** (torch.arange(0, D, 2) / D)
        cos, sin = angle.cos().repeat(1, 2)[:, None], angle.sin().repeat(1, 2)[:, None]
        return x * cos + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], dim=-1) * sin


def grow_tree(draft: ReferenceDraft, target, token_ids: list[int], num_steps: int, topk: int, num_draft_tokens: int):
    """Draft after token_ids, whose last token is the root. Returns (tokens, parents) of num_draft_tokens nodes."""
    output = target(torch.tensor([token_ids[:-1]]), output_hidden_states=True)
    layers = target.config.num_hidden_layers
    features = torch.cat([output.hidden_states[k][0] for k in (2, layers // 2, layers - 3)], dim=-1)
    hidden = features @ draft.weights["fc.weight"].T
    following = token_ids[1:]

    def after(path: list[dict]) -> tuple[torch.Tensor, list[tuple[float, int]]]:
        """Hidden state and top-k (log-probability, target id) at the end of a drafted path."""
        rows = torch.cat([hidden, *[node["fed"][None] for node in path]])
        last = draft.hidden(rows, torch.tensor(following + [node["token"] for node in path]))[-1]
        logprob, draft_id = draft.logprobs(last).topk(topk)
        return last, [(float(p), int(draft.target_id[i])) for p, i in zip(logprob, draft_id, strict=True)]

    def children(parent: dict | None) -> list[dict]:
        path = parent["path"] if parent else []
        last, best = after(path)
        base = parent["score"] if parent else 0.0
        made = [{"token": token, "score": base + logprob, "fed": last, "parent": parent} for logprob, token in best]
        for node in made:
            node["path"] = path + [node]
        return made

    level = children(None)
    recorded, beam = list(level), level
    for _ in range(num_steps - 1):
        level = [child for node in beam for child in children(node)]
        recorded += level
        beam = sorted(level, key=lambda node: -node["score"])[:topk]
    ranked = sorted(range(len(recorded)), key=lambda i: -recorded[i]["score"])[: num_draft_tokens - 1]
    kept = [recorded[i] for i in sorted(ranked)]
    place = {id(node): index for index, node in enumerate(kept, start=1)}
    parents = [place[id(node["parent"])] if node["parent"] else 0 for node in kept]
    return [token_ids[-1]] + [node["token"] for node in kept], [0] + parents
