"""From Triton's requests to calls: every value is used exactly, or refused by the name the client gave it."""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from itertools import chain, pairwise
from typing import Any

import msgpack
import numpy as np

from specbackend.errors import InvalidRequest
from specbackend.sampling_params import (
    ALIASES,
    GUIDE_OBJECTS,
    GUIDES,
    LONGEST_BAD_WORD,
    MOST_BAD_WORDS,
    RETURN_LOGPROB,
    SamplingParams,
    in_our_words,
)
from specbackend.serving.chat import render_json_chat
from specbackend.serving.errors import Unsupported
from specbackend.serving.faces import LLM, Face, complete_vllm
from specbackend.serving.protocol import Ready
from specbackend.serving.schemas import ALWAYS, ANY, CHAT_INPUTS, REQUEST_PARAMETERS, SAMPLING_PARAMETERS, Input, Output
from specbackend.tokenizer import Tokenizer
from specbackend.words import bad_word_ids, with_token_ids, word_biases

NUMBER, TEXT = ((int, float), "a number"), (str, "a string")
INTEGER, FLAG = (int, "an integer"), (bool, "a bool")
PARAMETER_TYPES = {
    "STRING": TEXT,
    "BOOL": FLAG,
    **dict.fromkeys(("INT32", "INT64", "UINT8", "UINT64"), INTEGER),
    **dict.fromkeys(("FP16", "FP32", "FP64"), NUMBER),
    "JSON": ((int, str), "a number or JSON"),
    "ANY": (object, "anything"),
    "LOOSE": (object, "anything"),
}
# Stop words are looked for after every token, in the thread that answers everybody, and other words tokenized there.
MOST_VALUES = {
    "stop": 64,
    "stop_word_ids": 2 * 64,
    "bad_words": 64,
    "bad_word_ids": 2 * MOST_BAD_WORDS * LONGEST_BAD_WORD,
    "bias_words": 256,
    "bias_weights": 256,
}
SAMPLING_FIELDS = (*(f.name for f in fields(SamplingParams)), *RETURN_LOGPROB, *GUIDE_OBJECTS)
JSON_FIELDS = {spec.sets for spec in SAMPLING_PARAMETERS if spec.dtype == "JSON"}
NOT_SAMPLING = {spec.name for spec in REQUEST_PARAMETERS}
CHAT = tuple(spec.name for spec in CHAT_INPUTS)  # `messages` and what belongs to them
JSON_BYTES = 8  # of messages, per byte of text: escapes and keys
LONGEST_JSON = 1 << 22  # characters, read while others wait: a bias for each token of a large vocabulary has fewer
MOST_PROMPT_LOGPROBS = 1 << 16  # written as JSON in that thread, too, at once: a quarter of a second
MOST_NUMBERS = 1 << 20  # of logprobs, or nodes of a trace, in one response: these are written as they come, then sent
GUIDE_TYPES = {"json_schema": "json_schema", "regex": "regex", "ebnf_grammar": "ebnf"}  # TensorRT-LLM's
# Of the vLLM backend's sampling parameters; all else may be text of JSON.
AS_TEXT = ("stop", "bad_words", "cache_salt", *GUIDES)
ANY_JSON = '{"type": ["object", "array"]}'  # TensorRT-LLM's guide type json


@dataclass(frozen=True)
class Call:
    """A generation that a client asks for."""

    input_ids: list[int]
    params: SamplingParams
    stream: bool = False
    echo: str = ""  # put in front of the answer
    outputs: frozenset[str] = frozenset(("text_output",))  # those to send
    nulls: frozenset[str] = frozenset()  # of these, JSON that is asked for without what it would tell
    client_id: str = ""  # the client's request id; not unique
    arrival_ns: int = field(default_factory=time.monotonic_ns)
    timeout_us: int = 0  # 0: none
    names: dict[str, str] = field(default_factory=dict)  # what the client calls our parameters

    def refusal(self, field: str, message: str) -> InvalidRequest:
        """What the engine has against the call, in the client's words."""
        return InvalidRequest(self.names.get(field, field), message)

    def is_late(self, now: float) -> bool:
        """Whether its time is over. now: on time.monotonic()'s clock."""
        return self.timeout_us > 0 and now >= self.arrival_ns / 1e9 + self.timeout_us / 1e6


@dataclass(frozen=True)
class CancelCall:
    """`stop` = true: end the running requests of this id."""

    client_id: str


@dataclass(frozen=True)
class Prompt:
    input_ids: list[int]
    text: str | None = None  # None: that of the ids


class Fields:
    """What one request sets, by meaning instead of by name, with the name for error messages."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._names: dict[str, str] = {}

    def add(self, spec: Input, values: Iterable) -> None:
        """Take one input's values. Raises InvalidRequest if another name for the same differs, or Unsupported."""
        if spec.sets is None:
            check_neutral(spec, values)
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


def check_neutral(spec: Input, values: Iterable) -> None:
    """Raises Unsupported if one of the values would change something."""
    if spec.neutral is not ANY and not all(value in spec.neutral for value in values):
        only = f" (only {' and '.join(map(repr, spec.neutral))})" if spec.neutral else ""
        raise Unsupported(spec.name, f"is not supported{only}{spec.why and f': {spec.why}'}")


def read_fields(request: Any, face: Face, context_length: int) -> Fields:
    """Collect the request's tensors and parameters. Raises InvalidRequest, naming the field."""
    fields = Fields()
    for tensor in request.inputs():
        spec, array = face.tensor[tensor.name()], tensor.as_numpy()
        check_size(spec, array.size, context_length)
        read = tensor_values if face.has_batch_dimension else plain_values
        fields.add(spec, read(spec.name, array))
    given = json.loads(request.parameters() or "{}")
    if fields.get("sampling_parameters") is not None:  # the tensor stands for all of them, as the vLLM backend has it
        given = {name: value for name, value in given.items() if name in NOT_SAMPLING}
    for name, value in given.items():
        if name not in face.parameter:
            raise InvalidRequest(name, f"is not a known parameter (known: {', '.join(sorted(face.parameter))})")
        fields.add(face.parameter[name], [parameter_value(face.parameter[name], value)])
    return fields


def check_size(spec: Input, size: int, context_length: int) -> None:
    """Before a tensor becomes a Python list, which takes a second per million values and holds up everybody."""
    if spec.sets == "input_ids":
        check_prompt_length(spec.name, size, context_length)
    elif size > MOST_VALUES.get(spec.sets, size):
        raise InvalidRequest(spec.name, f"has {size} values, at most {MOST_VALUES[spec.sets]} are served")


def parameter_value(spec: Input, value: Any) -> Any:
    """A parameter's type is the client's choice; a tensor's is checked by Triton."""
    types, words = PARAMETER_TYPES[spec.dtype]
    if not isinstance(value, types) or (isinstance(value, bool) and types not in (bool, object)):
        raise InvalidRequest(spec.name, f"must be {words}, got {value!r}")
    return loosely(spec.name, value) if spec.dtype == "LOOSE" else value


def loosely(name: str, value: Any) -> Any:
    """What the vLLM backend makes of a sampling parameter: text of a number or JSON is what it says."""
    if isinstance(value, str) and ALIASES.get(name, name) not in AS_TEXT:
        with suppress(InvalidRequest):
            return _read_json(name, value)
    return None if name == "logprobs" and value is False else value  # Triton's OpenAI frontend says that for none


def tensor_values(name: str, array: np.ndarray) -> Iterable:
    """The Python values of a tensor [1, ...]."""
    if array.ndim and array.shape[0] > 1:
        raise InvalidRequest(name, f"one prompt per request, got a batch of {array.shape[0]}")
    return plain_values(name, array)


def plain_values(name: str, array: np.ndarray) -> Iterable:
    """A tensor's Python values, one by one: large tensors that are refused are not worth a list."""
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

    def __init__(self, tokenizer: Tokenizer, limits: Ready, face: Face = LLM):
        self._tokenizer = tokenizer
        self._limits = limits
        self._face = face

    def read(self, request: Any) -> Call | CancelCall:
        """Raises InvalidRequest or Unsupported, naming the field as the client calls it."""
        fields = read_fields(request, self._face, self._limits.context_length)
        if fields.get("cancel"):
            return _read_cancel(request)
        prompt = self._read_prompt(fields)
        params, names = self._read_params(fields)
        outputs = self._read_outputs(fields, params, request.requested_output_names())
        nulls = frozenset(name for name in outputs if self._is_null(name, params))
        params = self._with_needs(params, outputs)
        stream = fields.get("stream", False)
        check_prompt_logprobs(names.get("prompt_logprobs", "prompt_logprobs"), params, len(prompt.input_ids))
        if not stream:
            self._check_size(names, params, outputs, len(prompt.input_ids))
        echoes = self._face.echoes(fields.get("exclude_input_in_output"), stream)
        return Call(
            prompt.input_ids,
            params,
            stream=stream,
            echo=self._text(prompt) if echoes else "",
            outputs=outputs,
            nulls=nulls,
            client_id=request.request_id(),
            timeout_us=request.timeout() or _read_timeout(fields),
            names=names,
        )

    def _read_prompt(self, fields: Fields) -> Prompt:
        first, *others = [name for name in ("text", "input_ids", "messages") if fields.get(name) is not None] or [
            "text"
        ]
        if others:
            raise InvalidRequest(fields.name(others[0]), f"contradicts {fields.name(first)}: send one of the two")
        for name in CHAT:
            if fields.get(name) is not None and first != "messages":
                raise InvalidRequest(name, "says nothing without messages")
        if first == "messages":
            return self._read_chat(fields)
        if first == "text":
            text = fields.get("text")
            return Prompt(encode_prompt(self._tokenizer, text, self._limits.context_length), text)
        self._check_ids(fields, fields.get("input_ids"))
        return Prompt(fields.get("input_ids"))

    def _read_chat(self, fields: Fields) -> Prompt:
        context_length = self._limits.context_length
        for name in CHAT:
            if isinstance(fields.get(name), str):
                check_text_length(name, fields.get(name), self._tokenizer, context_length, JSON_BYTES)
        text = render_json_chat(self._tokenizer, **{name: fields.get(name) for name in CHAT})
        check_text_length("messages", text, self._tokenizer, context_length)
        input_ids = self._tokenizer.encode(text, add_special_tokens=False)
        check_prompt_length("messages", len(input_ids), context_length)
        return Prompt(input_ids, text)

    def _check_ids(self, fields: Fields, input_ids: list[int]) -> None:
        length = fields.get("input_length", len(input_ids))
        if length != len(input_ids):
            raise InvalidRequest("input_lengths", f"is {length}, but input_ids has {len(input_ids)}")
        vocab_size = self._limits.vocab_size
        if not all(0 <= token < vocab_size for token in input_ids):
            raise InvalidRequest("input_ids", f"must lie between 0 and {vocab_size - 1}, the model's vocabulary")

    def _text(self, prompt: Prompt) -> str:
        return self._tokenizer.decode(prompt.input_ids) if prompt.text is None else prompt.text

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
        complete = complete_vllm if fields.get("sampling_parameters") else self._face.complete
        try:
            sampling = SamplingParams.from_dict(complete(params))
            sampling.check_vocabulary(self._limits.vocab_size, self._limits.eos_token_ids)
        except InvalidRequest as error:
            raise InvalidRequest(names.get(error.field, error.field), error.message) from None
        for name in ("custom_params", "stop", *GUIDES):
            check_packable(names.get(name, name), getattr(sampling, name))
        return sampling, names

    def _read_words(self, fields: Fields) -> Iterator[tuple[str, Any, str]]:
        """Sampling parameters from what TensorRT-LLM's clients send as text, as all below: name, value, their name."""
        stops = word_list(fields, "stop_word_ids")
        for word in stops:
            if len(word) > 1:
                raise Unsupported(fields.name("stop_word_ids"), f"has {word}, only single tokens; see stop_words")
        if stops:
            yield "stop_token_ids", [word[0] for word in stops], fields.name("stop_word_ids")
        if words := word_list(fields, "bad_word_ids"):
            yield "bad_words_ids", words, fields.name("bad_word_ids")
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
        if not (text := fields.get("sampling_parameters")):
            return
        given = _read_json("sampling_parameters", text)
        if not isinstance(given, dict):
            raise InvalidRequest("sampling_parameters", f"must be an object, got {given!r}")
        given = {name: loosely(name, value) for name, value in given.items()}
        for name, value in given.items():
            if name in self._face.parameter and self._face.parameter[name].sets is None and value is not None:
                check_neutral(self._face.parameter[name], [value])
        for name, own, value in in_our_words(with_token_ids(self._tokenizer, given)):
            yield own, value, "bad_words" if "bad_words" in given and own == "bad_words_ids" else name

    def _read_outputs(self, fields: Fields, params: SamplingParams, requested: Iterable[str]) -> frozenset[str]:
        """Outputs whose flag is set, and those requested by name: Triton fills in all names if a client requests none.

        Raises Unsupported for those that have no room for several answers in one response.
        """
        outputs = {name: self._face.output[name] for name in requested if self._face.output[name].asked_by}
        named = len(set(requested)) < len(self._face.output)
        flagged = {name: asked for name, spec in outputs.items() if (asked := _asked_by(spec, fields, params))}
        asked = frozenset(outputs if named else flagged)
        one_by_one = params.n == 1 or (fields.get("stream") and not self._face.side_by_side)
        for name in sorted(asked):
            if outputs[name].ragged and not one_by_one:
                asked_by = fields.name(flagged.get(name, name))
                room = "comes with n of 1 only" if self._face.side_by_side else "comes with stream only"
                raise Unsupported(asked_by, f"{name} of several answers {room}, response by response")
        return asked

    def _check_size(
        self, names: dict[str, str], params: SamplingParams, outputs: frozenset[str], prompt_length: int
    ) -> None:
        """Whether the one response would be one that others can wait for."""
        num_tokens = params.n * min(params.max_new_tokens, self._limits.context_length - prompt_length)
        if "logprobs" in outputs and params.logprobs is not None:
            check_count(names.get("logprobs", "logprobs"), num_tokens * (params.logprobs + 1), MOST_NUMBERS)
        if params.return_spec_trace:
            num_nodes = params.speculative_num_draft_tokens or self._limits.num_draft_tokens
            name, per_step = names.get("return_spec_trace", "spec_trace"), num_nodes if params.speculative else 1
            check_count(name, num_tokens * max(per_step, 1), MOST_NUMBERS)

    def _is_null(self, output: str, params: SamplingParams) -> bool:
        null = self._face.output[output].null
        return null is not None and getattr(params, null) is None

    def _with_needs(self, params: SamplingParams, outputs: frozenset[str]) -> SamplingParams:
        """Whoever asks for an output asks for what is in it; a trace that no output shows is not made."""
        needs = {self._face.output[name].needs for name in outputs} - {None}
        wanted = {name: 0 for name in needs if getattr(params, name) is None}
        if params.return_spec_trace != ("spec_trace" in outputs):
            wanted["return_spec_trace"] = not params.return_spec_trace
        return replace(params, **wanted) if wanted else params


def word_list(fields: Fields, meaning: str) -> list[list[int]]:
    """The words in a tensor WORD_LIST. Raises InvalidRequest, if their ends are not in order."""
    values = fields.get(meaning, [])
    ids, ends = values[: len(values) // 2], [end for end in values[len(values) // 2 :] if end != -1]
    words = [ids[start:end] for start, end in pairwise([0, *ends])]
    if not all(words) or sum(map(len, words)) != max(ends, default=0):
        raise InvalidRequest(fields.name(meaning), f"words must end behind each other within the {len(ids)} ids")
    return words


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
    check_text_length("text_input", text, tokenizer, context_length)
    if chat:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    input_ids = tokenizer.encode(text, add_special_tokens=not chat)  # the template brings its own
    check_prompt_length("text_input", len(input_ids), context_length)
    return input_ids


def check_text_length(name: str, text: str, tokenizer: Tokenizer, context_length: int, bytes_each: int = 1) -> None:
    """Whether the text could have few enough tokens, without counting them; bytes_each: how it is written for each."""
    try:
        size, most = len(text.encode()), context_length * tokenizer.max_token_bytes * bytes_each
    except UnicodeEncodeError:
        raise InvalidRequest(name, "holds half of a surrogate pair, which is no text") from None
    if size > most:
        raise InvalidRequest(name, f"has {size} bytes; context_length {context_length} holds at most {most}")


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


def _read_json(name: str, text: str, as_pairs: bool = False) -> Any:
    """As pairs objects become lists, so that a key that comes twice is seen."""
    if len(text) > LONGEST_JSON:
        raise InvalidRequest(name, f"has {len(text)} characters, at most {LONGEST_JSON} are served")
    try:
        return json.loads(text, object_pairs_hook=list if as_pairs else None)
    except (ValueError, RecursionError):  # no JSON, absurdly long numbers; absurdly deep lists
        raise InvalidRequest(name, f"must be a number or JSON, got {text!r}") from None


def check_prompt_logprobs(name: str, params: SamplingParams, prompt_length: int) -> None:
    if params.prompt_logprobs is not None:
        check_count(name, params.n * prompt_length * (params.prompt_logprobs + 1), MOST_PROMPT_LOGPROBS)


def check_count(name: str, count: int, most: int) -> None:
    if count > most:
        message = f"with this prompt and length these would be {count} numbers, at most {most} are served"
        raise InvalidRequest(name, message)


def check_packable(name: str, value: Any) -> None:
    """JSON has larger numbers and stranger text than messages to the engine."""
    try:
        msgpack.packb(value)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(name, f"cannot be sent to the engine: {error}") from None


def _asked_by(spec: Output, fields: Fields, params: SamplingParams) -> str | None:
    """The first of the output's meanings that the client has set."""
    by = (spec.asked_by,) if isinstance(spec.asked_by, str) else spec.asked_by
    return next((meaning for meaning in by if _asks(meaning, fields, params)), None)


def _asks(meaning: str, fields: Fields, params: SamplingParams) -> bool:
    if meaning in ("logprobs", "prompt_logprobs"):
        return getattr(params, meaning) is not None
    if meaning == "return_spec_trace":
        return params.return_spec_trace
    return meaning == ALWAYS or (params.n > 1 if meaning == "n" else bool(fields.get(meaning)))
