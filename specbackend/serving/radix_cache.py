"""The radix_cache model: a window onto the prefix caches, of the sidecar and of the engines beside it.

It is the sidecar's keeper where nobody else started one. What that cannot do is an answer, and never a reason not to
load: tritonserver would serve no model then.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from specbackend.errors import ConfigError, InvalidRequest
from specbackend.models.model_config import read_max_positions
from specbackend.radix.client import RadixClient, ask
from specbackend.radix.keys import Layout
from specbackend.radix.process import SidecarProcess, make_private, own_socket
from specbackend.radix.protocol import Audit, Flush, GetStats
from specbackend.radix.server import parse_size
from specbackend.serving.adapter import TRITON_PARAMETERS, base_path, is_set, read_flag, read_parameters
from specbackend.serving.calls import encode_prompt, only_value, tensor_values
from specbackend.serving.engine_socket import ask_engines
from specbackend.serving.errors import Unavailable
from specbackend.serving.protocol import CacheTree, FlushCache
from specbackend.serving.radix_metrics import RadixMetrics
from specbackend.serving.triton_io import log_bug, triton_error
from specbackend.tokenizer import Tokenizer

OWN_SIDECAR = ("size", "snapshot", "valkey")  # options of a sidecar that is started here
PARAMETERS = ("socket", *OWN_SIDECAR, "warm_up_prompts", "warm_up_model")
PATHS = ("socket", "snapshot", "warm_up_prompts")
READY_S = 10.0  # for the sidecar to answer; the model is ready without it then
LOOKUP_S = 2.0
TREE_NODES = 500  # of each engine's tree

log = logging.getLogger(__name__)


class RadixCache:
    """Raises ConfigError for parameters that make no sense."""

    def __init__(self, pb_utils: Any, args: Mapping[str, str]):
        self._pb = pb_utils
        self._server_pid = os.getppid()  # the stub is tritonserver's child
        params = read_parameters(args)
        options = _options(params, base_path(args))
        self._prompts = options.get("warm_up_prompts")
        self._warm_up_model = options.get("warm_up_model", "llm")
        self._sidecar = None
        if "socket" in options:
            self._path = Path(options["socket"])
        else:
            self._path = own_socket(self._server_pid)
            self._sidecar = _start(self._path, [w for n in OWN_SIDECAR if n in options for w in (f"--{n}", options[n])])
        labels = {"model": args["model_name"], "version": args["model_version"]}
        publishes = read_flag(params, "REPORT_CUSTOM_METRICS", False)
        self._metrics = RadixMetrics(pb_utils, labels, self._stats) if publishes else None

    def execute(self, requests: Iterable[Any]) -> list:
        return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        if self._metrics:
            self._metrics.close()
        if self._sidecar:
            self._sidecar.close()

    def _respond(self, request: Any) -> Any:
        try:
            inputs = {t.name(): list(tensor_values(t.name(), t.as_numpy())) for t in request.inputs()}
            result = json.dumps(self._do(inputs)).encode()
            tensor = self._pb.Tensor("result", np.array([[result]], np.object_))
            return self._pb.InferenceResponse(output_tensors=[tensor])
        except (InvalidRequest, ConfigError) as error:
            return self._failure(error)
        except ConnectionError as error:
            return self._failure(Unavailable(str(error)))
        except Exception as error:  # a bug
            log_bug(error)
            return self._failure(error)

    def _failure(self, error: Exception) -> Any:
        return self._pb.InferenceResponse(output_tensors=[], error=triton_error(self._pb, error))

    def _do(self, inputs: Mapping[str, list]) -> dict:
        actions = {
            "stats": lambda: self._with_engines(CacheTree(0), self._readable_stats),
            "engines": lambda: self._engines(0),  # which costs an engine nothing
            "tree": lambda: self._engines(TREE_NODES),
            "audit": lambda: ask(self._path, Audit()),
            "flush": lambda: self._with_engines(FlushCache(), lambda: ask(self._path, Flush())),
            "lookup": lambda: {"models": [self._lookup(layout, inputs) for layout in self._layouts()]},
            "warm_up": self._warm_up,
        }
        action = only_value("action", inputs.get("action", ["stats"]))
        if action not in actions:
            raise InvalidRequest("action", f"must be one of {', '.join(actions)}, got {action!r}")
        return actions[action]()

    def _engines(self, limit: int) -> dict:
        """What the engines are, each with so many nodes of its tree at most."""
        return {"engines": ask_engines(self._server_pid, CacheTree(limit))}

    def _with_engines(self, question: CacheTree | FlushCache, ask_sidecar: Callable[[], dict]) -> dict:
        """What the sidecar says, or why it does not, and each engine. Raises ConnectionError if there is neither.

        Engines are asked first: what they flush goes to the sidecar.
        """
        engines = ask_engines(self._server_pid, question)
        try:
            return {**ask_sidecar(), "engines": engines}
        except ConnectionError as error:
            if not engines:
                raise
            return {"error": str(error), "engines": engines}

    def _readable_stats(self) -> dict:
        return {**self._stats(), "layouts": [_describe(layout) for layout in self._layouts()]}

    def _stats(self) -> dict:
        return ask(self._path, GetStats())

    def _layouts(self) -> list[Layout]:
        """Of all models that have been at the sidecar."""
        return [Layout(*values) for values in self._stats()["layouts"]]

    def _lookup(self, layout: Layout, inputs: Mapping[str, list]) -> dict:
        ids = inputs.get("input_ids") or _encode(layout.model_path, inputs.get("text_input", [""]))
        client = RadixClient(self._path, layout, LOOKUP_S)
        cached = client.cached_tokens(ids, only_value("cache_salt", inputs.get("cache_salt", [None])))
        client.close()
        return {"model_path": layout.model_path, "prompt_tokens": len(ids), "cached_tokens": cached}

    def _warm_up(self) -> dict:
        """Ask the engine for one token behind each prompt, which leaves the prompt's blocks in the sidecar."""
        if self._prompts is None:
            raise InvalidRequest("action", "warm_up needs the server's parameter warm_up_prompts")
        outcomes = [self._ask_model(text) for text in _read_prompts(Path(self._prompts))]
        failures = [outcome for outcome in outcomes if outcome]
        return {"prompts": len(outcomes), "failed": len(failures), "first_failure": next(iter(failures), None)}

    def _ask_model(self, text: str) -> str | None:
        """Returns what went wrong, if something did."""
        inputs = [
            self._pb.Tensor("text_input", np.array([[text.encode()]], np.object_)),
            self._pb.Tensor("max_tokens", np.array([[1]], np.int32)),
        ]
        request = self._pb.InferenceRequest(
            model_name=self._warm_up_model, requested_output_names=["text_output"], inputs=inputs
        )
        errors = [response.error().message() for response in request.exec(decoupled=True) if response.has_error()]
        return errors[0] if errors else None


def _options(params: Mapping[str, object], base: Path) -> dict[str, str]:
    """The parameters that are set, paths made absolute. Raises ConfigError."""
    if unknown := sorted(set(params) - {*PARAMETERS, *TRITON_PARAMETERS}):
        raise ConfigError(f"unknown parameter {', '.join(unknown)}; known: {', '.join(PARAMETERS)}")
    options = {name: str(params[name]).strip() for name in PARAMETERS if is_set(params, name)}
    if "socket" in options and (useless := [name for name in OWN_SIDECAR if name in options]):
        raise ConfigError(f"{useless[0]}: is the sidecar's own, which serves at socket already; unset one of the two")
    if "size" in options:
        try:
            parse_size(options["size"])
        except ValueError as error:
            raise ConfigError(f"size: {error}") from error
    return {name: str(base / value) if name in PATHS else value for name, value in options.items()}


def _start(path: Path, options: list[str]) -> SidecarProcess | None:
    try:
        make_private(path.parent)
    except OSError as error:
        log.error("no radix sidecar: %s", error)
        return None
    sidecar = SidecarProcess(path, options)
    if not sidecar.wait_ready(READY_S):
        log.error("the radix sidecar does not answer; engines do without it until it does")
    return sidecar


def _describe(layout: Layout) -> dict:
    return {
        "model_path": layout.model_path,
        "fingerprint": layout.fingerprint.hex(),
        "bytes_per_token": layout.bytes_per_token,
        "block_tokens": layout.block_tokens,
    }


def _encode(model_path: str, texts: list[str]) -> list[int]:
    text = only_value("text_input", texts)
    return encode_prompt(_tokenizer(model_path), text, read_max_positions(Path(model_path)))


@lru_cache(maxsize=4)
def _tokenizer(model_path: str) -> Tokenizer:
    return Tokenizer(model_path)


def _read_prompts(path: Path) -> list[str]:
    """Of JSON lines with `prompt`, `question` or `turns`. Raises InvalidRequest."""
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [entry.get("prompt") or entry.get("question") or entry["turns"][0] for entry in entries]
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise InvalidRequest("action", f"warm_up_prompts cannot be read: {type(error).__name__}: {error}") from error
