"""EAGLE-3 draft head, its training-time test, and its published checkpoint format.

Letters in shapes: B sequences, T positions, R loss rows (the last R of T), H heads, N head size, D hidden size,
V target vocabulary, W draft vocabulary.

Row t of the draft consumes the target's feature at t and the token x_{t+1}, and predicts x_{t+2}.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def aux_layers(num_layers: int) -> list[int]:
    """The k for which HF's hidden_states[k] (the input of layer k) feed the draft head."""
    return [2, num_layers // 2, num_layers - 3]


def rotate(x_BHTN: Tensor, positions_T: Tensor, theta: float) -> Tensor:
    """Rotary position embedding in Llama's half-split layout."""
    half = x_BHTN.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x_BHTN.device) / half)
    angles = positions_T[:, None] * frequencies
    low, high = x_BHTN.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x_BHTN), angles.sin().to(x_BHTN)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


class Attention(nn.Module):
    """Grouped-query attention over [embedding, feature]; the caller decides who attends to whom."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim, self.theta = config.head_dim, config.rope_parameters["rope_theta"]
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.groups = queries // keys
        self.q_proj = nn.Linear(2 * config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x_BTE: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """[B, T, 2D] -> [B, T, D]"""
        q, k, v = (
            projection(x_BTE).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, positions_T, self.theta), rotate(k, positions_T, self.theta)
        k, v = (x.repeat_interleave(self.groups, dim=1) for x in (k, v))
        return self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Llama's gated MLP."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Midlayer(nn.Module):
    """The single decoder layer: its attention reads embedding and feature, its residual is the feature."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = (
            nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(3)
        )
        self.self_attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, embedding_BTD: Tensor, feature_BTD: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        inputs_BTE = torch.cat([self.input_layernorm(embedding_BTD), self.hidden_norm(feature_BTD)], dim=-1)
        y_BTD = feature_BTD + self.self_attn(inputs_BTE, positions_T, attend)
        return y_BTD + self.mlp(self.post_attention_layernorm(y_BTD))


class Eagle3Head(nn.Module):
    """The draft head. Token embeddings belong to the target and are passed in."""

    def __init__(self, config: LlamaConfig, draft_ids_W: Tensor):
        super().__init__()
        self.config = config
        self.fc = nn.Linear(3 * config.target_hidden_size, config.hidden_size, bias=False)
        self.midlayer = Midlayer(config)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        in_draft_V = torch.zeros(config.vocab_size, dtype=torch.bool)
        in_draft_V[draft_ids_W] = True
        self.register_buffer("d2t", draft_ids_W - torch.arange(len(draft_ids_W)))
        self.register_buffer("t2d", in_draft_V)

    @property
    def draft_ids_W(self) -> Tensor:
        """Target id of each draft id; the checkpoint stores the difference of the two."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def logits(self, z_BTD: Tensor) -> Tensor:
        """Draft logits [B, T, W]; z itself, before the norm, is the next step's feature."""
        return self.lm_head(self.norm(z_BTD))


def draft_vocabulary(counts_V: Tensor, size: int, required: list[int]) -> Tensor:
    """The `size` most frequent target ids, `required` ones always among them, in ascending order."""
    counts_V = counts_V.clone()
    counts_V[required] = counts_V.max() + 1
    return counts_V.argsort(descending=True, stable=True)[:size].sort().values


@torch.no_grad()
def target_features(target: PreTrainedModel, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The three concatenated hidden states [B, T, 3D] and the logits [B, T, V] of the frozen target."""
    output = target(tokens_BT, output_hidden_states=True, use_cache=False)
    layers = aux_layers(target.config.num_hidden_layers)
    return torch.cat([output.hidden_states[k] for k in layers], dim=-1), output.logits


class TestTimeAttention:
    """Step 0 is causal. At step i each row also sees its own keys of steps 1..i, as it would while drafting."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, q_BHRN: Tensor, k_BHRN: Tensor, v_BHRN: Tensor) -> Tensor:
        self.keys.append(k_BHRN)
        self.values.append(v_BHRN)
        (context_k, *own_k), (context_v, *own_v) = self.keys, self.values
        rows, context = q_BHRN.shape[2], context_k.shape[2]
        q_BHRN = q_BHRN * q_BHRN.shape[-1] ** -0.5
        future_RT = torch.ones(rows, context, dtype=torch.bool, device=q_BHRN.device).triu(context - rows + 1)
        scores = (q_BHRN @ context_k.transpose(-1, -2)).masked_fill(future_RT, float("-inf"))
        own_scores = [(q_BHRN * k).sum(-1, keepdim=True) for k in own_k]
        weights = torch.cat([scores, *own_scores], dim=-1).softmax(-1, dtype=torch.float32).to(q_BHRN)
        mixed = weights[..., :context] @ context_v
        for i, v in enumerate(own_v):
            mixed = mixed + weights[..., context + i, None] * v
        return mixed


def shift(x_BT: Tensor, by: int) -> Tensor:
    """Move positions left by `by` and fill with zeros."""
    return torch.cat([x_BT[:, by:], torch.zeros_like(x_BT[:, :by])], dim=1)


def training_time_test(
    head: Eagle3Head,
    embedding: nn.Embedding,
    tokens_BT: Tensor,
    aux_BTF: Tensor,
    teacher_BTV: Tensor,
    mask_BT: Tensor,
    length: int,
    decay: float = 0.8,
) -> tuple[Tensor, Tensor]:
    """Unroll the head `length` steps on its own features, as it will be used to draft.

    mask_BT marks the rows t whose prediction x_{t+2} counts. Tokens, teacher and mask move left by one per step, so
    that row t predicts x_{t+2+i}. From step 1 on a row only sees itself and the context keys, so the rows that never
    count (most of the prompts) are dropped.

    Returns sum_i decay^i * CE_i against the target's distribution over the draft vocabulary, and the agreement with
    the target's most likely token at each step [length].
    """
    first = max(0, int(mask_BT.any(0).int().argmax()) - (length - 1))
    attend = TestTimeAttention()
    feature = head.fc(aux_BTF)
    loss, accuracy = feature.new_zeros(()), []
    keep_BT = mask_BT & shift(head.t2d[teacher_BTV.argmax(-1)], 1)
    teacher_BTW = F.pad(teacher_BTV[:, 1:, head.draft_ids_W], (0, 0, 0, 1))
    for i in range(length):
        start = first if i else 0
        rows = slice(start, None)
        positions = torch.arange(start, tokens_BT.shape[1], device=tokens_BT.device) + i
        embedded = embedding(shift(tokens_BT, 1 + i)[:, rows])
        feature = head.midlayer(embedded, feature, positions, attend)
        if i == 0:
            feature = feature[:, first:]
        keep = shift(keep_BT, i)[:, first:]
        target_logits = F.pad(teacher_BTW[:, i:], (0, 0, 0, i))[:, first:][keep]
        logits = head.logits(feature[keep])
        loss = loss + decay**i * F.cross_entropy(logits, target_logits.softmax(-1))
        accuracy.append((logits.argmax(-1) == target_logits.argmax(-1)).float().mean())
    return loss, torch.stack(accuracy)


def save_head(head: Eagle3Head, folder: Path) -> None:
    """Write config.json and model.safetensors as SpecForge and SGLang publish them."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in head.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    head.config.save_pretrained(folder)


def load_head(folder: Path) -> Eagle3Head:
    """Read a head written by `save_head`."""
    weights = load_file(folder / "model.safetensors")
    config = LlamaConfig.from_pretrained(folder)
    head = Eagle3Head(config, weights["d2t"] + torch.arange(len(weights["d2t"])))
    head.load_state_dict(weights)
    return head.eval()
