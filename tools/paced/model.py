"""The llm model with the paced engine behind its adapter. For a repository's llm/1/model.py."""

import triton_python_backend_utils as pb_utils

from specbackend.serving.adapter import Adapter
from specbackend.serving.supervisor import ENGINE_COMMAND


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self._adapter = Adapter(pb_utils, args, (*ENGINE_COMMAND, "--engine", "paced.engine:PacedEngine"))

    def execute(self, requests: list) -> None:
        self._adapter.execute(requests)

    def finalize(self) -> None:
        self._adapter.finalize()
