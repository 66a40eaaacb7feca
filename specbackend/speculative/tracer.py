"""Speculative steps as requests see them that ask for a trace: see `spec_trace`."""

import time

import torch

from specbackend.sampling import SamplingBatch
from specbackend.sampling.limits import scaled
from specbackend.spec_trace import Round, TreeTrace
from specbackend.speculative.draft_tree import Proposal
from specbackend.speculative.verifier import AcceptedPath


class Observer:
    """Is told how a step goes on. This one does not mind."""

    def drafted(self, proposal: Proposal) -> None: ...

    def verified(self, logits_BNV: torch.Tensor, path: AcceptedPath) -> None:
        """logits_BNV: the target's, as it picks from them."""

    def extended(self) -> None: ...


NOBODY = Observer()


class Tracer(Observer):
    """Keeps what it is told until `rounds` is asked for. Waits for the device, so that each part's time is its own."""

    def __init__(self, rows: list[int], sampling: SamplingBatch, started_ns: int):
        """rows: which requests of the batch ask."""
        self._rows, self._sampling = rows, sampling
        self._last_ns, self._parts_ms = started_ns, []

    def drafted(self, proposal: Proposal) -> None:
        self._proposal = proposal
        self._note_time()

    def verified(self, logits_BNV: torch.Tensor, path: AcceptedPath) -> None:
        self._logits_BNV, self._path = logits_BNV, path
        self._note_time()

    def extended(self) -> None:
        self._note_time()

    def rounds(self) -> dict[int, Round]:
        """By row."""
        return {row: Round(self._tree(row), self._accepted(row), *self._parts_ms) for row in self._rows}

    def _tree(self, row: int) -> TreeTrace:
        """Of the nodes that are there for this request."""
        tree, draft_BN = self._proposal.tree, self._proposal.logprob_BN
        drafted_N = tree.drafted_BN[row]
        parent_M, token_M = tree.parent_BN[row, drafted_N], tree.token_BN[row, drafted_N]
        target_M = self._target_logprobs(row)[parent_M, token_M]
        return TreeTrace(
            parents=[-1, *_places(drafted_N)[parent_M[1:]].tolist()],
            token_ids=token_M.tolist(),
            draft_logprobs=[None] * len(token_M) if draft_BN is None else _below_root(draft_BN[row, drafted_N]),
            target_logprobs=_below_root(target_M),
        )

    def _accepted(self, row: int) -> list[int]:
        path_P = self._path.order_BN[row, 1 : self._path.count_B[row]]
        return _places(self._proposal.tree.drafted_BN[row])[path_P].tolist()

    def _target_logprobs(self, row: int) -> torch.Tensor:
        """[N, V], of the tokens that may follow each node."""
        one = slice(row, row + 1)
        return scaled(self._logits_BNV[one], self._sampling.temperature_B[one])[0].log_softmax(dim=-1)

    def _note_time(self) -> None:
        device = self._sampling.temperature_B.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now_ns = time.monotonic_ns()
        self._parts_ms.append((now_ns - self._last_ns) / 1e6)
        self._last_ns = now_ns


def _places(drafted_N: torch.Tensor) -> torch.Tensor:
    """Each drafted node's place among them."""
    return drafted_N.cumsum(dim=0) - 1


def _below_root(logprob_M: torch.Tensor) -> list[float | None]:
    return [None, *logprob_M[1:].tolist()]
