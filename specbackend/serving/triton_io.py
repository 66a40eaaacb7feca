"""From our answers to Triton's responses. `pb_utils` is an argument everywhere, so that tests can pass a fake."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from specbackend.errors import InvalidRequest
from specbackend.serving.errors import Cancelled, Unavailable, Unsupported
from specbackend.serving.schemas import LLM_OUTPUTS

OUTPUT_TYPES = {spec.name: spec.dtype for spec in LLM_OUTPUTS}
NUMPY_TYPES = {"STRING": np.object_, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}

log = logging.getLogger(__name__)


class Sender:
    """Where the answer to one request goes. For the response thread only.

    With the final response it forgets Triton's object: to ask that then whether it is cancelled ends tritonserver.
    """

    def __init__(self, pb_utils: Any, response_sender: Any):
        self._pb = pb_utils
        self._sender = response_sender

    def is_cancelled(self) -> bool:
        return self._sender is None or self._sender.is_cancelled()

    def send(self, outputs: Mapping[str, object], final: bool) -> None:
        """Send values by output name; lists become [1, n], single values [1, 1]."""
        tensors = [make_tensor(self._pb, name, value) for name, value in outputs.items()]
        self._send(self._pb.InferenceResponse(output_tensors=tensors), final)

    def fail(self, error: Exception) -> None:
        """Answer with an error, which is final."""
        self._send(self._pb.InferenceResponse(output_tensors=[], error=triton_error(self._pb, error)), final=True)

    def _send(self, response: Any, final: bool) -> None:
        sender, flags = self._sender, self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        if sender is None:
            return
        if final:
            self._sender = None
        try:
            sender.send(response, flags=flags)
        except Exception:  # Triton cannot pass it on: nobody to tell, and no reason to stop serving the others
            log.exception("a response is lost")
            self._sender = None


def make_tensor(pb_utils: Any, name: str, value: object) -> Any:
    row = value if isinstance(value, list) else [value.encode() if isinstance(value, str) else value]
    return pb_utils.Tensor(name, np.array([row], dtype=NUMPY_TYPES[OUTPUT_TYPES[name]]))


def triton_error(pb_utils: Any, error: Exception) -> Any:
    codes = pb_utils.TritonError
    for kind, code in (
        (Unsupported, codes.UNSUPPORTED),
        (InvalidRequest, codes.INVALID_ARG),
        (Unavailable, codes.UNAVAILABLE),
        (Cancelled, codes.CANCELLED),
    ):
        if isinstance(error, kind):
            return codes(str(error), code)
    return codes(f"{type(error).__name__}: {error}", codes.INTERNAL)
