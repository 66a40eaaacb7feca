"""What the radix sidecar holds, as JSON. What this does is in specbackend.serving."""

import triton_python_backend_utils as pb_utils

from specbackend.errors import ConfigError
from specbackend.serving.radix_cache import RadixCache


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        try:
            self._radix_cache = RadixCache(pb_utils, args)
        except ConfigError as error:
            raise pb_utils.TritonModelException(str(error)) from error

    def execute(self, requests: list) -> list:
        return self._radix_cache.execute(requests)

    def finalize(self) -> None:
        self._radix_cache.finalize()
