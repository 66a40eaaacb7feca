"""The models llm and vllm_model inside Triton's stub process: load, execute, finalize.

Thin: the engine is a process of its own.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from specbackend.config import EngineConfig
from specbackend.errors import ConfigError, InvalidRequest
from specbackend.radix.process import own_socket
from specbackend.serving.calls import Call, CallReader, CancelCall
from specbackend.serving.faces import LLM, Face
from specbackend.serving.generation import Server
from specbackend.serving.metrics import Metrics
from specbackend.serving.responder import Arrival, Responder
from specbackend.serving.supervisor import ENGINE_COMMAND, EngineSupervisor
from specbackend.serving.triton_io import Sender, log_bug
from specbackend.tokenizer import Tokenizer

# Parameters that Triton's Python backend reads itself, and ours that are not the engine's.
TRITON_PARAMETERS = ("EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS", "TRITON_ENABLE_GPU", "REPORT_CUSTOM_METRICS")


class Adapter:
    """One instance of a model that has this face. Raises ConfigError or EngineError if it cannot load."""

    def __init__(
        self,
        pb_utils: Any,
        args: Mapping[str, str],
        engine_command: Sequence[str] = ENGINE_COMMAND,
        face: Face = LLM,
    ):
        self._pb = pb_utils
        self._face = face
        params = read_parameters(args)
        labels = {"model": args["model_name"], "version": args["model_version"]}
        metrics = Metrics(pb_utils, labels) if read_flag(params, "REPORT_CUSTOM_METRICS", False) else None
        config = EngineConfig.from_params({k: v for k, v in params.items() if k not in TRITON_PARAMETERS})
        config = config.resolve_paths(base_path(args))
        if config.enable_hierarchical_cache and config.radix_cache_socket is None:
            config = replace(config, radix_cache_socket=str(own_socket(os.getppid())))  # the stub is its server's child
        tokenizer = Tokenizer(config.model_path)
        engine_config = replace(config, stream_interval=EngineConfig.stream_interval)  # ours alone: not another engine
        supervisor = EngineSupervisor(engine_config.to_params(), config.watchdog_timeout, engine_command)
        limits = supervisor.start()
        self._reader = CallReader(tokenizer, limits, face)
        server = Server(tokenizer.decode, config.stream_interval, face)
        self._responder = Responder(supervisor, server, config.max_queued_requests, metrics, limits.stats)

    def execute(self, requests: Iterable[Any]) -> None:
        """Read the requests and hand them to the response thread, errors too. Does not wait for any answer."""
        for request in requests:
            sender = Sender(self._pb, request, self._face)
            self._responder.put(Arrival(sender, self._read(request)))

    def finalize(self) -> None:
        """Triton calls this after the last request is answered."""
        self._responder.close()

    def _read(self, request: Any) -> Call | CancelCall | Exception:
        try:
            return self._reader.read(request)
        except InvalidRequest as error:
            return error
        except Exception as error:  # a bug; the client hears of it, and the other requests of this batch are served
            log_bug(error)
            return error


def read_parameters(args: Mapping[str, str]) -> dict[str, object]:
    """config.pbtxt's parameters, overridden by <version>/model.json if there is one, as the vLLM backend has it."""
    config = json.loads(args["model_config"])
    params = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
    path = Path(args["model_repository"]) / args["model_version"] / "model.json"
    if path.exists():
        try:
            params |= json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}: is not a JSON object: {error}") from error
    return params


def base_path(args: Mapping[str, str]) -> Path:
    """What relative checkpoint paths are relative to: the folder that holds the model repository."""
    return Path(args["model_repository"]).resolve().parent.parent


def is_set(params: Mapping[str, object], name: str) -> bool:
    """Whether a parameter has a value: an empty one and `none` mean the default, as for the engine's parameters."""
    return str(params.get(name, "")).strip().lower() not in ("", "none")


def read_flag(params: Mapping[str, object], name: str, default: bool) -> bool:
    """Raises ConfigError for a word that is neither."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    value = params[name] if is_set(params, name) else default
    try:
        return words[str(value).strip().lower()]
    except KeyError:
        raise ConfigError(f"{name}: must be true or false, got {value!r}") from None
