"""The process of a rank that does not lead: `python -m specbackend.follow`, started by `followers`.

Its engine makes the calls that the leader's engine is called with. Two threads: one does this, one watches the leader.
"""

import argparse
import os
import select
import shutil
import sys
import threading
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from specbackend.engine import Engine
from specbackend.errors import ConfigError, InvalidRequest, QueueFull, RankError
from specbackend.followers import Call, tokens_of
from specbackend.ranks import Seat


def main() -> int:
    args = _parse()
    guard = threading.Thread(target=_end_with_leader, args=(args.socket_fd, args.meeting.parent), daemon=True)
    guard.start()
    connection = Connection(args.socket_fd)
    try:
        params = connection.recv()
        connection.send("here")
        follow(Engine(seat=Seat(args.rank, args.meeting), **params), connection)
    except (EOFError, ConnectionError):
        guard.join()  # the leader is gone
    except Exception as error:
        if not isinstance(error, ConfigError):  # which the leader meets, too
            traceback.print_exc()
        with suppress(OSError):
            connection.send(f"{type(error).__name__}: {error}")
        guard.join(timeout=5)  # a collective may notice first that the leader is gone
    return 1


def follow(engine: Engine, connection: Connection) -> None:
    """Do what the leader does, for ever. Raises RankError if it did something else."""
    tokens = []
    while True:
        call: Call = connection.recv()
        if call.last_tokens != tokens:
            raise RankError(f"a step gave {tokens}, on rank 0 {call.last_tokens}")
        with suppress(InvalidRequest, QueueFull):  # as on the leader, which has told its caller
            result = getattr(engine, call.method)(*call.arguments)
        if call.method == "step":
            tokens = tokens_of(result)


def _end_with_leader(socket_fd: int, folder: Path) -> None:
    """From whatever the engine is doing: a collective that the leader has left may last for ever."""
    poll = select.poll()
    poll.register(socket_fd, select.POLLRDHUP)
    poll.poll()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A rank of an engine with tp_size > 1; started by rank 0.")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--meeting", type=Path, required=True, help="the file at which the ranks find each other")
    parser.add_argument("--socket-fd", type=int, required=True, help="inherited socket to rank 0")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
