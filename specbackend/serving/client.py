"""Small clients for tools and tests: gRPC streaming, HTTP generate_stream and generate. One connection per call.

`ask_all` is for many requests: all of them go through one stream.
"""

import http.client
import json
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc as grpc_client

from specbackend.serving.faces import LLM, VLLM
from specbackend.serving.schemas import APPLY_CHAT_TEMPLATE, Input

FACES = {"vllm_model": VLLM}  # of the others: LLM
NUMPY_TYPES = {"STRING": np.object_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_}
RESPONSE_TIMEOUT_S = 120.0


@dataclass
class Answer:
    """What a client got."""

    texts: dict[int, str] = field(default_factory=lambda: {0: ""})  # by sequence_index
    responses: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    cancelled: bool = False  # by ourselves
    started: float = field(default_factory=time.monotonic)  # when it was asked
    times: list[float] = field(default_factory=list)  # of the responses, on the same clock

    def add(self, outputs: dict[str, Any], at: float) -> None:
        self.responses.append(outputs)
        self.times.append(at)
        texts = _listed(outputs.get("text_output", ""))
        indices = _listed(outputs.get("sequence_index", list(range(len(texts)))))
        for index, text in zip(indices, texts, strict=True):
            self.texts[index] = self.texts.get(index, "") + text

    @property
    def text(self) -> str:
        """Of the only answer, or the first."""
        return self.texts[0]


Client = Callable[..., Answer]


def stream_grpc(
    url: str, model: str, inputs: Mapping[str, Any], request_id: str = "", cancel_after: int | None = None, **options
) -> Answer:
    """Ask over ModelStreamInfer. Inputs are Python values by name; `cancel_after` so many responses we leave.

    options: of tritonclient's async_stream_infer, e.g. parameters, timeout, outputs.
    """
    answer, results = Answer(), queue.SimpleQueue()
    with closing(grpc_client.InferenceServerClient(url)) as client:
        client.start_stream(callback=lambda result, error: results.put((result, error, time.monotonic())))
        client.async_stream_infer(model, _tensors(model, inputs), request_id=request_id, **options)
        final = False
        while not final:
            if len(answer.responses) == cancel_after:
                answer.cancelled = True
                break
            result, error, at = results.get(timeout=RESPONSE_TIMEOUT_S)
            if error is not None:
                answer.error = error.message()
                break
            answer.add(output_values(result), at)
            final = result.get_response().parameters["triton_final_response"].bool_param
        client.stop_stream(cancel_requests=answer.cancelled)
    return answer


@dataclass(frozen=True)
class Question:
    """One request of many: tensors, and parameters of the request."""

    inputs: Mapping[str, Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)


class RequestFailed(Exception):
    """The server answered one of many requests with an error."""


def ask_all(
    url: str, model: str, questions: Iterable[Question], in_flight: int = 64, outputs: Iterable[str] = ()
) -> list[Answer]:
    """Ask over one stream, up to `in_flight` requests at a time. The answers are in the questions' order.

    outputs: names of those to request; none requests what the inputs ask for. Raises RequestFailed for the first error.
    """
    answers, results, num_open = [], queue.SimpleQueue(), 0
    requested = [grpc_client.InferRequestedOutput(name) for name in outputs] or None

    def take() -> bool:
        """The next response; whether it was the last to its request."""
        result, error, at = results.get(timeout=RESPONSE_TIMEOUT_S)
        if error is not None:
            raise RequestFailed(error.message())
        response = result.get_response()
        answers[int(response.id)].add(output_values(result), at)
        return response.parameters["triton_final_response"].bool_param

    with closing(grpc_client.InferenceServerClient(url)) as client:
        client.start_stream(callback=lambda result, error: results.put((result, error, time.monotonic())))
        try:
            for question in questions:
                while num_open >= in_flight:
                    num_open -= take()
                client.async_stream_infer(
                    model,
                    _tensors(model, question.inputs),
                    request_id=str(len(answers)),
                    outputs=requested,
                    parameters=question.parameters,
                )
                answers.append(Answer())
                num_open += 1
            while num_open:
                num_open -= take()
        finally:
            client.stop_stream(cancel_requests=bool(num_open))
    return answers


def stream_http(
    url: str, model: str, inputs: Mapping[str, Any], request_id: str = "", cancel_after: int | None = None
) -> Answer:
    """Ask over generate_stream. `cancel_after` so many responses we close the connection."""
    body = {**inputs, **({"id": request_id} if request_id else {})}
    answer = Answer()
    with closing(http.client.HTTPConnection(url, timeout=RESPONSE_TIMEOUT_S)) as connection:
        connection.request("POST", f"/v2/models/{model}/generate_stream", json.dumps(body))
        response = connection.getresponse()
        for event in _events(response):
            if "error" in event:
                answer.error = event["error"]
                break
            answer.add(event, time.monotonic())
            if len(answer.responses) == cancel_after:
                answer.cancelled = True
                break
        response.close()  # the connection would stay open for the rest of the stream
    return answer


def generate_http(url: str, model: str, inputs: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Ask over generate, which has one response. Returns the HTTP status and the body."""
    with closing(http.client.HTTPConnection(url, timeout=RESPONSE_TIMEOUT_S)) as connection:
        connection.request("POST", f"/v2/models/{model}/generate", json.dumps(inputs))
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def read_metrics(url: str, timeout_s: float = RESPONSE_TIMEOUT_S) -> dict[str, float]:
    """Triton's metrics by their name with labels, as printed."""
    lines = metrics_text(url, timeout_s).splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def metrics_text(url: str, timeout_s: float = RESPONSE_TIMEOUT_S) -> str:
    """What Triton's metrics port says, in Prometheus' format."""
    with closing(http.client.HTTPConnection(url, timeout=timeout_s)) as connection:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Server-sent events; an error before the stream begins is a plain JSON body."""
    for line in iter(response.readline, b""):
        text = line.decode().removeprefix("data: ").strip()
        if text:
            yield json.loads(text)


def _tensors(model: str, inputs: Mapping[str, Any]) -> list[grpc_client.InferInput]:
    face = FACES.get(model, LLM)
    specs = {**face.tensor, APPLY_CHAT_TEMPLATE.name: APPLY_CHAT_TEMPLATE}
    in_front = [1] * face.has_batch_dimension
    return [_tensor(specs[name], value, in_front) for name, value in inputs.items()]


def _tensor(spec: Input, value: Any, in_front: list[int]) -> grpc_client.InferInput:
    array = np.array([v.encode() if isinstance(v, str) else v for v in _listed(value)], NUMPY_TYPES[spec.dtype])
    array = array.reshape(*in_front, *array.shape)
    tensor = grpc_client.InferInput(spec.name, list(array.shape), "BYTES" if spec.dtype == "STRING" else spec.dtype)
    tensor.set_data_from_numpy(array)
    return tensor


def output_values(result: grpc_client.InferResult) -> dict[str, Any]:
    """A response's outputs as Python values by name; what has one element is that, else a list."""
    return {output.name: _value(result.as_numpy(output.name)) for output in result.get_response().outputs}


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _value(array: np.ndarray) -> Any:
    values = [value.decode() if isinstance(value, bytes) else value for value in array.ravel().tolist()]
    return values[0] if len(values) == 1 else values
