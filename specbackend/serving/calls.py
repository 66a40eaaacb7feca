"""From Triton's requests to calls: every value is used exactly, or refused by the name the client gave it."""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any

import msgpack
import numpy as np

from specbackend.errors import InvalidRequest
from specbackend.sampling_params import GUIDE_OBJECTS, GUIDES, RETURN_LOGPROB, SamplingParams, in_our_words
from specbackend.serving.errors import Unsupported
from specbackend.serving.protocol import Ready
from specbackend.serving.schemas import ALWAYS, ANY, LLM_INPUTS, LLM_OUTPUTS, LLM_PARAMETERS, Input
from specbackend.tokenizer import Tokenizer
from specbackend.words import bad_word_ids, with_token_ids, word_biases

TENSORS = {spec.name: spec for spec in LLM_INPUTS}
PARAMETERS = {**TENSORS, **{spec.name: spec for spec in LLM_PARAMETERS}}  # where both exist, parameters have their own
OUTPUTS = {spec.name: spec for spec in LLM_OUTPUTS if spec.asked_by}
NUMBER, TEXT = ((int, float), "a number"), (str, "a string")
INTEGER, FLAG = (int, "an integer"), (bool, "a bool")
PARAMETER_TYPES = {
    "STRING": TEXT,
    "BOOL": FLAG,
    **dict.fromkeys(("INT32", "INT64", "UINT8", "UINT64"), INTEGER),
    **dict.fromkeys(("FP16", "FP32", "FP64"), NUMBER),
    "JSON": ((int, str), "a number or JSON"),
    "ANY": (object, "anything"),
}
# Stop words are looked for after every token, in the thread that answers everybody, and other words tokenized there.
MOST_VALUES = {"stop": 64, "bad_words": 64, "bias_words": 256, "bias_weights": 256}
SAMPLING_FIELDS = (*(f.name for f in fields(SamplingParams)), *RETURN_LOGPROB, *GUIDE_OBJECTS)
JSON_FIELDS = {spec.sets for spec in LLM_PARAMETERS if spec.dtype == "JSON"}
MOST_PROMPT_LOGPROBS = 1 << 16  # written as JSON in that thread, too: a quarter of a second
GUIDE_TYPES = {"json_schema": "json_schema", "regex": "regex", "ebnf_grammar": "ebnf"}  # TensorRT-LLM's
AS_TEXT = ("stop", "bad_words", *GUIDES)  # of the vLLM backend's sampling_parameters; all else may be text of JSON
VLLM_DEFAULTS = {"temperature": 1.0, "max_new_tokens": 16}  # where they differ from ours
ANY_JSON = '{"type": ["object", "array"]}'  # TensorRT-LLM's guide type json


@dataclass(frozen=True)
class Call:
    """A generation that a client asks for."""

    input_ids: list[int]
    params: SamplingParams
    stream: bool = False
    echo: str = ""  # put in front of the answer
    outputs: frozenset[str] = frozenset(("text_output",))  # those to send
    client_id: str = ""  # the client's request id; not unique
    arrival_ns: int = field(default_factory=time.monotonic_ns)
    timeout_us: int = 0  # 0: none
    names: dict[str, str] = field(default_factory=dict)  # what the client calls our parameters

    def refusal(self, field: str, message: str) -> InvalidRequest:
        """What the engine has against the call, in the client's words."""
        return InvalidRequest(self.names.get(field, field), message)

    @property
    def deadline(self) -> float | None:
        """On time.monotonic()'s clock, in seconds."""
        return self.arrival_ns / 1e9 + self.timeout_us / 1e6 if self.timeout_us else None


@dataclass(frozen=True)
class CancelCall:
    """`stop` = true: end the running requests of this id."""

    client_id: str


class Fields:
    """What one request sets, by meaning instead of by name, with the name for error messages."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._names: dict[str, str] = {}

    def add(self, spec: Input, values: Iterable) -> None:
        """Take one input's values. Raises InvalidRequest if another name for the same differs, or Unsupported."""
        if spec.sets is None:
            self._check_neutral(spec, values)
            return
        values = list(values)
        value = values if spec.dims != (1,) else only_value(spec.name, values)
        if spec.sets in self._values and self._values[spec.sets] != value:
            raise InvalidRequest(spec.name, f"contradicts {self._names[spec.sets]}")
        self._values[spec.sets] = value
        self._names[spec.sets] = spec.name

    def get(self, meaning: str, default: Any = None) -> Any:
        return self._values.get(meaning, default)

    def name(self, meaning: str) -> str:
        """As the client calls it."""
        return self._names.get(meaning, meaning)

    @staticmethod
    def _check_neutral(spec: Input, values: Iterable) -> None:
        if spec.neutral is not ANY and not all(value in spec.neutral for value in values):
            only = f" (only {' and '.join(map(repr, spec.neutral))})" if spec.neutral else ""
            raise Unsupported(spec.name, f"is not supported{only}{spec.why and f': {spec.why}'}")


def read_fields(request: Any, context_length: int) -> Fields:
    """Collect the request's tensors and parameters. Raises InvalidRequest, naming the field."""
    fields = Fields()
    for tensor in request.inputs():
        spec, array = TENSORS[tensor.name()], tensor.as_numpy()
        check_size(spec, array.size, context_length)
        fields.add(spec, tensor_values(spec.name, array))
    for name, value in json.loads(request.parameters() or "{}").items():
        if name not in PARAMETERS:
            raise InvalidRequest(name, f"is not a known parameter (known: {', '.join(sorted(PARAMETERS))})")
        check_type(PARAMETERS[name], value)
        fields.add(PARAMETERS[name], [value])
    return fields


def check_size(spec: Input, size: int, context_length: int) -> None:
    """Before a tensor becomes a Python list, which takes a second per million values and holds up everybody."""
    if spec.sets == "input_ids":
        check_prompt_length(spec.name, size, context_length)
    elif size > MOST_VALUES.get(spec.sets, size):
        raise InvalidRequest(spec.name, f"has {size} values, at most {MOST_VALUES[spec.sets]} are served")


def check_type(spec: Input, value: Any) -> None:
    """A parameter's type is the client's choice; a tensor's is checked by Triton."""
    types, words = PARAMETER_TYPES[spec.dtype]
    if not isinstance(value, types) or (isinstance(value, bool) and types not in (bool, object)):
        raise InvalidRequest(spec.name, f"must be {words}, got {value!r}")


def tensor_values(name: str, array: np.ndarray) -> Iterable:
    """The Python values of a tensor [1, ...], one by one: large tensors that are refused are not worth a list."""
    if array.ndim and array.shape[0] > 1:
        raise InvalidRequest(name, f"one prompt per request, got a batch of {array.shape[0]}")
    return (_plain(name, value) for value in array.flat)


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise InvalidRequest(name, "is not valid UTF-8") from None
    if isinstance(value, np.float32):
        return float(str(value))  # the shortest decimal is what the client wrote: 0.7 and not 0.699999988
    return value.item() if isinstance(value, np.generic) else value


def only_value(name: str, values: list) -> Any:
    if len(values) != 1:
        raise InvalidRequest(name, f"must have one element, got {len(values)}")
    return values[0]


class CallReader:
    """Turns Triton's requests into calls that the engine will not refuse."""

    def __init__(self, tokenizer: Tokenizer, limits: Ready):
        self._tokenizer = tokenizer
        self._limits = limits

    def read(self, request: Any) -> Call | CancelCall:
        """Raises InvalidRequest or Unsupported, naming the field as the client calls it."""
        fields = read_fields(request, self._limits.context_length)
        if fields.get("cancel"):
            return _read_cancel(request)
        input_ids = self._read_prompt(fields)
        params, names = self._read_params(fields)
        outputs = _read_outputs(fields, params, request.requested_output_names())
        params = replace(_with_logprobs(params, outputs), return_spec_trace="spec_trace" in outputs)
        check_prompt_logprobs(names.get("prompt_logprobs", "prompt_logprobs"), params, len(input_ids))
        return Call(
            input_ids,
            params,
            stream=fields.get("stream", False),
            echo="" if fields.get("exclude_input_in_output", True) else self._prompt_text(fields),
            outputs=outputs,
            client_id=request.request_id(),
            timeout_us=request.timeout() or _read_timeout(fields),
            names=names,
        )

    def _read_prompt(self, fields: Fields) -> list[int]:
        text, input_ids = fields.get("text"), fields.get("input_ids")
        if text is not None and input_ids is not None:
            raise InvalidRequest("input_ids", "contradicts text_input: send one of the two")
        if input_ids is None:
            return encode_prompt(self._tokenizer, text, self._limits.context_length)
        self._check_ids(fields, input_ids)
        return input_ids

    def _check_ids(self, fields: Fields, input_ids: list[int]) -> None:
        length = fields.get("input_length", len(input_ids))
        if length != len(input_ids):
            raise InvalidRequest("input_lengths", f"is {length}, but input_ids has {len(input_ids)}")
        vocab_size = self._limits.vocab_size
        if not all(0 <= token < vocab_size for token in input_ids):
            raise InvalidRequest("input_ids", f"must lie between 0 and {vocab_size - 1}, the model's vocabulary")

    def _prompt_text(self, fields: Fields) -> str:
        text = fields.get("text")
        return self._tokenizer.decode(fields.get("input_ids")) if text is None else text

    def _read_params(self, fields: Fields) -> tuple[SamplingParams, dict[str, str]]:
        """The parameters, and what the client calls them."""
        params = {name: fields.get(name) for name in SAMPLING_FIELDS if fields.get(name) is not None}
        for name in JSON_FIELDS & params.keys():
            if isinstance(params[name], str):
                params[name] = _read_json(fields.name(name), params[name], as_pairs=name == "logit_bias")
        if "stop" in params:
            stop = params["stop"]
            params["stop"] = [stop] if isinstance(stop, str) else [text for text in stop if text]  # clients send [""]
        names = {name: fields.name(name) for name in params}
        other_words = self._read_words, self._read_codes, self._read_sampling_parameters, _read_guide
        for name, value, client_name in chain.from_iterable(read(fields) for read in other_words):
            if name in params and params[name] != value:
                raise InvalidRequest(client_name, f"contradicts {names[name]}: send one of the two")
            params[name], names[name] = value, client_name
        names |= {own: names[name] for name, own, _ in in_our_words(params)}
        defaults = VLLM_DEFAULTS if fields.get("sampling_parameters") else {}
        try:
            sampling = SamplingParams.from_dict(_apply_defaults({**defaults, **params}))
            sampling.check_vocabulary(self._limits.vocab_size, self._limits.eos_token_ids)
        except InvalidRequest as error:
            raise InvalidRequest(names.get(error.field, error.field), error.message) from None
        for name in ("custom_params", "stop", *GUIDES):
            check_packable(names.get(name, name), getattr(sampling, name))
        return sampling, names

    def _read_words(self, fields: Fields) -> Iterator[tuple[str, Any, str]]:
        """Sampling parameters from what TensorRT-LLM's clients send as text, as all below: name, value, their name."""
        bad, biased, weights = (fields.get(meaning) for meaning in ("bad_words", "bias_words", "bias_weights"))
        if bad is not None and (ids := bad_word_ids(self._tokenizer, "bad_words", bad)):
            yield "bad_words_ids", ids, "bad_words"
        if any(biased or ()) or any(weights or ()):  # clients send [""] and [0]
            biases = word_biases(self._tokenizer, biased or [], weights or [])
            yield "logit_bias", biases, fields.name("bias_words")

    def _read_codes(self, fields: Fields) -> Iterator[tuple[str, Any, str]]:
        """TensorRT-LLM's numbers that stand for something else. Every other value is refused, not approximated."""
        end_id, nodes = (fields.get(meaning) for meaning in ("end_id", "num_draft_tokens"))
        own_ids, own_nodes = self._limits.eos_token_ids, self._limits.num_draft_tokens
        if end_id == -1:
            yield "ignore_eos", True, "end_id"
        elif end_id not in (None, *own_ids):
            raise Unsupported("end_id", f"only the model's own {own_ids} and -1 (none) are supported, got {end_id}")
        if nodes == 0:
            yield "speculative", False, "num_draft_tokens"
        elif nodes is not None and not 0 < nodes <= own_nodes:
            message = f"must lie between 0 (no speculation) and the server's own {own_nodes}, got {nodes}"
            raise InvalidRequest("num_draft_tokens", message)
        elif nodes not in (None, own_nodes):
            yield "speculative_num_draft_tokens", nodes, "num_draft_tokens"

    def _read_sampling_parameters(self, fields: Fields) -> Iterator[tuple[str, Any, str]]:
        given = _read_json("sampling_parameters", fields.get("sampling_parameters") or "{}")
        if not isinstance(given, dict):
            raise InvalidRequest("sampling_parameters", f"must be an object, got {given!r}")
        for name, value in given.items():
            if isinstance(value, str) and name not in AS_TEXT:
                with suppress(InvalidRequest):
                    given[name] = _read_json(name, value)
        for name, own, value in in_our_words(with_token_ids(self._tokenizer, given)):
            yield own, value, "bad_words" if "bad_words" in given and own == "bad_words_ids" else name


def _read_guide(fields: Fields) -> Iterator[tuple[str, str, str]]:
    """TensorRT-LLM's guided decoding; clients send "" for none."""
    kind, guide = fields.get("guide_type") or "", fields.get("guide") or ""
    if kind == "json" and not guide:
        yield "json_schema", ANY_JSON, fields.name("guide_type")
    elif kind in GUIDE_TYPES and guide:
        yield GUIDE_TYPES[kind], guide, fields.name("guide")
    elif kind in GUIDE_TYPES:
        raise InvalidRequest("guided_decoding_guide", f"is required by guided_decoding_guide_type {kind}")
    elif kind or guide:
        name = "guided_decoding_guide" if kind == "json" else "guided_decoding_guide_type"
        raise InvalidRequest(name, "must be json, with no guide, or json_schema, regex or ebnf_grammar, with one")


def encode_prompt(tokenizer: Tokenizer, text: str | None, context_length: int, chat: bool = False) -> list[int]:
    """Tokenize what a client sent as text_input; with `chat` as the user's turn in the tokenizer's chat template.

    Raises InvalidRequest, for hopelessly long text before any work is done on it.
    """
    if not text:
        raise InvalidRequest("text_input", "is required and must not be empty")
    size, most = len(text.encode()), context_length * tokenizer.max_token_bytes
    if size > most:
        raise InvalidRequest("text_input", f"has {size} bytes; context_length {context_length} holds at most {most}")
    if chat:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    input_ids = tokenizer.encode(text, add_special_tokens=not chat)  # the template brings its own
    check_prompt_length("text_input", len(input_ids), context_length)
    return input_ids


def check_prompt_length(name: str, length: int, context_length: int) -> None:
    if length == 0:
        raise InvalidRequest(name, "is empty")
    if length >= context_length:
        raise InvalidRequest(name, f"has {length} tokens, too many for context_length {context_length} and an answer")


def _read_cancel(request: Any) -> CancelCall:
    if not request.request_id():
        raise InvalidRequest("stop", "A request id must be provided for request cancellation")
    return CancelCall(request.request_id())


def _read_timeout(fields: Fields) -> int:
    timeout = fields.get("timeout", 0)
    if timeout < 0:
        raise InvalidRequest("timeout", f"must not be negative, got {timeout}")
    return timeout


def _apply_defaults(params: dict[str, Any]) -> dict[str, Any]:
    """What TensorRT-LLM makes of top_k and top_p: 0 is all tokens, and without temperature they decide if to sample."""
    top_k, top_p = params.get("top_k"), params.get("top_p")
    if top_k == 0:
        params = {**params, "top_k": -1}
    if top_p == 0:
        params = {**params, "top_p": 1.0}
    if top_k == 1:
        return {**params, "temperature": 0.0}
    chooses = top_k not in (None, -1, 0) or top_p not in (None, 0, 1) or bool(params.get("min_p"))
    return {"temperature": 1.0 if chooses else 0.0, **params}


def _read_json(name: str, text: str, as_pairs: bool = False) -> Any:
    """As pairs objects become lists, so that a key that comes twice is seen."""
    try:
        return json.loads(text, object_pairs_hook=list if as_pairs else None)
    except (ValueError, RecursionError):  # no JSON, absurdly long numbers; absurdly deep lists
        raise InvalidRequest(name, f"must be a number or JSON, got {text!r}") from None


def check_prompt_logprobs(name: str, params: SamplingParams, prompt_length: int) -> None:
    if params.prompt_logprobs is not None:
        count = params.n * prompt_length * (params.prompt_logprobs + 1)
        if count > MOST_PROMPT_LOGPROBS:
            message = f"with this prompt these would be {count} numbers, at most {MOST_PROMPT_LOGPROBS} are served"
            raise InvalidRequest(name, message)


def check_packable(name: str, value: Any) -> None:
    """JSON has larger numbers and stranger text than messages to the engine."""
    try:
        msgpack.packb(value)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(name, f"cannot be sent to the engine: {error}") from None


def _read_outputs(fields: Fields, params: SamplingParams, requested: Iterable[str]) -> frozenset[str]:
    """Outputs whose flag is set, and those requested by name: Triton fills in all names if a client requests none.

    Raises Unsupported for those that have no room for several answers in one response.
    """
    requested = set(requested)
    named = set() if requested >= {spec.name for spec in LLM_OUTPUTS} else requested
    flagged = {name for name, spec in OUTPUTS.items() if _is_asked(spec.asked_by, fields, params)}
    outputs = frozenset(flagged & requested | named & OUTPUTS.keys())
    for name in sorted(outputs):
        if OUTPUTS[name].ragged and params.n > 1 and not fields.get("stream"):
            asked_by = fields.name(OUTPUTS[name].asked_by) if name in flagged else name
            raise Unsupported(asked_by, f"{name} of several answers comes with stream only, response by response")
    return outputs


def _is_asked(asked_by: str, fields: Fields, params: SamplingParams) -> bool:
    if asked_by in ("logprobs", "prompt_logprobs"):
        return getattr(params, asked_by) is not None
    if asked_by == "return_spec_trace":
        return params.return_spec_trace
    return asked_by == ALWAYS or (params.n > 1 if asked_by == "n" else bool(fields.get(asked_by)))


def _with_logprobs(params: SamplingParams, outputs: frozenset[str]) -> SamplingParams:
    """Whoever asks for an output asks for what is in it."""
    if params.logprobs is None and outputs & {"logprobs", "output_log_probs", "cum_log_probs"}:
        params = replace(params, logprobs=0)
    if params.prompt_logprobs is None and "prompt_logprobs" in outputs:
        params = replace(params, prompt_logprobs=0)
    return params
