"""The models of a tritonserver, asked over gRPC without a thread."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from specbackend.gateway.errors import ApiError, of_text, of_triton
from specbackend.serving.client import output_values

RADIX_CACHE = "radix_cache"
WITH_CODES = {"return_error_code": True}  # of errors
READY_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 10.0  # of all but generating; the model radix_cache waits for engines in the middle of a step
STREAM_ENDED = "the server ended the stream before the answer was complete"


@dataclass(frozen=True)
class Question:
    """One prompt for llm.

    parameters: llm's inputs and request parameters by name; sampling: of vLLM's or SGLang's names, which go as one
    JSON text. names: what the client calls those names, where that differs.
    """

    input_ids: list[int]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    request_id: str = ""


class TritonServer:
    """For one event loop. Raises ApiError."""

    def __init__(self, url: str, model: str):
        self.model = model
        self._client = triton.InferenceServerClient(url)

    async def close(self) -> None:
        await self._client.close()

    async def is_ready(self) -> bool:
        """A server that does not say so in time is not."""
        wait = {"client_timeout": READY_TIMEOUT_S}
        try:
            return await self._client.is_server_ready(**wait) and await self._client.is_model_ready(self.model, **wait)
        except InferenceServerException:
            return False

    async def parameters(self) -> dict[str, str]:
        """Those of the model's config.pbtxt."""
        try:
            config = await self._client.get_model_config(self.model, as_json=True, client_timeout=ANSWER_TIMEOUT_S)
        except InferenceServerException as error:
            raise _of_exception(error) from None
        return {name: value["string_value"] for name, value in config["config"].get("parameters", {}).items()}

    async def generate(self, question: Question) -> AsyncIterator[dict[str, Any]]:
        """The outputs of each response. Whoever stops before the last one cancels the request."""
        parameters = {**question.parameters, **WITH_CODES}
        if question.sampling:
            parameters["sampling_parameters"] = json.dumps(question.sampling)
        request = {
            "model_name": self.model,
            "inputs": [_tensor("input_ids", "INT32", question.input_ids)],
            "parameters": parameters,
            "request_id": question.request_id,
        }
        async with aclosing(self._responses(request, question.names)) as responses:
            async for outputs in responses:
                yield outputs

    async def abort(self, request_id: str) -> None:
        """End the running requests that have this id."""
        request = {
            "model_name": self.model,
            "inputs": [_tensor("stop", "BOOL", [True])],
            "parameters": WITH_CODES,
            "request_id": request_id,
        }
        async for _ in self._responses(request, {}, ANSWER_TIMEOUT_S):
            pass

    async def radix_cache(self, action: str) -> dict:
        """What the model radix_cache says to an action."""
        inputs = [_tensor("action", "BYTES", [action.encode()])]
        try:
            result = await self._client.infer(RADIX_CACHE, inputs, client_timeout=ANSWER_TIMEOUT_S)
        except InferenceServerException as error:
            raise _of_exception(error) from None
        return json.loads(output_values(result)["result"])

    async def _responses(
        self, request: dict[str, Any], names: Mapping[str, str], timeout_s: float | None = None
    ) -> AsyncIterator[dict[str, Any]]:
        final = False
        responses = self._client.stream_infer(_once(request), stream_timeout=timeout_s)
        try:
            async for result, error in responses:
                if error is not None:
                    raise of_text(error.message(), names)
                yield output_values(result)
                final = result.get_response().parameters["triton_final_response"].bool_param
        except grpc.aio.AioRpcError as error:
            raise _failure(error.code(), error.details() or "", names) from None
        finally:
            responses.cancel()
        if not final:
            raise ApiError(503, STREAM_ENDED)


def _tensor(name: str, dtype: str, values: list) -> triton.InferInput:
    tensor = triton.InferInput(name, [1, len(values)], dtype)
    tensor.set_data_from_numpy(np.array([values], triton_to_np_dtype(dtype)))
    return tensor


async def _once(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield request


def _of_exception(error: InferenceServerException) -> ApiError:
    code = None
    with suppress(AttributeError, KeyError):
        code = grpc.StatusCode[error.status().removeprefix("StatusCode.")]
    return _failure(code, error.message(), {})


def _failure(code: grpc.StatusCode | None, details: str, names: Mapping[str, str]) -> ApiError:
    """The only deadlines are our own."""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ApiError(504, f"tritonserver has not answered within {ANSWER_TIMEOUT_S:g} s")
    return of_triton(code, details, names)
