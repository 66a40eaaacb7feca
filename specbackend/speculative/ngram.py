"""Drafting without a network: what followed the last few tokens when they stood in this text before.

Prompt lookup (Saxena 2023; vLLM's and SGLang's "ngram"), grown into a tree: each earlier occurrence proposes what came
after it, longest match first, the later of two equally long ones first.
"""

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from specbackend.batch import Accepted, ExtendBatch, ForwardBatch, Sequences
from specbackend.config import TreeShape
from specbackend.cuda_graphs import Recorder
from specbackend.models.llama import TargetOutput
from specbackend.request import Request
from specbackend.sampling import SamplingBatch
from specbackend.speculative.draft_tree import DraftTree, Proposal
from specbackend.speculative.drafter import CacheRule, Verified
from specbackend.speculative.tree_shapes import TreeShapes

MAX_OCCURRENCES = 64  # looked at per step, the latest ones: bounds the work on text that repeats itself


@dataclass
class NgramIndex:
    """A text and where each n-gram of the shortest size ends in it, kept up to date as the text grows."""

    size: int
    tokens: list[int] = field(default_factory=list)
    ends: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            self.tokens.append(token)
            if len(self.tokens) >= self.size:
                self.ends.setdefault(tuple(self.tokens[-self.size :]), []).append(len(self.tokens))

    def matches(self, longest: int) -> list[int]:
        """Ends of earlier occurrences of the text's last tokens, best first."""
        own = len(self.tokens)
        ends = self.ends.get(tuple(self.tokens[-self.size :]), [])
        earlier = [end for end in ends[-MAX_OCCURRENCES - 1 :] if end < own]
        return sorted(earlier, key=lambda end: (-self._match_length(end, longest), -end))

    def _match_length(self, end: int, longest: int) -> int:
        length = self.size
        while length < min(longest, end) and self.tokens[end - 1 - length] == self.tokens[-1 - length]:
            length += 1
        return length


class TokenTree:
    """A draft tree as lists; node 0 is the root. Siblings have distinct tokens."""

    def __init__(self, root: int):
        self.tokens, self.parents = [root], [0]
        self._children: dict[tuple[int, int], int] = {}

    def add_path(self, tokens: list[int], num_nodes: int) -> None:
        """Add the path below the root, as far as it is new, until the tree has num_nodes."""
        node = 0
        for token in tokens:
            child = self._children.get((node, token))
            if child is None:
                if len(self.tokens) == num_nodes:
                    return
                child = self._children[node, token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
            node = child


class NgramDrafter:
    cache_rule = CacheRule()
    is_on_device = False

    def __init__(self, min_match: int, max_match: int, device):
        self.min_match, self.max_match, self.device = min_match, max_match, device
        self._indexes: WeakKeyDictionary[Request, NgramIndex] = WeakKeyDictionary()

    def follow_prompt(
        self, batch: ExtendBatch, forward: ForwardBatch, output: TargetOutput, accepted: Accepted
    ) -> None:
        """Nothing to do: texts are read when something is proposed for them."""

    def record_forwards(self, record: Recorder, batch_sizes: list[int], num_columns: int, tree: TreeShape) -> None:
        """There are none."""

    def propose(self, at: Sequences, sampling: SamplingBatch, shapes: TreeShapes) -> Proposal:
        trees, N = [self._tree(request) for request in at.requests], shapes.most_nodes
        token_BN = torch.tensor([_padded(tree.tokens, N) for tree in trees], device=self.device)
        parent_BN = torch.tensor([_padded(tree.parents, N) for tree in trees], device=self.device)
        size_B1 = torch.tensor([[len(tree.tokens)] for tree in trees], device=self.device)
        return Proposal(DraftTree.of(token_BN, parent_BN, torch.arange(N, device=self.device) < size_B1))

    def follow_path(self, verified: Verified, at: Sequences) -> None:
        """Nothing to do, as above."""

    def keep_plain(self, output: TargetOutput, at: Sequences) -> None:
        """Nothing to do, as above."""

    def catch_up(self, requests: list[Request], forward: ForwardBatch) -> None:
        """Nothing to do, as above."""

    def _tree(self, request: Request) -> TokenTree:
        """At most as large as the request's own tree may be."""
        index, shape = self._index(request), request.tree
        tree = TokenTree(index.tokens[-1])
        for end in index.matches(self.max_match):
            path = index.tokens[end : end + shape.num_steps]
            tree.add_path(_legal(request, path), shape.num_nodes)
        return tree

    def _index(self, request: Request) -> NgramIndex:
        index = self._indexes.get(request)
        if index is None:
            index = self._indexes[request] = NgramIndex(self.min_match)
            index.extend(request.input_ids)
        index.extend(request.output_ids[len(index.tokens) - len(request.input_ids) :])
        return index


def _padded(values: list[int], length: int) -> list[int]:
    return values + [0] * (length - len(values))


def _legal(request: Request, path: list[int]) -> list[int]:
    """Up to the first token that the request's grammar forbids, which would be drafted for nothing."""
    return path if request.grammar is None else path[: request.grammar.count_legal(tuple(path))]
