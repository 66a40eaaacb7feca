"""The draft heads, slowly: no cache, no batch, one forward over the whole sequence per question asked.

Written from the published code (SafeAILab/EAGLE `cnets.py`, `cnets1.py`; EAGLE-3.1's options as in vLLM's
`llama_eagle3.py`; MiMo's `modeling_mimo.py`) and from nothing in specbackend, in Hugging Face's rotate-half layout, so
that the two can only agree by both being right.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import silu


class ReferenceHead:
    """What the heads have in common. `layer` is the prefix of the decoder layer's tensors."""

    layer = "layers.0."

    def __init__(self, folder: Path, target):
        """target: the Hugging Face model the head was made for."""
        self.target = target
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")
        self.embedding = self.weights.get("embed_tokens.weight", target.model.embed_tokens.weight)

    def features(self, token_T: list[int]) -> torch.Tensor:
        """What the head is fed for each token: here, the target's final hidden state."""
        return self.target.model(torch.tensor([token_T])).last_hidden_state[0]

    def fuse(self, feature_TF: torch.Tensor) -> torch.Tensor:
        return feature_TF

    def hidden(self, hidden_TD: torch.Tensor, token_T: torch.Tensor) -> torch.Tensor:
        """The head over a whole sequence: row t sits at position t and sees rows 0..t."""
        raise NotImplementedError

    def logits(self, hidden_D: torch.Tensor) -> torch.Tensor:
        return hidden_D @ self.target.lm_head.weight.T

    def target_id(self, draft_id: int) -> int:
        return draft_id

    def linear(self, x, name):
        bias = self.weights.get(f"{name}.bias")
        return x @ self.weights[f"{name}.weight"].T + (0 if bias is None else bias)

    def norm(self, x, name):
        eps = self.config.get("rms_norm_eps", 1e-6)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * self.weights[f"{name}.weight"]

    def mlp(self, x):
        gate, up = self.linear(x, f"{self.layer}mlp.gate_proj"), self.linear(x, f"{self.layer}mlp.up_proj")
        return self.linear(silu(gate) * up, f"{self.layer}mlp.down_proj")

    def attention(self, x):
        T, H, G = len(x), self.config["num_attention_heads"], self.config["num_key_value_heads"]
        name, D = f"{self.layer}self_attn", self.config["head_dim"]
        q = self.rope(self.linear(x, f"{name}.q_proj").view(T, H, D))
        k = self.rope(self.linear(x, f"{name}.k_proj").view(T, G, D)).repeat_interleave(H // G, dim=1)
        v = self.linear(x, f"{name}.v_proj").view(T, G, D).repeat_interleave(H // G, dim=1)
        score = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(D)
        score = score.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), float("-inf"))
        return self.linear(torch.einsum("hqk,khd->qhd", score.softmax(-1), v).reshape(T, H * D), f"{name}.o_proj")

    def rope(self, x):
        T, _, D = x.shape
        theta = self.config.get("rope_theta") or self.config.get("rope_parameters", {}).get("rope_theta", 10000.0)
        angle = torch.arange(T)[:, None] / theta ** (torch.arange(0, D, 2) / D)
        cos, sin = angle.cos().repeat(1, 2)[:, None], angle.sin().repeat(1, 2)[:, None]
        return x * cos + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], dim=-1) * sin


class ReferenceEagle(ReferenceHead):
    """EAGLE-1/2; token_map restricts its vocabulary (FR-Spec)."""

    def __init__(self, folder: Path, target, token_map: list[int] | None = None):
        super().__init__(folder, target)
        self.token_map = token_map

    def hidden(self, hidden_TD, token_T):
        x = self.linear(torch.cat([self.embedding[token_T], hidden_TD], dim=-1), "fc")
        y = x + self.attention(x)
        return y + self.mlp(self.norm(y, "layers.0.post_attention_layernorm"))

    def logits(self, hidden_D):
        logits = super().logits(hidden_D)
        return logits if self.token_map is None else logits[self.token_map]

    def target_id(self, draft_id):
        return draft_id if self.token_map is None else self.token_map[draft_id]


class ReferenceEagle3(ReferenceHead):
    layer = "midlayer."

    def features(self, token_T):
        layers = self.target.config.num_hidden_layers
        ids = [layer + 1 for layer in self.config.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids", [])]
        ids = self.config.get("eagle_aux_hidden_state_layer_ids") or ids or [2, layers // 2, layers - 3]
        if "fc.weight" not in self.weights:
            return super().features(token_T)
        hidden_states = self.target(torch.tensor([token_T]), output_hidden_states=True).hidden_states
        return torch.cat([hidden_states[k][0] for k in ids], dim=-1)

    def fuse(self, feature_TF):
        if "fc.weight" not in self.weights:
            return feature_TF
        if "fc_norm.0.weight" in self.weights:
            chunks = feature_TF.split(self.target.config.hidden_size, dim=-1)
            feature_TF = torch.cat([self.norm(chunk, f"fc_norm.{i}") for i, chunk in enumerate(chunks)], dim=-1)
        if "input_norm.weight" in self.weights:
            feature_TF = self.norm(feature_TF, "input_norm")
        return self.linear(feature_TF, "fc")

    def hidden(self, hidden_TD, token_T):
        normed = self.norm(hidden_TD, "midlayer.hidden_norm")
        embedded = self.norm(self.embedding[token_T], "midlayer.input_layernorm")
        residual = normed if self.config.get("norm_before_residual") else hidden_TD
        y = residual + self.attention(torch.cat([embedded, normed], dim=-1))
        z = y + self.mlp(self.norm(y, "midlayer.post_attention_layernorm"))
        return self.norm(z, "norm") if self.config.get("norm_output") else z

    def logits(self, hidden_D):
        normed = hidden_D if self.config.get("norm_output") else self.norm(hidden_D, "norm")
        return normed @ self.weights["lm_head.weight"].T

    def target_id(self, draft_id):
        return draft_id + int(self.weights["d2t"][draft_id]) if "d2t" in self.weights else draft_id


class ReferenceMtp(ReferenceHead):
    """MiMo's own layer: in the target's checkpoint, with the target's shape."""

    layer = "model.mtp_layers.0."

    def __init__(self, folder: Path, target):
        super().__init__(folder, target)
        self.config.setdefault("head_dim", target.config.hidden_size // target.config.num_attention_heads)

    def hidden(self, hidden_TD, token_T):
        embedded = self.embedding[token_T].clone()
        embedded[0] = 0
        feature, token = self.named_norm(hidden_TD, "hidden_layernorm"), self.named_norm(embedded, "token_layernorm")
        x = self.linear(torch.cat([feature, token], dim=-1), f"{self.layer}input_proj")
        y = x + self.attention(self.named_norm(x, "input_layernorm"))
        z = y + self.mlp(self.named_norm(y, "post_attention_layernorm"))
        return self.named_norm(z, "final_layernorm")

    def named_norm(self, x, name):
        return self.norm(x, f"{self.layer}{name}")


@torch.no_grad()
def grow_tree(
    draft: ReferenceHead, token_ids: list[int], num_steps: int, topk: int, num_draft_tokens: int, adjust=None
):
    """Draft after token_ids, whose last token is the root. Returns (tokens, parents) of num_draft_tokens nodes.

    SafeAILab/EAGLE `topK_genrate`, over lists of dicts. adjust(logits, path tokens), if any, is what is done to the
    logits of the draft's tokens before their softmax.
    """
    hidden = draft.fuse(draft.features(token_ids[:-1]))
    following = token_ids[1:]

    def after(path: list[dict]) -> tuple[torch.Tensor, list[tuple[float, int]]]:
        """Hidden state and top-k (log-probability, target id) at the end of a drafted path."""
        rows = torch.cat([hidden, *[node["fed"][None] for node in path]])
        last = draft.hidden(rows, torch.tensor(following + [node["token"] for node in path]))[-1]
        logits = draft.logits(last)
        if adjust:
            logits = adjust(logits, [node["token"] for node in path])
        logprob, draft_id = torch.log_softmax(logits, dim=-1).topk(topk)
        return last, [(float(p), draft.target_id(int(i))) for p, i in zip(logprob, draft_id, strict=True)]

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
