"""From our answers to Triton's responses. `pb_utils` is an argument everywhere, so that tests can pass a fake."""

import json
import logging
import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np

from specbackend.serving.errors import CODES
from specbackend.serving.faces import LLM, Face

NUMPY_TYPES = {
    "STRING": np.object_,
    "INT32": np.int32,
    "UINT32": np.uint32,
    "INT64": np.int64,
    "FP32": np.float32,
}

log = logging.getLogger(__name__)


class Sender:
    """Where the answer to one request goes. For the response thread only.

    What is done for this request is done `with` it: a bug in it is this request's answer, and no other's business.

    With the final response it forgets Triton's object: to ask that then whether it is cancelled ends tritonserver.
    What is sent after that is dropped.
    """

    def __init__(self, pb_utils: Any, request: Any, face: Face = LLM):
        self._pb = pb_utils
        self._sender = request.get_response_sender()
        self._returns_code = returns_code(request)
        self._face = face
        self._unsent: list[tuple[Any, int]] = []  # responses with their flags

    @property
    def is_done(self) -> bool:
        """Whether the final response is sent."""
        return self._sender is None

    def is_cancelled(self) -> bool:
        return self._sender is not None and self._sender.is_cancelled()

    def __enter__(self) -> "Sender":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> bool:
        if not isinstance(error, Exception):
            return False
        log_bug(error)
        self.fail(error)
        return True

    def put(self, outputs: Mapping[str, object], final: bool) -> None:
        """Make a response of values by output name, see `make_tensor`; `flush` sends it."""
        if self._sender is not None:
            tensors = [make_tensor(self._pb, self._face, name, value) for name, value in outputs.items()]
            flags = self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
            self._unsent.append((self._pb.InferenceResponse(output_tensors=tensors), flags))

    def flush(self) -> None:
        """Send what was put. Raises what Triton does."""
        for response, flags in self._unsent:
            if self._sender is not None:
                self._sender.send(response, flags=flags)
                if flags:
                    self._sender = None
        self._unsent.clear()

    def send(self, outputs: Mapping[str, object], final: bool) -> None:
        """A response that waits for no other."""
        self.put(outputs, final)
        self.flush()

    def fail(self, error: Exception) -> None:
        """Answer with an error, which is final. Never raises."""
        sender, self._sender = self._sender, None
        if sender is None:
            return
        try:
            told = triton_error(self._pb, error, self._returns_code)
            response = self._pb.InferenceResponse(output_tensors=[], error=told)
            sender.send(response, flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as lost:  # Triton's own: nobody is left to tell, and the others are served on
            log.error("an answer is lost: %s", lost)  # without the traceback, which would show `error` too


def make_tensor(pb_utils: Any, face: Face, name: str, value: object) -> Any:
    """A tensor [n] from a list, [1] from a single value; behind as many dimensions of size 1 as the face has more."""
    values = value if isinstance(value, list) else [value]
    dtype, ndim = face.layout[name]
    if dtype == "STRING":
        values = [text.encode() for text in values]
    return pb_utils.Tensor(name, np.array(values, dtype=NUMPY_TYPES[dtype], ndmin=ndim))


def log_bug(error: Exception) -> None:
    """Where it is, and not what it says, which may quote a client's text. The client gets that as its answer."""
    log.error("%s in\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)).rstrip())


def returns_code(request: Any) -> bool:
    """Whether the text of an error is to begin with its code, which is not told otherwise in a gRPC stream.

    Triton can end a stream with the code, if it is opened with the header `triton_grpc_error`. That ends the whole
    server now and then, before version 2.68: the stream's state may be gone before it is released.
    """
    return json.loads(request.parameters() or "{}").get("return_error_code") is True


def triton_error(pb_utils: Any, error: Exception, with_code: bool = False) -> Any:
    """with_code: see `returns_code`."""
    name, code = next((name, code) for kind, name, code in CODES if isinstance(error, kind))
    text = str(error) if name != "INTERNAL" else f"{type(error).__name__}: {error}"
    return pb_utils.TritonError(f"{code}: {text}" if with_code else text, getattr(pb_utils.TritonError, name))
