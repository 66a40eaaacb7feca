"""A slow and simple EAGLE-3 drafter, to measure the accept length of a head.

Nothing is cached: every call reruns the head over the whole context. Greedy verification accepts exactly those
drafted tokens that the target would have produced itself, so the target's greedy continuation is computed once and
every drafted tree is compared with it.
"""

from dataclasses import dataclass

import torch
from eagle3_training import Eagle3Head, target_features
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class TreeShape:
    """SGLang's three numbers: the depth, the branching and the size (with the root) of a drafted tree."""

    num_steps: int
    topk: int
    num_draft_tokens: int

    def __str__(self) -> str:
        return f"({self.num_steps},{self.topk},{self.num_draft_tokens})"


@dataclass
class Candidate:
    """A drafted token; `parent` is its parent's index among all candidates, -1 for the root."""

    token: int
    parent: int
    score: float


class Drafter:
    """The head with one row per context token and per expanded candidate."""

    def __init__(self, head: Eagle3Head, embedding: torch.nn.Embedding, tokens: Tensor, aux_TF: Tensor):
        """tokens x_0..x_n, features of x_0..x_{n-1}; x_n is the root."""
        self.head, self.embedding = head, embedding
        context = len(tokens) - 1
        self.tokens = tokens[1:]
        self.features = head.fc(aux_TF[:context])
        self.positions = torch.arange(context)
        self.visible = torch.ones(context, context, dtype=torch.bool).tril()
        self.z = self._run()

    def _run(self) -> Tensor:
        """All rows at once: [rows, D]"""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.visible)

        return self.head.midlayer(self.embedding(self.tokens[None]), self.features[None], self.positions, attend)[0]

    def expand(self, tokens: list[int], parent_rows: list[int], position: int) -> list[int]:
        """Add one row per token: it sees what its parent sees and itself. Returns the new rows."""
        old, new = len(self.tokens), len(tokens)
        self.tokens = torch.cat([self.tokens, torch.tensor(tokens)])
        self.features = torch.cat([self.features, self.z[parent_rows]])
        self.positions = torch.cat([self.positions, torch.full((new,), position)])
        visible = torch.eye(old + new, dtype=torch.bool)
        visible[:old, :old] = self.visible
        visible[old:, :old] = self.visible[parent_rows]
        self.visible = visible
        self.z = self._run()
        return list(range(old, old + new))

    def children(self, row: int, topk: int) -> list[tuple[int, float]]:
        """The most likely next tokens after a row, with their log-probabilities."""
        top = self.head.logits(self.z[row]).log_softmax(-1).topk(topk)
        return list(zip(self.head.draft_ids_W[top.indices].tolist(), top.values.tolist(), strict=True))


@torch.inference_mode()
def grow_tree(
    head: Eagle3Head, embedding: torch.nn.Embedding, tokens: Tensor, aux_TF: Tensor, shape: TreeShape
) -> list[Candidate]:
    """EAGLE-2's dynamic tree: beams of `topk`, then the best candidates of all levels, in index order."""
    drafter = Drafter(head, embedding, tokens, aux_TF)
    context = len(tokens) - 1
    candidates = [Candidate(t, -1, score) for t, score in drafter.children(context - 1, shape.topk)]
    beam, row_of = list(range(shape.topk)), {-1: context - 1}
    for step in range(shape.num_steps - 1):
        parent_rows = [row_of[candidates[i].parent] for i in beam]
        rows = drafter.expand([candidates[i].token for i in beam], parent_rows, context + step)
        row_of.update(zip(beam, rows, strict=True))
        first = len(candidates)
        for i in beam:
            children = drafter.children(row_of[i], shape.topk)
            candidates += [Candidate(t, i, candidates[i].score + score) for t, score in children]
        beam = sorted(range(first, len(candidates)), key=lambda i: -candidates[i].score)[: shape.topk]
    best = sorted(range(len(candidates)), key=lambda i: -candidates[i].score)[: shape.num_draft_tokens - 1]
    new_index = {old: new for new, old in enumerate(sorted(best))} | {-1: -1}
    return [Candidate(candidates[i].token, new_index[candidates[i].parent], candidates[i].score) for i in sorted(best)]


def accepted(tree: list[Candidate], truth: list[int]) -> int:
    """Length of the drafted path that agrees with the target's continuation."""
    node = -1
    for depth, token in enumerate(truth):
        node = next((i for i, c in enumerate(tree) if c.parent == node and c.token == token), None)
        if node is None:
            return depth
    return len(truth)


@torch.inference_mode()
def accept_length(
    target: PreTrainedModel, head: Eagle3Head, prompts: list[list[int]], responses: list[list[int]], shape: TreeShape
) -> float:
    """Tokens emitted per verification, the bonus token included, over the target's greedy responses."""
    emitted = rounds = 0
    for prompt, response in zip(prompts, responses, strict=True):
        tokens = torch.tensor(prompt + response)
        aux_TF = target_features(target, tokens[None])[0][0]
        n = len(prompt)
        while n < len(tokens) - 1:
            tree = grow_tree(head, target.get_input_embeddings(), tokens[: n + 1], aux_TF, shape)
            step = min(accepted(tree, tokens[n + 1 :].tolist()) + 1, len(tokens) - 1 - n)
            n, emitted, rounds = n + step, emitted + step, rounds + 1
    return emitted / rounds
