"""The process that owns the engine, and with it the device: `python -m specbackend.serving.engine_process`.

Started by the adapter with exec, never fork. Three threads: one steps the engine, one reads the socket, one watches the
processes it works for. Only this side of the socket imports torch.
"""

import argparse
import importlib
import os
import queue
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from specbackend.errors import ConfigError, InvalidRequest, QueueFull
from specbackend.request import Request
from specbackend.serving.protocol import Cancel, Channel, Failed, Ready, Rejected, Start, Step, Submit

Command = Start | Submit | Cancel


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    watch(args.stub_pid, args.server_pid)
    sock = socket.socket(fileno=args.socket_fd)
    sock.set_inheritable(False)
    channel = Channel(sock)
    try:
        run(channel, args.engine)
    except ConfigError as error:
        channel.send(Failed(str(error)))
    except ConnectionError:
        pass  # the adapter is gone
    except Exception as error:  # the adapter answers the clients with it and starts a new engine
        traceback.print_exc()
        channel.send(Failed(f"{type(error).__name__}: {error}"))
    return 1


def run(channel: Channel, engine_name: str) -> None:
    """Load the engine that the first message describes and serve until it fails or the adapter is gone."""
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    threading.Thread(target=read_commands, args=(channel, commands), name="commands", daemon=True).start()
    engine = load(engine_name, commands.get())
    channel.send(describe(engine))
    while True:
        for command in take(commands, wait=not engine.has_work):
            apply(engine, command, channel)
        updates = engine.step()
        channel.send(Step(updates, asdict(engine.stats())))


def load(engine_name: str, start: Start) -> Any:
    """Import torch and all that, and load the checkpoints."""
    module, name = engine_name.split(":")
    return getattr(importlib.import_module(module), name)(**start.params)


def describe(engine: Any) -> Ready:
    model = engine.model_config
    num_draft_tokens = engine.config.speculative_num_draft_tokens or 0
    return Ready(engine.context_length, model.vocab_size, sorted(model.eos_token_ids), num_draft_tokens)


def apply(engine: Any, command: Command, channel: Channel) -> None:
    match command:
        case Submit(request_id, input_ids, params):
            try:
                engine.submit(Request(request_id, input_ids, params))
            except InvalidRequest as error:
                channel.send(Rejected(request_id, error.field, error.message))
            except QueueFull as error:
                channel.send(Rejected(request_id, None, str(error)))
        case Cancel(request_id):
            engine.cancel(request_id)


def take(commands: queue.SimpleQueue, wait: bool) -> list[Command]:
    """All commands that are there; with `wait`, at least one."""
    taken = [commands.get()] if wait else []
    with suppress(queue.Empty):
        while True:
            taken.append(commands.get_nowait())
    return taken


def read_commands(channel: Channel, commands: queue.SimpleQueue) -> None:
    """Pass on what the adapter sends; the end of the adapter is the end of this process."""
    try:
        while True:
            for command in channel.receive():
                commands.put(command)
    except (EOFError, ConnectionError):
        pass
    except Exception:  # a bug; but an engine that hears nothing helps nobody
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # from whatever the engine is doing: there is nobody left to do it for


def watch(stub_pid: int, server_pid: int) -> None:
    """Leave no process behind: if the stub or tritonserver ends, kill the stub and end.

    Triton's stub does not notice the end of its server while it is inside a send, and would stay for ever.
    """
    try:
        pidfds = [os.pidfd_open(stub_pid), os.pidfd_open(server_pid)]
    except ProcessLookupError:
        os._exit(1)
    threading.Thread(target=_end_with, args=(pidfds,), name="guard", daemon=True).start()


def _end_with(pidfds: list[int]) -> None:
    select.select(pidfds, [], [])  # a pidfd becomes readable when its process ends
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfds[0], signal.SIGKILL)
    os._exit(1)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Engine process; started by the Triton adapter.")
    parser.add_argument("--socket-fd", type=int, required=True, help="inherited socket to the adapter")
    parser.add_argument("--stub-pid", type=int, required=True, help="the adapter's process")
    parser.add_argument("--server-pid", type=int, required=True, help="the tritonserver it belongs to")
    parser.add_argument("--engine", default="specbackend.engine:serving_engine", help="module:factory")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
