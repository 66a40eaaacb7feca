"""The gateway as a program."""

import argparse
import logging
import signal
import subprocess
import sys
import threading

import uvicorn

from specbackend.errors import ConfigError
from specbackend.gateway.app import create_app
from specbackend.gateway.settings import GatewaySettings, add_flags
from specbackend.serving.tritonserver import TritonServer

GRACE_S = 10  # for open requests, once it is told to end

log = logging.getLogger("uvicorn.error")


def make_server(settings: GatewaySettings) -> uvicorn.Server:
    """Raises ConfigError, see `create_app`."""
    config = uvicorn.Config(
        create_app(settings),
        settings.host,
        settings.port,
        timeout_graceful_shutdown=GRACE_S,
        log_level="info",
    )
    return uvicorn.Server(config)


def serve_beside(triton: TritonServer, settings: GatewaySettings) -> int:
    """Start a tritonserver and serve it until either ends, or a signal comes: then both end, and all they started.

    For the main thread. Returns the exit code. Raises ConfigError and TritonServerError.
    """
    server = make_server(settings)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn hands the signal on when it has ended
    try:
        with triton:
            watch = threading.Thread(target=_end_with, args=(triton.process, server), daemon=True)
            watch.start()
            server.run()
            return 0 if server.started and triton.process.poll() is None else 1
    except KeyboardInterrupt:
        return 0


def _end_with(process: subprocess.Popen, server: uvicorn.Server) -> None:
    code = process.wait()
    if not server.should_exit:
        log.error("tritonserver has ended with code %d", code)
    server.should_exit = True


def from_command_line(parser: argparse.ArgumentParser, names: tuple[str, ...] | None = None) -> uvicorn.Server:
    """With a flag for each setting, or for those that are named. What will not do ends the program with a message."""
    add_flags(parser, names)
    try:
        return make_server(GatewaySettings.from_args(vars(parser.parse_args())))
    except ConfigError as error:
        parser.error(str(error))


def run(server: uvicorn.Server) -> int:
    """Until it is told to end. Returns the exit code."""
    server.run()
    return 0 if server.started else 1


def main() -> int:
    description = "Serve a running tritonserver's model in OpenAI's and SGLang's words."
    return run(from_command_line(argparse.ArgumentParser(description=description)))


if __name__ == "__main__":
    sys.exit(main())
