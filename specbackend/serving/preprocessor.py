"""The preprocessing model: text to token ids, with the chat template. Stateless; every request is answered at once."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from specbackend.errors import ConfigError, InvalidRequest
from specbackend.models.model_config import read_max_positions
from specbackend.serving.adapter import TRITON_PARAMETERS, base_path, is_set, read_flag, read_parameters
from specbackend.serving.calls import encode_prompt, only_value, tensor_values
from specbackend.serving.triton_io import log_bug, returns_code, triton_error
from specbackend.tokenizer import ChatTemplateError, Tokenizer

PARAMETERS = ("model_path", "apply_chat_template", "context_length")  # the last two, if unset: as the checkpoint has it


class Preprocessor:
    """Raises ConfigError if it cannot load."""

    def __init__(self, pb_utils: Any, args: Mapping[str, str]):
        self._pb = pb_utils
        params = read_parameters(args)
        if unknown := sorted(set(params) - {*PARAMETERS, *TRITON_PARAMETERS}):
            raise ConfigError(f"unknown parameter {', '.join(unknown)}; known: {', '.join(PARAMETERS)}")
        if not is_set(params, "model_path"):
            raise ConfigError("model_path: is required")
        path = base_path(args) / str(params["model_path"])
        self._tokenizer = Tokenizer(path)
        self._context_length = _context_length(params, path)
        self._chat = read_flag(params, "apply_chat_template", self._tokenizer.has_chat_template)
        if self._chat:
            self._check_template(path)

    def execute(self, requests: Iterable[Any]) -> list:
        return [self._respond(request) for request in requests]

    def _check_template(self, path: Path) -> None:
        try:
            self._tokenizer.check_chat_template()
        except ConfigError as error:
            raise ConfigError(f"apply_chat_template: {path}: {error}; mend it, or set it to false") from error

    def _respond(self, request: Any) -> Any:
        try:
            inputs = {tensor.name(): _value(tensor) for tensor in request.inputs()}
            tensor = self._pb.Tensor("input_ids", np.array([self._encode(inputs)], np.int32))
            return self._pb.InferenceResponse(output_tensors=[tensor])
        except InvalidRequest as error:
            return self._failure(request, error)
        except Exception as error:  # a bug, ours or the template's; the others of the batch go on
            log_bug(error)
            return self._failure(request, error)

    def _failure(self, request: Any, error: Exception) -> Any:
        told = triton_error(self._pb, error, returns_code(request))
        return self._pb.InferenceResponse(output_tensors=[], error=told)

    def _encode(self, inputs: Mapping[str, Any]) -> list[int]:
        chat = inputs.get("apply_chat_template", self._chat)
        try:
            return encode_prompt(self._tokenizer, inputs.get("text_input"), self._context_length, chat)
        except ConfigError as error:  # the request wants a template that does not exist, or is broken
            raise InvalidRequest("apply_chat_template", str(error)) from error
        except ChatTemplateError as error:
            raise InvalidRequest("text_input", str(error)) from error


def _value(tensor: Any) -> Any:
    return only_value(tensor.name(), list(tensor_values(tensor.name(), tensor.as_numpy())))


def _context_length(params: Mapping[str, object], path: Path) -> int:
    """The parameter, or how many tokens the checkpoint was made for."""
    value = params["context_length"] if is_set(params, "context_length") else read_max_positions(path)
    if not str(value).strip().isdecimal() or int(str(value)) == 0:
        raise ConfigError(f"context_length: must be a positive integer, got {value!r}")
    return int(str(value))
