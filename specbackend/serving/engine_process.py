"""The process that owns the engine, and with it the device: `python -m specbackend.serving.engine_process`.

Started by an adapter with exec, never fork, and shared by all adapters of its tritonserver that want an equal engine.
Two threads: one steps the engine, one listens to the adapters and ends the process when nobody needs it. Only this side
of the socket imports torch.
"""

import argparse
import importlib
import os
import queue
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from specbackend.cache.tree_view import TreeView
from specbackend.errors import ConfigError, InvalidRequest, QueueFull
from specbackend.request import Request, Update
from specbackend.serving.connections import Connection, Connections, Gone, Heard
from specbackend.serving.protocol import (
    CacheTree,
    Cancel,
    Facts,
    FlushCache,
    Ready,
    Rejected,
    Start,
    Step,
    Submit,
)

VIEW_LIFE_S = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    listener = socket.socket(fileno=args.listener_fd)
    listener.set_inheritable(False)
    connections = Connections(listener, args.server_pid, args.linger)
    try:
        run(connections.heard, args.engine, args.started)
    except ConfigError as error:
        connections.fail(str(error))
    except Exception as error:  # the adapters answer the clients with it and start a new engine
        traceback.print_exc()
        connections.fail(f"{type(error).__name__}: {error}")
    os._exit(1)  # at once: what else there is to clean up goes with the process


def run(heard: queue.SimpleQueue[Heard], engine_name: str, started: float) -> None:
    """Load the engine that the first adapter asks for and serve until it fails."""
    early = until_start(heard)
    engine = load(engine_name, early[-1].message)
    server = EngineServer(engine, describe(engine, time.monotonic() - started))
    for each in early:
        server.hear(each)
    while True:
        for each in take(heard, wait=not engine.has_work):
            server.hear(each)
        server.step()


def until_start(heard: queue.SimpleQueue[Heard]) -> list[Heard]:
    """What is said up to the first Start, which is the last of it."""
    early = [heard.get()]
    while not isinstance(early[-1].message, Start):
        early.append(heard.get())
    return early


def load(engine_name: str, start: Start) -> Any:
    """Import torch and all that, and load the checkpoints."""
    module, name = engine_name.split(":")
    return getattr(importlib.import_module(module), name)(**start.params)


def describe(engine: Any, load_seconds: float) -> Ready:
    model = engine.model_config
    num_draft_tokens = engine.config.speculative_num_draft_tokens or 0
    return Ready(engine.context_length, model.vocab_size, sorted(model.eos_token_ids), num_draft_tokens, load_seconds)


@dataclass(frozen=True)
class Asker:
    """Whose request it is, and what it is called there."""

    connection: Connection
    request_id: str


@dataclass(frozen=True)
class SeenTree:
    limit: int
    time: float
    view: TreeView


class EngineServer:
    """An engine and those it works for. For one thread."""

    def __init__(self, engine: Any, ready: Ready):
        self._engine, self._ready = engine, ready
        self._adapters: list[Connection] = []
        self._askers: dict[str, Asker] = {}  # by the engine's own request ids
        self._seen: SeenTree | None = None

    def hear(self, heard: Heard) -> None:
        connection = heard.connection
        match heard.message:
            case FlushCache() | CacheTree() if connection.is_closed:
                pass
            case Start():
                self._adapters.append(connection)
                connection.send(replace(self._ready, stats=vars(self._engine.stats())))
            case Submit(request_id, input_ids, params):
                self._submit(Asker(connection, request_id), input_ids, params)
            case Cancel(request_id):
                self._cancel(_engines_id(Asker(connection, request_id)))
            case FlushCache():
                connection.send(Facts({"freed_tokens": self._engine.flush_cache()}))
            case CacheTree(limit):
                connection.send(Facts(self._facts(limit)))
            case Gone():
                self._forget(connection)

    def step(self) -> None:
        updates: dict[Connection, list[Update]] = {adapter: [] for adapter in self._adapters}
        for update in self._engine.step():
            asker = self._askers[update.request_id]
            updates.setdefault(asker.connection, []).append(replace(update, request_id=asker.request_id))
            if update.finished:
                del self._askers[update.request_id]
        stats = vars(self._engine.stats())  # asdict would take longer than all else here
        for adapter, own in updates.items():
            adapter.send(Step(own, stats))

    def _submit(self, asker: Asker, input_ids: list[int], params: Any) -> None:
        request = Request(_engines_id(asker), input_ids, params)
        try:
            self._engine.submit(request)
            self._askers[request.request_id] = asker
        except InvalidRequest as error:
            asker.connection.send(Rejected(asker.request_id, error.field, error.message))
        except QueueFull as error:
            asker.connection.send(Rejected(asker.request_id, None, str(error)))

    def _cancel(self, engines_id: str) -> None:
        """Ids that are over are no matter."""
        if self._askers.pop(engines_id, None):
            self._engine.cancel(engines_id)

    def _forget(self, connection: Connection) -> None:
        for engines_id in [key for key, asker in self._askers.items() if asker.connection is connection]:
            self._cancel(engines_id)
        if connection in self._adapters:
            self._adapters.remove(connection)
        connection.close()

    def _facts(self, limit: int) -> dict:
        config, stats = self._engine.config, self._engine.stats()
        return {
            "model_path": config.model_path,
            "speculative_algorithm": config.speculative_algorithm,
            "context_length": self._engine.context_length,
            "adapters": len(self._adapters),
            "last_gen_throughput": stats.gen_throughput,
            "avg_spec_accept_length": 1 + stats.accepted_tokens / stats.drafts if stats.drafts else None,
            "total_slots": stats.total_slots,
            "free_slots": stats.free_slots,
            **asdict(self._cache_view(limit)),
        }

    def _cache_view(self, limit: int) -> TreeView:
        """Looking at a large tree takes a while, in which all wait: soon after, the same is seen again."""
        if limit == 0:
            return self._engine.cache_view(limit)
        now = time.monotonic()
        if self._seen is None or self._seen.limit != limit or now >= self._seen.time + VIEW_LIFE_S:
            self._seen = SeenTree(limit, now, self._engine.cache_view(limit))
        return self._seen.view


def _engines_id(asker: Asker) -> str:
    return f"{asker.connection.number}/{asker.request_id}"


def take(heard: queue.SimpleQueue, wait: bool) -> list[Heard]:
    """All that is there; with `wait`, at least one."""
    taken = [heard.get()] if wait else []
    with suppress(queue.Empty):
        while True:
            taken.append(heard.get_nowait())
    return taken


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Engine process; started by the Triton adapter.")
    parser.add_argument("--listener-fd", type=int, required=True, help="inherited socket that listens for adapters")
    parser.add_argument("--server-pid", type=int, required=True, help="the tritonserver it belongs to")
    parser.add_argument("--started", type=float, default=time.monotonic(), help="when it was, by time.monotonic()")
    parser.add_argument("--linger", type=float, default=5.0, help="seconds without any adapter; default: %(default)s")
    parser.add_argument("--engine", default="specbackend.engine:serving_engine", help="module:factory")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
