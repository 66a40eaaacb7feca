"""The server's own logits processors: Python functions that its configuration names.

A processor is called for every place where the target may pick a token, drafts included:

    def processor(prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor, custom_params: dict | None)

It gets the text before that place, what the request said in custom_params, and the target's logits (float32 [V],
logit_bias added), which it may change in place, and returns logits [V]. It must be a function of these alone and take
any text: the engine calls it for drafts that are rejected too, in any order, and again after a retraction. `-inf`
forbids a token.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from specbackend.errors import ConfigError
from specbackend.request import Failure, Request
from specbackend.sampling.nodes import Nodes

LogitsProcessor = Callable[[list[int], list[int], torch.Tensor, dict | None], torch.Tensor]


def load_processors(names: str) -> tuple[LogitsProcessor, ...]:
    """Import what `logits_processors` names: module:function, separated by commas. Raises ConfigError."""
    return tuple(_load(name.strip()) for name in names.split(","))


def _load(name: str) -> LogitsProcessor:
    module, _, attribute = name.partition(":")
    try:
        processor = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"logits_processors: {name!r} is not an importable module:function: {error}") from error
    if not callable(processor):
        raise ConfigError(f"logits_processors: {name!r} is not callable")
    return processor


@dataclass(frozen=True)
class CustomProcessors:
    rows: list[int]  # the requests that have any
    requests: list[Request]

    @classmethod
    def of(cls, requests: list[Request], device) -> "CustomProcessors | None":
        rows = [row for row, request in enumerate(requests) if request.processors]
        return cls(rows, [requests[row] for row in rows]) if rows else None

    def apply(self, logits_BNV: torch.Tensor, nodes: Nodes) -> None:
        for row, request, paths in zip(self.rows, self.requests, nodes.paths(self.rows), strict=True):
            for processor in request.processors:
                for logits_V, path in zip(logits_BNV[row], paths, strict=True):
                    if request.failure is None:
                        _apply_one(processor, request, logits_V, path)


def _apply_one(processor: LogitsProcessor, request: Request, logits_V: torch.Tensor, path: tuple[int, ...]) -> None:
    """What the processor does wrong ends its request and no other."""
    try:
        text = list(request.input_ids), [*request.output_ids, *path]
        new_V = processor(*text, logits_V, request.params.custom_params)
        if new_V.shape != logits_V.shape or not new_V.max() > -torch.inf:  # false for nan too
            raise ValueError(f"returned {tuple(new_V.shape)} logits, the best {new_V.max().item()}")
        logits_V.copy_(new_V)
    except Exception as error:
        request.failure = Failure("logits_processors", f"{type(error).__name__}: {error}")
