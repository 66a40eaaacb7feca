"""The vLLM backend's face of the engine: a decoupled model. What it does is in specbackend.serving."""

import triton_python_backend_utils as pb_utils

from specbackend.errors import ConfigError
from specbackend.serving.adapter import Adapter
from specbackend.serving.errors import EngineError
from specbackend.serving.faces import VLLM


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        """Start the engine and wait until it has loaded; its message, if it fails, is what the user reads."""
        try:
            self._adapter = Adapter(pb_utils, args, face=VLLM)
        except (ConfigError, EngineError) as error:
            raise pb_utils.TritonModelException(str(error)) from error

    def execute(self, requests: list) -> None:
        """Requests are read here and answered later, by the adapter's response thread."""
        self._adapter.execute(requests)

    def finalize(self) -> None:
        self._adapter.finalize()
