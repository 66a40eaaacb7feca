"""The preprocessing model: text to token ids, with the chat template. Stateless; every request is answered at once."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from specbackend.errors import ConfigError, InvalidRequest
from specbackend.serving.adapter import TRITON_PARAMETERS, base_path, is_true, read_parameters
from specbackend.serving.calls import encode_prompt, tensor_values
from specbackend.serving.triton_io import triton_error
from specbackend.tokenizer import Tokenizer

PARAMETERS = ("model_path", "apply_chat_template", "context_length")  # the last two: true, and the checkpoint's


class Preprocessor:
    """Raises ConfigError if it cannot load."""

    def __init__(self, pb_utils: Any, args: Mapping[str, str]):
        self._pb = pb_utils
        params = read_parameters(args)
        if unknown := sorted(set(params) - {*PARAMETERS, *TRITON_PARAMETERS}):
            raise ConfigError(f"unknown parameter {', '.join(unknown)}; known: {', '.join(PARAMETERS)}")
        path = base_path(args) / str(params.get("model_path", ""))
        self._tokenizer = Tokenizer(path)
        self._chat = is_true(params.get("apply_chat_template", "true"))
        self._context_length = int(params.get("context_length") or _max_positions(path))
        if self._chat and not self._tokenizer.has_chat_template:
            raise ConfigError(f"apply_chat_template: the tokenizer in {path} has no chat template; set it to false")

    def execute(self, requests: Iterable[Any]) -> list:
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            inputs = {tensor.name(): _only_value(tensor) for tensor in request.inputs()}
            input_ids = self._encode(inputs)
        except InvalidRequest as error:
            return self._pb.InferenceResponse(output_tensors=[], error=triton_error(self._pb, error))
        tensor = self._pb.Tensor("input_ids", np.array([input_ids], np.int32))
        return self._pb.InferenceResponse(output_tensors=[tensor])

    def _encode(self, inputs: Mapping[str, Any]) -> list[int]:
        chat = inputs.get("apply_chat_template", self._chat)
        if chat and not self._tokenizer.has_chat_template:
            raise InvalidRequest("apply_chat_template", "the tokenizer has no chat template")
        return encode_prompt(self._tokenizer, inputs.get("text_input"), self._context_length, chat)


def _only_value(tensor: Any) -> Any:
    values = list(tensor_values(tensor.name(), tensor.as_numpy()))
    if len(values) != 1:
        raise InvalidRequest(tensor.name(), f"must have one element, got {len(values)}")
    return values[0]


def _max_positions(path: Path) -> int:
    """How many tokens the checkpoint was made for."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return config.get("text_config", config)["max_position_embeddings"]
