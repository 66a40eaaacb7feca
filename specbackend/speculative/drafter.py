"""What the tree decoder needs of a drafter, whatever it drafts with."""

from dataclasses import dataclass
from typing import Protocol

from specbackend.batch import Accepted, ExtendBatch, ForwardBatch, Sequences
from specbackend.config import TreeShape
from specbackend.cuda_graphs import Recorder
from specbackend.models.llama import TargetOutput
from specbackend.request import Request
from specbackend.sampling import SamplingBatch
from specbackend.speculative.draft_tree import Proposal
from specbackend.speculative.tree_shapes import TreeShapes
from specbackend.speculative.verifier import AcceptedPath

MOST_UNFED = 32  # plain steps that a draft may be behind


@dataclass(frozen=True)
class Verified:
    """One verification: what the target was given, what it said, and the path that it accepted."""

    forward: ForwardBatch
    output: TargetOutput
    path: AcceptedPath
    accepted: Accepted


@dataclass(frozen=True)
class CacheRule:
    """What a prefix in the cache must hold for drafts after it to be as good as drafts without a cache."""

    successor_keys: bool = False  # draft KV of a slot depends on the next token too
    has_draft_kv: bool = False  # slots filled by plain decoding lack it
    unfed_tokens: int = 0  # at most so many of a running request's last tokens have no draft KV yet


class Drafter(Protocol):
    cache_rule: CacheRule
    is_on_device: (
        bool  # `propose` and `follow_path` leave the host alone: nothing is read from it and nothing brought to it
    )

    def follow_prompt(
        self, batch: ExtendBatch, forward: ForwardBatch, output: TargetOutput, accepted: Accepted
    ) -> None:
        """Take note of prompt chunks that the target has computed."""

    def record_forwards(self, record: Recorder, batch_sizes: list[int], num_columns: int, tree: TreeShape) -> None:
        """From now on replay the draft's forwards for this tree. num_columns: of the request table."""

    def propose(self, at: Sequences, sampling: SamplingBatch, shapes: TreeShapes) -> Proposal:
        """Draft what may follow each sequence's root, for a target that picks as `sampling` says."""

    def follow_path(self, verified: Verified, at: Sequences) -> None:
        """Take note of what became of the proposal; `at` is as it was proposed for."""

    def keep_plain(self, output: TargetOutput, at: Sequences) -> None:
        """Keep of a plain step, which computed the roots, what `catch_up` needs. Leaves the host alone."""

    def catch_up(self, requests: list[Request], forward: ForwardBatch) -> None:
        """Read what plain steps have computed: the last `num_unfed` tokens of each request, at most MOST_UNFED.

        forward: these tokens and the unfed_tokens before them, if there are so many.
        """
