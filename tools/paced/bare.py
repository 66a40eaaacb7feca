"""A decoupled model that only sends: what a response costs it is Triton's own cost. For a model's 1/model.py."""

import threading

import numpy as np
import triton_python_backend_utils as pb_utils

STEP_SECONDS, TOKENS_PER_STEP = 0.02, 3  # as the paced engine's; specbackend is not asked, for it would be loaded
TEXT = np.array([[b" one two three"]], dtype=np.object_)


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self._left = {}  # response senders, with the number of responses to come
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def execute(self, requests: list) -> None:
        for request in requests:
            max_tokens = pb_utils.get_input_tensor_by_name(request, "max_tokens").as_numpy().item()
            self._left[request.get_response_sender()] = -(-max_tokens // TOKENS_PER_STEP)

    def finalize(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(STEP_SECONDS):
            for sender in list(self._left):
                self._left[sender] -= 1
                final = self._left[sender] == 0
                if final:
                    del self._left[sender]
                response = pb_utils.InferenceResponse([pb_utils.Tensor("text_output", TEXT)])
                sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)
