"""Chat template and tokenizer, for the ensemble. What it does is in specbackend.serving."""

import triton_python_backend_utils as pb_utils

from specbackend.errors import ConfigError
from specbackend.serving.preprocessor import Preprocessor


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        try:
            self._preprocessor = Preprocessor(pb_utils, args)
        except ConfigError as error:
            raise pb_utils.TritonModelException(str(error)) from error

    def execute(self, requests: list) -> list:
        return self._preprocessor.execute(requests)
