"""Stand-ins: an engine without a model, and Triton's pb_utils without a server."""

import json
import os
import signal
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from specbackend.cache.tree_view import NodeView, TreeView
from specbackend.config import EngineConfig
from specbackend.engine_stats import EngineStats
from specbackend.errors import ConfigError, InvalidRequest, QueueFull
from specbackend.request import Failure, FinishReason, Request, TokenLogprob, Update

SPECIALS = ("<|begin|>", "<|user|>", "<|assistant|>", "<|end|>")
END_ID = 256 + SPECIALS.index("<|end|>")
VOCAB_SIZE = 256 + len(SPECIALS)
CONTEXT_LENGTH = 512
TOKENS_PER_STEP = 3
UNLUCKY_SEED = 13  # a random_seed that the fake engine refuses
LUCKY_SEED = 7  # a request's seed with which nothing fails
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """One token per byte, so that every character beyond ASCII is several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def save_byte_checkpoint(folder: Path) -> Path:
    """A checkpoint folder with all that the adapter reads itself."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": CHAT_TEMPLATE, "bos_token": SPECIALS[0]})
    )
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": CONTEXT_LENGTH}))
    return folder


def fake_answer(input_ids: list[int], max_new_tokens: int, seed: int | None = None) -> list[int]:
    """The fake model repeats its prompt for ever, from the place that the seed says."""
    return [input_ids[(i + (seed or 0)) % len(input_ids)] for i in range(max_new_tokens)]


def fake_logprobs(input_ids: list[int], count: int | None) -> list[TokenLogprob]:
    """Each token is less likely the larger it is, and the one before it would have been likelier."""
    if count is None:
        return []
    return [TokenLogprob(t, -t / 8, 2, [(t - 1, -(t - 1) / 8), (t, -t / 8)][:count]) for t in input_ids]


class FakeEngine:
    """Has the Engine's interface. The next step does what a prompt begins with: `crash`, `raise`, `hang` or `fail`."""

    step_seconds = 0.002

    def __init__(self, **params):
        self.config = EngineConfig.from_params(params)
        if self.config.random_seed == UNLUCKY_SEED:
            raise ConfigError(f"random_seed: {UNLUCKY_SEED} is unlucky")
        self.context_length = CONTEXT_LENGTH
        self.model_config = SimpleNamespace(vocab_size=VOCAB_SIZE, eos_token_ids=(END_ID,))
        self._requests: deque[Request] = deque()
        self._decode = byte_tokenizer().decode

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def submit(self, request: Request) -> None:
        assert request.params.n == 1
        if request.params.regex == "(":
            raise InvalidRequest("regex", "is no regex")
        if len(self._requests) >= self.config.max_queued_requests:
            raise QueueFull("full")
        self._requests.append(request)

    def cancel(self, request_id: str) -> None:
        self._requests = deque(r for r in self._requests if r.request_id != request_id)

    def step(self) -> list[Update]:
        if self._requests:
            time.sleep(self.step_seconds)
        updates = [self._advance(request) for request in self._requests]
        self._requests = deque(r for r in self._requests if r.finish_reason is None)
        return updates

    def flush_cache(self) -> int:
        return 5

    def cache_view(self, limit: int) -> TreeView:
        return TreeView(2, 7, 2, [NodeView(4, None, 2, 7, 1, 0, 3), NodeView(9, 4, 5, 5, 0, 1, 0)][:limit])

    def stats(self) -> EngineStats:
        running = len(self._requests)
        return EngineStats(running, num_waiting=0, free_slots=1000 - running, evictable_slots=0, total_slots=1000)

    def _advance(self, request: Request) -> Update:
        prompt = self._decode(request.input_ids)
        if prompt.startswith("crash"):
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt.startswith("raise"):
            raise RuntimeError("the device is on fire")
        if prompt.startswith("hang"):
            time.sleep(3600)
        if prompt.startswith("fail") and request.params.seed != LUCKY_SEED:
            request.finish_reason = FinishReason.ABORT
            failure = Failure("regex", "cannot go on")
            return Update(request.request_id, [], request.finish_reason, failure=failure)
        start, limit = len(request.output_ids), request.params.max_new_tokens
        new = fake_answer(request.input_ids, limit, request.params.seed)[start : start + TOKENS_PER_STEP]
        request.output_ids += new
        request.spec_verify_ct += 1
        request.finish_reason = FinishReason.LENGTH if len(request.output_ids) == limit else None
        counts = len(request.input_ids), len(request.output_ids), 0, request.spec_verify_ct
        logprobs = fake_logprobs(new, request.params.logprobs)
        of_prompt = fake_logprobs(request.input_ids[1:], request.params.prompt_logprobs) if start == 0 else []
        return Update(
            request.request_id, new, request.finish_reason, *counts, logprobs=logprobs, prompt_logprobs=of_prompt
        )


class SlowEngine(FakeEngine):
    """Slow enough for tests to do something meanwhile."""

    step_seconds = 0.05


class FakeTensor:
    def __init__(self, name: str, array: np.ndarray):
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class FakeError(Exception):
    """pb_utils.TritonError"""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL):
        super().__init__(message)
        self.code = code


class FakeResponse:
    def __init__(self, output_tensors: list[FakeTensor], error: FakeError | None = None):
        self.outputs = {tensor.name(): tensor.as_numpy() for tensor in output_tensors}
        self.error = error
        self.final = False


class FakeSender:
    """Records responses, and fails the test where the real one would end tritonserver."""

    def __init__(self):
        self.responses: list[FakeResponse] = []
        self.cancelled = False
        self.threads: set[int] = set()
        self.misuse: list[str] = []
        self._done = threading.Event()

    def send(self, response: FakeResponse, flags: int = 0) -> None:
        self._touch("send")
        response.final = bool(flags)
        self.responses.append(response)
        if response.final:
            self._done.set()

    def is_cancelled(self) -> bool:
        self._touch("is_cancelled")
        return self.cancelled

    def wait(self, timeout: float = 10.0) -> list[FakeResponse]:
        assert self._done.wait(timeout), "no final response"
        return self.responses

    def text(self) -> str:
        return "".join(response.outputs["text_output"].item().decode() for response in self.wait())

    def error(self) -> FakeError:
        error = self.wait()[-1].error
        assert error is not None, "expected an error"
        return error

    def _touch(self, method: str) -> None:
        self.threads.add(threading.get_ident())
        if self._done.is_set():
            self.misuse.append(f"{method} after the final response")


class FakeRequest:
    """Give inputs as Python values: scalars become [1, 1], lists [1, n]."""

    face_name = "LLM"  # in serving.faces

    def __init__(self, request_id: str = "", parameters: dict | None = None, timeout: int = 0, outputs=None, **inputs):
        self._id, self._parameters, self._timeout, self._inputs = request_id, parameters or {}, timeout, inputs
        self._outputs = outputs
        self.sender = FakeSender()

    def inputs(self) -> list[FakeTensor]:
        return [FakeTensor(name, _tensor_array(self.face, name, value)) for name, value in self._inputs.items()]

    def parameters(self) -> str:
        return json.dumps(self._parameters)

    def request_id(self) -> str:
        return self._id

    def timeout(self) -> int:
        return self._timeout

    def requested_output_names(self) -> list[str]:
        return self._outputs or list(self.face.output)

    def get_response_sender(self) -> FakeSender:
        return self.sender

    @property
    def face(self):
        from specbackend.serving import faces

        return getattr(faces, self.face_name)


class VllmRequest(FakeRequest):
    """The same for vllm_model: [1] and [n]."""

    face_name = "VLLM"


def _tensor_array(face, name: str, value) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    types = {"STRING": np.object_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_}
    dtype = types.get(face.tensor[name].dtype, np.bool_) if name in face.tensor else np.bool_
    row = value if isinstance(value, list) else [value]
    array = np.array([v.encode() if isinstance(v, str) else v for v in row], dtype=dtype)
    return array[None] if face.has_batch_dimension else array


class FakeMetric:
    def __init__(self, buckets: list[float] | None = None):
        self.value, self.observed, self.threads = None, [], set()
        self.buckets = buckets

    def set(self, value: float) -> None:
        self.value = value
        self.threads.add(threading.get_ident())

    def increment(self, value: float) -> None:
        assert value >= 0, "a counter cannot go back"
        self.set((self.value or 0) + value)

    def observe(self, value: float) -> None:
        assert self.buckets, "no histogram"
        self.observed.append(value)
        self.threads.add(threading.get_ident())


class FakeMetricFamily:
    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

    def __init__(self, name: str, description: str, kind: str):
        self.name, self.kind, self.metrics = name, kind, {}
        FakePbUtils.metric_families.append(self)

    def Metric(self, labels: dict, buckets: list[float] | None = None) -> FakeMetric:
        assert (self.kind == self.HISTOGRAM) == (buckets is not None), "buckets are for histograms"
        return self.metrics.setdefault(json.dumps(labels), FakeMetric(buckets))


class FakePbUtils:
    """The parts of triton_python_backend_utils that the adapter uses."""

    Tensor = FakeTensor
    InferenceResponse = FakeResponse
    TritonError = FakeError
    MetricFamily = FakeMetricFamily
    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    metric_families: ClassVar[list[FakeMetricFamily]] = []
