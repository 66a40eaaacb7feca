"""A peer's side of tools/bench_peers: JSON lines on stdin and stdout. Standard library only.

    {"load": NAME, "settings": {...}}                             -> {"version": "..."}
    {"generate": NAME, "prompts": [[...], ...], "max_new_tokens": N} -> an Answers
    anything that fails                                           -> {"error": "..."}

A contestant is what `load` returns: called with token ids of prompts and a number of tokens, it gives Answers.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TextIO

Prompts = list[list[int]]


@dataclass
class Answers:
    """To a batch, greedy. `steps` are forwards of the target over drafted tokens, of each request; None: not told."""

    output_ids: list[list[int]]
    steps: int | None = None
    step_tokens: int = 0  # tokens that these steps yielded
    seconds: float = 0.0  # filled in by the worker


Contestant = Callable[[Prompts, int], Answers]


@dataclass(frozen=True)
class Peer:
    version: str
    load: Callable[[dict], Contestant]


def serve(peer: Peer) -> None:
    """Answer requests until stdin ends. What libraries print goes to stderr."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    contestants = {}
    for request in _requests(sys.stdin):
        try:
            reply = _reply(peer, contestants, request)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


def _requests(lines: TextIO) -> Iterator[dict]:
    return map(json.loads, lines)


def _reply(peer: Peer, contestants: dict[str, Contestant], request: dict) -> dict:
    if name := request.get("load"):
        contestants[name] = peer.load(request["settings"])
        return {"version": peer.version}
    start = time.perf_counter()
    answers = contestants[request["generate"]](request["prompts"], request["max_new_tokens"])
    answers.seconds = time.perf_counter() - start
    return asdict(answers)
