"""The gateway as a program."""

import argparse
import sys

import uvicorn

from specbackend.errors import ConfigError
from specbackend.gateway.app import create_app
from specbackend.gateway.settings import GatewaySettings, add_flags

GRACE_S = 10  # for open requests, once it is told to end


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


def main() -> int:
    parser = argparse.ArgumentParser(description="Serve a running tritonserver's model in OpenAI's and SGLang's words.")
    add_flags(parser)
    try:
        server = make_server(GatewaySettings.from_args(vars(parser.parse_args())))
    except ConfigError as error:
        parser.error(str(error))
    server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
