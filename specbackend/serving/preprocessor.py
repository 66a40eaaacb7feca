"""The preprocessing model: text to token ids, with the chat template. Stateless; every request is answered at once."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from specbackend.errors import ConfigError, InvalidRequest
from specbackend.models.model_config import read_max_positions
from specbackend.serving.adapter import TRITON_PARAMETERS, base_path, is_true, read_parameters
from specbackend.serving.calls import encode_prompt, only_value, tensor_values
from specbackend.serving.triton_io import triton_error
from specbackend.tokenizer import Tokenizer

PARAMETERS = ("model_path", "apply_chat_template", "context_length")  # the last two: as the checkpoint has it


class Preprocessor:
    """Raises ConfigError if it cannot load."""

    def __init__(self, pb_utils: Any, args: Mapping[str, str]):
        self._pb = pb_utils
        params = read_parameters(args)
        if unknown := sorted(set(params) - {*PARAMETERS, *TRITON_PARAMETERS}):
            raise ConfigError(f"unknown parameter {', '.join(unknown)}; known: {', '.join(PARAMETERS)}")
        path = base_path(args) / str(params.get("model_path", ""))
        self._tokenizer = Tokenizer(path)
        self._chat = is_true(params.get("apply_chat_template", self._tokenizer.has_chat_template))
        self._context_length = _context_length(params, path)
        if self._chat and not self._tokenizer.has_chat_template:
            raise ConfigError(f"apply_chat_template: the tokenizer in {path} has no chat template; set it to false")

    def execute(self, requests: Iterable[Any]) -> list:
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            inputs = {tensor.name(): _value(tensor) for tensor in request.inputs()}
            input_ids = self._encode(inputs)
        except Exception as error:  # of this request, perhaps from its template: the others of the batch go on
            return self._pb.InferenceResponse(output_tensors=[], error=triton_error(self._pb, error))
        tensor = self._pb.Tensor("input_ids", np.array([input_ids], np.int32))
        return self._pb.InferenceResponse(output_tensors=[tensor])

    def _encode(self, inputs: Mapping[str, Any]) -> list[int]:
        chat = inputs.get("apply_chat_template", self._chat)
        if chat and not self._tokenizer.has_chat_template:
            raise InvalidRequest("apply_chat_template", "the tokenizer has no chat template")
        try:
            return encode_prompt(self._tokenizer, inputs.get("text_input"), self._context_length, chat)
        except ValueError as error:
            if isinstance(error, InvalidRequest):
                raise
            raise InvalidRequest("text_input", str(error)) from error


def _value(tensor: Any) -> Any:
    return only_value(tensor.name(), list(tensor_values(tensor.name(), tensor.as_numpy())))


def _context_length(params: Mapping[str, object], path: Path) -> int:
    """The parameter, or how many tokens the checkpoint was made for."""
    given = params.get("context_length") or read_max_positions(path)
    try:
        return int(str(given))
    except ValueError:
        raise ConfigError(f"context_length: {given!r} is not a number") from None
