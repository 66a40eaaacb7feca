"""What a client may say about how its tokens are picked and shown. No torch: the Triton adapter imports this file."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import NamedTuple

from specbackend.config import TREE
from specbackend.errors import InvalidRequest

FLOAT32_MAX = 3.4e38  # the device's temperatures are float32
LARGEST_BIAS = 1e30  # in float32 it outweighs everything, and adding to it cannot overflow
SMALLEST_NORMAL = 1.2e-38  # of float32; what is smaller is 0 on some devices
UNLIMITED = 1 << 30  # max_new_tokens of a request that is bounded by the context length alone
MOST_BAD_WORDS, LONGEST_BAD_WORD = 256, 32  # every one is compared with the end of every path of the tree
MOST_STOPS = 64  # looked for after every token, in the thread that answers everybody
MOST_LOGPROBS = 20  # alternatives per token, as in vLLM
FLAGS = ("ignore_eos", "speculative", "include_stop_str_in_output", "skip_special_tokens", "return_spec_trace")
MOST_SEQUENCES = 64  # of one prompt
LONGEST_SALT = 1024  # characters

# Other names of the same, vLLM's first.
ALIASES = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "extra_args": "custom_params",
    "no_stop_trim": "include_stop_str_in_output",
    "sampling_seed": "seed",
    "extra_key": "cache_salt",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_grammar": "ebnf",
    "guided_choice": "choice",
}
# What vLLM (top_k, seed) or both (max_new_tokens) write for one of our values. None is the default everywhere else.
OTHER_VALUES = {"top_k": (0, -1), "seed": (-1, None), "max_new_tokens": (None, UNLIMITED)}
# SGLang's words for `logprobs` and `prompt_logprobs`, with what they are if nobody says them.
RETURN_LOGPROB = {"return_logprob": False, "top_logprobs_num": 0, "logprob_start_len": -1}
GUIDES = ("json_schema", "regex", "ebnf", "choice")
# vLLM's objects that hold a guide, by their new name and the old, and the keys in them.
GUIDE_OBJECTS = ("structured_outputs", "guided_decoding")
VLLM_GUIDES = {"json": "json_schema", "regex": "regex", "grammar": "ebnf", "choice": "choice"}
ANY_OBJECT = '{"type": "object"}'

# The other parameters of vLLM's and SGLang's clients: the values that change nothing (None is one always), which pass,
# and why all others are refused. README.md's table has them, too.
NOT_SERVED: dict[str, tuple[tuple, str]] = {
    # vLLM
    "best_of": ((1,), "is gone from vLLM, too: ask for n answers and choose"),
    "flat_logprobs": ((False,), "is a Python class of vLLM's"),
    "prompt_logprob_token_ids": (([],), "logprobs are of the likeliest tokens"),
    "prompt_logprob_start": ((0,), "logprobs are of the whole prompt"),
    "logprob_token_ids": (([],), "logprobs are of the likeliest tokens"),
    "detokenize": ((True,), "answers are text"),
    "spaces_between_special_tokens": ((True,), "is the tokenizer's own affair"),
    "output_kind": ((), "is what stream says"),
    "stream_interval": ((), "is a parameter of the server"),
    "skip_clone": ((False,), "is internal to vLLM"),
    "logits_processors": (([],), "only the server's own run here, see custom_params"),
    "truncate_prompt_tokens": ((-1,), "a prompt is used whole"),
    "skip_reading_prefix_cache": ((False,), "the cache is the server's, see disable_radix_cache"),
    "thinking_token_budget": ((-1,), "nothing here knows what is thought"),
    "repetition_detection": (({},), "see frequency_penalty"),
    "routed_experts_prompt_start": ((0,), "there are no experts"),
    "trace_decode_token_ids": (([],), "tokens are the model's own"),
    # SGLang
    "stop_regex": (("", []), "stop strings are literal"),
    "structural_tag": ((), "see json_schema, regex and ebnf"),
    "token_ids_logprob": (([],), "logprobs are of the likeliest tokens"),
    "custom_logit_processor": ((), "code from clients does not run here, see custom_params"),
    "return_hidden_states": ((False,), "what is returned is tokens and their logprobs"),
    "return_routed_experts": ((False,), "there are no experts"),
    "return_entropy": ((False,), "what is returned is tokens and their logprobs"),
    "require_reasoning": ((False,), "nothing here knows what is thought"),
    "lora_path": ((), "there are no adapters"),
    "session_params": (({},), "prefixes are cached without"),
    "input_embeds": ((), "prompts are text or token ids"),
    "image_data": (([],), "prompts are text or token ids"),
    "video_data": (([],), "prompts are text or token ids"),
    "audio_data": (([],), "prompts are text or token ids"),
}
LONGEST_GUIDE = {"json_schema": 1 << 16, "regex": 1 << 13, "ebnf": 1 << 13, "choice": 1 << 16}  # bytes
MOST_CHOICES = 1024
NO_TOKEN_LEFT = "there may be no token left to pick"
NOT_WITH_GUIDES = {
    "allowed_token_ids": NO_TOKEN_LEFT,
    "bad_words_ids": NO_TOKEN_LEFT,
    "min_new_tokens": NO_TOKEN_LEFT,
    "ignore_eos": "the text ends where it is complete",
}


class Guide(NamedTuple):
    """What the text as a whole must be."""

    kind: str  # one of GUIDES
    text: str  # of a choice: a JSON list


@dataclass(frozen=True)
class SamplingParams:
    """How to pick tokens, under SGLang's names. Every value is applied exactly; what cannot be is refused by name.

    `specbackend.sampling` says in what order. Lists are tuples here, so that the whole can be hashed; `from_dict` takes
    what users write.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0 is greedy
    seed: int | None = None  # None: the engine draws one
    stop: tuple[str, ...] = ()  # strings; matched on text, outside the engine's step
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1  # answers to the prompt, each with a seed of its own
    # speculation
    speculative: bool = True  # False: plain decoding for this request, whatever the server does
    speculative_num_steps: int | None = None  # None: the server's; no more than that, as the next two
    speculative_eagle_topk: int | None = None
    speculative_num_draft_tokens: int | None = None
    # who runs when, on what is cached; it changes no token
    priority: int = 0  # served with enable_priority_scheduling only
    cache_salt: str | None = None  # the prefix cache is shared with requests of the same salt only
    # which tokens may be picked, in place of those that are less likely
    top_k: int = -1  # -1: all
    top_p: float = 1.0
    min_p: float = 0.0  # relative to the best token
    # what was said before counts
    repetition_penalty: float = 1.0  # tokens of prompt and output
    frequency_penalty: float = 0.0  # tokens of the output, each time
    presence_penalty: float = 0.0  # tokens of the output, once
    min_new_tokens: int = 0  # until then, no eos (ignore_eos or not) and none of stop_token_ids
    # tokens by name
    logit_bias: tuple[tuple[int, float], ...] = ()  # {id: bias} in from_dict
    allowed_token_ids: tuple[int, ...] = ()  # (): all
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # token sequences that prompt and output never complete
    # what the text as a whole must be; at most one of them
    json_schema: str | None = None  # JSON text that is valid by this schema
    regex: str | None = None  # matched by all of the text
    ebnf: str | None = None  # derived from `root` of this grammar
    choice: tuple[str, ...] = ()  # one of these
    # for the server's own logits processors
    custom_params: dict | None = field(default=None, hash=False)
    # what is told of the tokens
    logprobs: int | None = None  # of each token picked, and of so many alternatives; None: nothing
    prompt_logprobs: int | None = None  # the same of the prompt's tokens
    return_spec_trace: bool = False  # how each step came by its tokens, see `spec_trace`
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True  # in the text

    def __post_init__(self) -> None:
        _require_int("max_new_tokens", self.max_new_tokens, low=1, high=UNLIMITED)
        _require_number("temperature", self.temperature)
        if not 0 <= self.temperature <= FLOAT32_MAX:  # false for nan too
            raise InvalidRequest("temperature", f"must be finite and at least 0, got {self.temperature}")
        if self.seed is not None:
            _require_int("seed", self.seed, low=0, high=(1 << 64) - 1)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InvalidRequest("stop", "must be non-empty strings")
        if len(self.stop) > MOST_STOPS:
            raise InvalidRequest("stop", f"has {len(self.stop)} strings, at most {MOST_STOPS} are served")
        _require_int("n", self.n, low=1, high=MOST_SEQUENCES)
        for name in TREE:
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name), low=1, high=UNLIMITED)
        _require_int("priority", self.priority, low=-UNLIMITED, high=UNLIMITED)
        if self.cache_salt is not None:
            _require_text("cache_salt", self.cache_salt)
            if not 0 < len(self.cache_salt) <= LONGEST_SALT:
                raise InvalidRequest("cache_salt", f"must have 1 to {LONGEST_SALT} characters")
        for flag in FLAGS:
            _require_bool(flag, getattr(self, flag))
        self._check_filters()
        self._check_penalties()
        self._check_tokens()
        self._check_logprobs()
        if not isinstance(self.custom_params, dict | None):
            raise InvalidRequest("custom_params", f"must be an object, got {self.custom_params!r}")
        self._check_guide()

    @property
    def guide(self) -> Guide | None:
        for kind in GUIDES:
            value = getattr(self, kind)
            if value or isinstance(value, str):
                return Guide(kind, value if isinstance(value, str) else json.dumps(value))
        return None

    def _check_guide(self) -> None:
        for kind in ("json_schema", "regex", "ebnf"):
            if getattr(self, kind) is not None:
                _require_text(kind, getattr(self, kind))
        for text in self.choice:
            _require_text("choice", text)
        if len(self.choice) > MOST_CHOICES:
            raise InvalidRequest("choice", f"has {len(self.choice)} strings, at most {MOST_CHOICES} are served")
        if self.guide is None:
            return
        kind, text = self.guide
        others = [name for name in GUIDES if name != kind and getattr(self, name) not in (None, ())]
        if others:
            raise InvalidRequest(others[0], f"cannot be combined with {kind}: only one of {', '.join(GUIDES)}")
        if len(text.encode()) > LONGEST_GUIDE[kind]:
            message = f"has {len(text.encode())} bytes, at most {LONGEST_GUIDE[kind]} are served"
            raise InvalidRequest(kind, message)
        for name, why in NOT_WITH_GUIDES.items():
            if getattr(self, name):
                raise InvalidRequest(name, f"cannot be combined with {kind}: {why}")

    def _check_logprobs(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name), low=0, high=MOST_LOGPROBS)

    def _check_filters(self) -> None:
        if self.top_k != -1 or isinstance(self.top_k, bool):
            _require_int("top_k", self.top_k, low=1, high=UNLIMITED, otherwise=" or -1")
        _require_number("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise InvalidRequest("top_p", f"must be above 0 and at most 1, got {self.top_p}")
        _require_between("min_p", self.min_p, 0, 1)

    def _check_penalties(self) -> None:
        _require_number("repetition_penalty", self.repetition_penalty)
        if not SMALLEST_NORMAL <= self.repetition_penalty <= 2:
            raise InvalidRequest("repetition_penalty", f"must be above 0 and at most 2, got {self.repetition_penalty}")
        _require_between("frequency_penalty", self.frequency_penalty, -2, 2)
        _require_between("presence_penalty", self.presence_penalty, -2, 2)
        _require_int("min_new_tokens", self.min_new_tokens, low=0, high=UNLIMITED)
        if self.min_new_tokens > self.max_new_tokens:
            message = f"must be at most max_new_tokens, {self.max_new_tokens}, got {self.min_new_tokens}"
            raise InvalidRequest("min_new_tokens", message)

    def _check_tokens(self) -> None:
        for name in ("stop_token_ids", "allowed_token_ids"):
            for token in getattr(self, name):
                _require_id(name, token)
        for token, bias in self.logit_bias:
            _require_id("logit_bias", token)
            _require_between("logit_bias", bias, -LARGEST_BIAS, LARGEST_BIAS)
        if len(self.bad_words_ids) > MOST_BAD_WORDS:
            message = f"has {len(self.bad_words_ids)} sequences, at most {MOST_BAD_WORDS} are served"
            raise InvalidRequest("bad_words_ids", message)
        for word in self.bad_words_ids:
            if not 1 <= len(word) <= LONGEST_BAD_WORD:
                message = f"each sequence must have 1 to {LONGEST_BAD_WORD} tokens, got {len(word)}"
                raise InvalidRequest("bad_words_ids", message)
            for token in word:
                _require_id("bad_words_ids", token)

    def check_vocabulary(self, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        """What can only be said beside a checkpoint. Raises InvalidRequest, naming the field."""
        ids = {
            "logit_bias": (token for token, _ in self.logit_bias),
            "allowed_token_ids": self.allowed_token_ids,
            "bad_words_ids": chain.from_iterable(self.bad_words_ids),
        }
        for name, tokens in ids.items():
            for token in tokens:
                if token >= vocab_size:
                    raise InvalidRequest(name, f"{token} is not an id of the vocabulary of {vocab_size}")
        # the only parameters that take tokens away whatever their logits: together they must leave one
        banned = {word[-1] for word in self.bad_words_ids}
        if self.min_new_tokens:
            banned |= {*self.stop_token_ids, *eos_token_ids}
        if not all(token in banned for token in self.allowed_token_ids or range(vocab_size)):
            return
        name = next(n for n in ("allowed_token_ids", "bad_words_ids", "min_new_tokens") if getattr(self, n))
        raise InvalidRequest(name, "with bad_words_ids and min_new_tokens there may be no token left to pick")

    def of_answer(self, index: int) -> "SamplingParams":
        """What the engine is asked for the answer of this index: one answer, with a seed of its own."""
        if self.n == 1:
            return self
        return replace(self, n=1, seed=None if self.seed is None else (self.seed + index) % (1 << 64))

    @classmethod
    def from_dict(cls, params: dict) -> "SamplingParams":
        """Build from user input, lists become tuples. What is refused has the name that the user gave it."""
        values, names = {}, {}
        for name, own, value in in_our_words(params):
            if own in values and values[own] != value:
                raise InvalidRequest(name, f"contradicts {names[own]}, which is the same")
            values[own], names[own] = value, name
        try:
            return cls(**_as_tuples(values))
        except InvalidRequest as error:
            raise InvalidRequest(names.get(error.field, error.field), error.message) from None


KNOWN = frozenset(each.name for each in fields(SamplingParams))


def in_our_words(params: dict) -> Iterator[tuple[str, str, object]]:
    """Each parameter that says something: the user's name, ours, and the value. Raises InvalidRequest for the rest."""
    for name, value in params.items():
        own = ALIASES.get(name, name)
        if own in NOT_SERVED:
            check_neutral(name, value)
        elif own in RETURN_LOGPROB:
            continue
        elif own in GUIDE_OBJECTS:
            yield from _guide_in_our_words(name, value)
        elif own not in KNOWN:
            supported = ", ".join(sorted(KNOWN))
            raise InvalidRequest(name, f"is not a supported sampling parameter (supported: {supported})")
        elif own in OTHER_VALUES and (type(value), value) == (type(OTHER_VALUES[own][0]), OTHER_VALUES[own][0]):
            yield name, own, OTHER_VALUES[own][1]
        elif value is not None:
            yield name, own, value
    yield from _logprobs_in_our_words(params)


def check_neutral(name: str, value: object) -> None:
    """Raises InvalidRequest if a parameter that is not ours would change something."""
    neutral, why = NOT_SERVED.get(name, ((), "it is unknown"))
    if value is not None and value not in neutral:
        raise InvalidRequest(name, f"is not supported: {why}")


def _guide_in_our_words(name: str, value: object) -> Iterator[tuple[str, str, object]]:
    if not isinstance(value, dict | None):
        raise InvalidRequest(name, f"must be an object, got {value!r}")
    for key, guide in (value or {}).items():
        if key in VLLM_GUIDES and guide is not None:
            yield name, VLLM_GUIDES[key], guide
        elif key == "json_object" and guide is True:
            yield name, "json_schema", ANY_OBJECT
        elif guide not in (None, False):
            raise InvalidRequest(name, f"{key} is not supported (supported: {', '.join(VLLM_GUIDES)}, json_object)")


def _logprobs_in_our_words(params: dict) -> Iterator[tuple[str, str, object]]:
    asked, top, start = (
        default if params.get(name) is None else params[name] for name, default in RETURN_LOGPROB.items()
    )
    _require_bool("return_logprob", asked)
    if start not in (-1, 0) or isinstance(start, bool):
        raise InvalidRequest("logprob_start_len", f"must be -1 (the answer) or 0 (the prompt, too), got {start!r}")
    for name, value in (("top_logprobs_num", top), ("logprob_start_len", start)):
        if not asked and value != RETURN_LOGPROB[name]:
            raise InvalidRequest(name, "says nothing without return_logprob")
    if asked:
        name = "top_logprobs_num" if "top_logprobs_num" in params else "return_logprob"
        yield name, "logprobs", top
        if start == 0:
            yield name, "prompt_logprobs", top


def _as_tuples(values: dict) -> dict:
    values = dict(values)
    for name in ("stop", "stop_token_ids", "allowed_token_ids", "choice"):
        if name in values:
            value = values[name]
            values[name] = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if isinstance(values.get("json_schema"), dict):
        values["json_schema"] = _json_text("json_schema", values["json_schema"])
    if "logit_bias" in values:
        values["logit_bias"] = _bias_pairs(values["logit_bias"])
    if "bad_words_ids" in values:
        values["bad_words_ids"] = _sequences("bad_words_ids", values["bad_words_ids"])
    return values


def _json_text(name: str, value: dict) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (RecursionError, TypeError, ValueError) as error:
        raise InvalidRequest(name, f"is no JSON: {error}") from error


def _bias_pairs(value: object) -> tuple[tuple[int, float], ...]:
    """{id: bias}, where JSON makes a string of the id, or pairs of the two."""
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        raise InvalidRequest("logit_bias", f"must map token ids to numbers, got {value!r}")
    pairs = tuple((_whole_number(token), bias) for token, bias in pairs)
    repeated = [token for token, count in Counter(str(token) for token, _ in pairs).items() if count > 1]
    if repeated:
        raise InvalidRequest("logit_bias", f"names token {repeated[0]} twice")
    return pairs


def _whole_number(key: object) -> object:
    """The integer that a key of JSON stands for; anything else is left for validation to name."""
    return int(key) if isinstance(key, str) and len(key) < 20 and key.isascii() and key.isdecimal() else key


def _sequences(name: str, value: object) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(word, (list, tuple)) for word in value):
        raise InvalidRequest(name, f"must be lists of token ids, got {value!r}")
    return tuple(tuple(word) for word in value)


def _require_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidRequest(name, f"must be a bool, got {value!r}")


def _require_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidRequest(name, f"must be a string, got {value!r}")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise InvalidRequest(name, "holds half of a surrogate pair, which is no text")


def _require_int(name: str, value: object, low: int, high: int, otherwise: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(name, f"must be an integer, got {value!r}")
    if not low <= value <= high:
        raise InvalidRequest(name, f"must be between {low} and {high}{otherwise}, got {value}")


def _require_id(name: str, value: object) -> None:
    _require_int(name, value, low=0, high=UNLIMITED)


def _require_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequest(name, f"must be a number, got {value!r}")


def _require_between(name: str, value: object, low: float, high: float) -> None:
    _require_number(name, value)
    if not low <= value <= high:  # false for nan too
        raise InvalidRequest(name, f"must be between {low:g} and {high:g}, got {value}")
