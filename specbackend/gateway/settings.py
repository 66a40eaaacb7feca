"""What the gateway is started with. Each field is a flag of the command line."""

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from specbackend.errors import ConfigError


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class GatewaySettings:
    """Where the gateway listens, what it stands in front of, and what it lets through.

    Raises ConfigError for a key that would be nobody's or everybody's, and for limits that let nothing through.
    """

    tokenizer: str = field(metadata={"help": "folder of the checkpoint, for its tokenizer and chat template"})
    host: str = _option("127.0.0.1", "address to listen at")
    port: int = _option(9000, "port to listen at")
    grpc_url: str = _option("localhost:8001", "tritonserver's gRPC")
    metrics_url: str = _option("localhost:8002", "tritonserver's metrics")
    model: str = _option("llm", "Triton's name of the model")
    served_model_name: str | None = _option(None, "what clients call the model; as Triton if absent")
    chat_template: str | None = _option(None, "a file that takes the place of the checkpoint's chat template")
    tool_call_parser: str | None = _option(None, "how the model writes calls of tools: hermes, qwen25, llama3, mistral")
    reasoning_parser: str | None = _option(None, "how the model marks what it thinks: deepseek-r1, qwen3, mimo")
    api_key: tuple[str, ...] = _option((), "a key that clients have to bring; give it again for more of them")
    cors_allow_origin: tuple[str, ...] = _option((), "a web page's origin that may ask, or *; give it again for more")
    max_body_size: int = _option(4 << 20, "bytes of the largest request")
    max_open_requests: int | None = _option(None, "more at a time are answered with 429; no limit if absent")

    def __post_init__(self) -> None:
        if any(not key or key != key.strip() for key in self.api_key):
            raise ConfigError("api_key: must not be empty or have spaces around it")
        for name in ("max_body_size", "max_open_requests"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: must be at least 1, got {value}")

    @property
    def model_name(self) -> str:
        """As clients know it."""
        return self.served_model_name or self.model

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> "GatewaySettings":
        """Of parsed flags; those that are absent or None have their defaults. Raises ConfigError."""
        given = {each.name: args[each.name] for each in fields(cls) if args.get(each.name) is not None}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def add_flags(parser: argparse._ActionsContainer, names: tuple[str, ...] | None = None) -> None:
    """A flag for each field, or for those that are named."""
    for each in fields(GatewaySettings):
        if names is None or each.name in names:
            parser.add_argument("--" + each.name.replace("_", "-"), **_flag_options(each))


def _flag_options(each: Field) -> dict[str, Any]:
    default = None if each.default in (MISSING, None, ()) else each.default
    return {
        "help": each.metadata["help"] + (f"; default: {default}" if default is not None else ""),
        "required": each.default is MISSING,
        "metavar": "VALUE",
        "type": int if each.type in (int, int | None) else str,
        **({"action": "append"} if each.default == () else {}),
    }
