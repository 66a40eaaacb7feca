"""What a client may ask for, and that every refusal names the field."""

import inspect
import math
import pickle
import re
from dataclasses import fields
from pathlib import Path

import pytest

from specbackend.errors import InvalidRequest
from specbackend.sampling_params import (
    ALIASES,
    GUIDE_OBJECTS,
    LONGEST_BAD_WORD,
    MOST_BAD_WORDS,
    MOST_SEQUENCES,
    NOT_SERVED,
    OTHER_VALUES,
    RETURN_LOGPROB,
    UNLIMITED,
    SamplingParams,
)
from specbackend.tokenizer import Tokenizer
from specbackend.words import with_token_ids
from tests.fakes import save_byte_checkpoint

REFUSED = [
    ("max_new_tokens", 0),
    ("max_new_tokens", -1),
    ("max_new_tokens", 1.0),
    ("max_new_tokens", "8"),
    ("max_new_tokens", True),
    ("max_new_tokens", UNLIMITED + 1),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", 10**400),
    ("temperature", 1e39),
    ("temperature", "hot"),
    ("temperature", True),
    ("seed", -2),
    ("seed", -1.0),
    ("seed", 1 << 64),
    ("seed", 1.5),
    ("seed", False),
    ("stop", ""),
    ("stop", ["end", ""]),
    ("stop", [3]),
    ("stop", 3),
    ("stop", 3.5),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", ["2"]),
    ("stop_token_ids", "2"),
    ("stop_token_ids", True),
    ("stop_token_ids", 2.5),
    ("ignore_eos", 1),
    ("ignore_eos", "true"),
    ("top_k", -2),
    ("top_k", False),
    ("top_k", 0.0),
    ("top_k", 5.0),
    ("top_k", True),
    ("top_k", UNLIMITED + 1),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("top_p", "0.9"),
    ("top_p", True),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("min_p", math.nan),
    ("min_p", False),
    ("repetition_penalty", 0),
    ("repetition_penalty", 1e-45),
    ("repetition_penalty", 2.1),
    ("repetition_penalty", math.nan),
    ("repetition_penalty", True),
    ("presence_penalty", -2.1),
    ("presence_penalty", math.inf),
    ("frequency_penalty", 2.1),
    ("frequency_penalty", math.nan),
    ("frequency_penalty", "1"),
    ("min_new_tokens", -1),
    ("min_new_tokens", 129),  # max_new_tokens is 128
    ("min_new_tokens", 1.5),
    ("min_new_tokens", True),
    ("logit_bias", {"x": 1.0}),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {"1.0": 1.0}),
    ("logit_bias", {True: 1.0}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", {1: -math.inf}),
    ("logit_bias", {1: 1e31}),
    ("logit_bias", {1: True}),
    ("logit_bias", {1: "2"}),
    ("logit_bias", {1: 1.0, "1": 2.0}),
    ("logit_bias", [1, 2]),
    ("logit_bias", "x"),
    ("logit_bias", 5),
    ("allowed_token_ids", [-1]),
    ("allowed_token_ids", ["2"]),
    ("allowed_token_ids", [1.0]),
    ("allowed_token_ids", [True]),
    ("bad_words_ids", [1, 2]),
    ("bad_words_ids", 3),
    ("bad_words_ids", "word"),
    ("bad_words_ids", [[]]),
    ("bad_words_ids", [[1], [-1]]),
    ("bad_words_ids", [[1, "2"]]),
    ("bad_words_ids", [[True]]),
    ("bad_words_ids", [[1] * (LONGEST_BAD_WORD + 1)]),
    ("bad_words_ids", [[1]] * (MOST_BAD_WORDS + 1)),
    ("priority", "high"),
    ("priority", 1.5),
    ("cache_salt", ""),
    ("cache_salt", 7),
    ("cache_salt", "x" * 1025),
    ("cache_salt", "\ud800"),
    ("n", 0),
    ("n", True),
    ("n", 1.0),
    ("n", MOST_SEQUENCES + 1),
    ("include_stop_str_in_output", 1),
    ("no_stop_trim", "yes"),
    ("skip_special_tokens", 0),
    ("custom_params", [1]),
    ("extra_args", "x"),
    ("max_tokens", 0),
    ("min_tokens", 129),
    ("sampling_seed", -2),
    ("logprobs", -1),
    ("logprobs", True),
    ("prompt_logprobs", 21),
    ("return_logprob", 1),
    ("top_logprobs_num", 1),  # without return_logprob
    ("logprob_start_len", 0),
    ("logprob_start_len", 5),
    ("structured_outputs", "{}"),
    ("structured_outputs", {"structural_tag": "x"}),
    ("guided_decoding", {"backend": "outlines"}),
    ("nonsense", 1),
]


@pytest.mark.parametrize("name, value", REFUSED, ids=[f"{name}={str(value)[:10]}" for name, value in REFUSED])
def test_refusals_name_the_field(name, value):
    with pytest.raises(InvalidRequest, match=rf"^{name}: ") as refusal:
        SamplingParams.from_dict({name: value})
    assert refusal.value.field == name


def test_refusal_of_an_unknown_name_lists_the_known():
    with pytest.raises(InvalidRequest, match=r"max_new_tokens.*temperature"):
        SamplingParams.from_dict({"length_penalty": 3})


OUTSIDE_OF_TEN = [
    ("logit_bias", {"10": 1.0}, "10 is not an id of the vocabulary of 10"),
    ("allowed_token_ids", [3, 10], "10 is not an id"),
    ("bad_words_ids", [[3, 10, 3]], "10 is not an id"),
]


@pytest.mark.parametrize("name, value, message", OUTSIDE_OF_TEN, ids=[name for name, *_ in OUTSIDE_OF_TEN])
def test_ids_outside_the_vocabulary_are_refused(name, value, message):
    with pytest.raises(InvalidRequest, match=f"^{name}: {message}"):
        SamplingParams.from_dict({name: value}).check_vocabulary(10, ())


LEAVES_NOTHING = [
    ("allowed_token_ids", {"allowed_token_ids": [3, 4], "bad_words_ids": [[3], [1, 4]]}),
    ("allowed_token_ids", {"allowed_token_ids": [2], "min_new_tokens": 1}),
    ("allowed_token_ids", {"allowed_token_ids": [5, 2], "min_new_tokens": 1, "stop_token_ids": [5]}),
    ("bad_words_ids", {"bad_words_ids": [[token] for token in range(10)]}),
    ("min_new_tokens", {"min_new_tokens": 1, "stop_token_ids": list(range(10))}),
]


@pytest.mark.parametrize("name, params", LEAVES_NOTHING, ids=[str(params)[:40] for _, params in LEAVES_NOTHING])
def test_params_that_may_leave_no_token_are_refused(name, params):
    with pytest.raises(InvalidRequest, match=f"^{name}: .*no token left"):
        SamplingParams.from_dict(params).check_vocabulary(10, (2,))


def test_params_that_always_leave_a_token_pass():
    for params in (
        {"allowed_token_ids": [3, 4, 6], "bad_words_ids": [[3], [1, 4]]},
        {"allowed_token_ids": [2]},
        {"allowed_token_ids": [5, 2], "min_new_tokens": 1},
        {"bad_words_ids": [[token] for token in range(9)]},
        {"logit_bias": {9: -1e30}, "stop_token_ids": [10_000]},
    ):
        SamplingParams.from_dict(params).check_vocabulary(10, (2,))


def test_refusals_cross_process_borders_whole():
    copy = pickle.loads(pickle.dumps(InvalidRequest("seed", "must be an integer")))
    assert (copy.field, copy.message, str(copy)) == ("seed", "must be an integer", "seed: must be an integer")


ACCEPTED = [
    ("temperature", 0, 0),
    ("temperature", 0.7, 0.7),
    ("seed", (1 << 64) - 1, (1 << 64) - 1),
    ("seed", None, None),
    ("seed", -1, None),  # vLLM's
    ("max_new_tokens", None, UNLIMITED),
    ("temperature", None, 1.0),
    ("speculative", None, True),
    ("top_k", 0, -1),  # vLLM's
    ("stop", "end", ("end",)),
    ("stop", ["a", "b"], ("a", "b")),
    ("stop", None, ()),
    ("stop_token_ids", 5, (5,)),
    ("stop_token_ids", [5, 6], (5, 6)),
    ("stop_token_ids", None, ()),
    ("max_new_tokens", UNLIMITED, UNLIMITED),
    ("speculative", False, False),
    ("top_k", -1, -1),
    ("top_k", 1, 1),
    ("top_p", 1, 1),
    ("min_p", 1, 1),
    ("repetition_penalty", 2, 2),
    ("presence_penalty", -2, -2),
    ("min_new_tokens", 128, 128),
    ("logit_bias", {"5": -100, 6: 0.5}, ((5, -100), (6, 0.5))),
    ("logit_bias", [[5, -100]], ((5, -100),)),  # as it comes out of msgpack
    ("logit_bias", None, ()),
    ("allowed_token_ids", [5, 6], (5, 6)),
    ("allowed_token_ids", None, ()),
    ("bad_words_ids", [[5, 6], [7]], ((5, 6), (7,))),
    ("bad_words_ids", None, ()),
]


@pytest.mark.parametrize("name, given, kept", ACCEPTED, ids=[f"{name}={given}" for name, given, _ in ACCEPTED])
def test_accepted(name, given, kept):
    params = SamplingParams.from_dict({name: given})
    assert getattr(params, name) == kept
    assert hash(params) == hash(SamplingParams.from_dict({name: given}))


# ---- other names of the same

SAME = [
    ({"max_tokens": 5}, {"max_new_tokens": 5}),
    ({"max_tokens": 5, "max_new_tokens": 5}, {"max_new_tokens": 5}),
    ({"max_tokens": None}, {"max_new_tokens": UNLIMITED}),
    ({"return_logprob": False, "top_logprobs_num": 0, "logprob_start_len": -1}, {}),
    ({"return_logprob": True}, {"logprobs": 0}),
    ({"return_logprob": True, "top_logprobs_num": 3}, {"logprobs": 3}),
    ({"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 3}, {"logprobs": 3, "prompt_logprobs": 3}),
    ({"structured_outputs": {"json": {"type": "object"}, "regex": None}}, {"json_schema": '{"type": "object"}'}),
    ({"structured_outputs": {"json": "{}", "json_object": False}}, {"json_schema": "{}"}),
    ({"structured_outputs": {"json_object": True}}, {"json_schema": '{"type": "object"}'}),
    ({"guided_decoding": {"grammar": "root ::= a"}}, {"ebnf": "root ::= a"}),
    ({"guided_decoding": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
]


@pytest.mark.parametrize("theirs, ours", SAME, ids=[str(theirs)[:60] for theirs, _ in SAME])
def test_other_words_for_the_same(theirs, ours):
    assert SamplingParams.from_dict(theirs) == SamplingParams.from_dict(ours)


CONTRADICTIONS = [
    ({"max_new_tokens": 6, "max_tokens": 5}, "max_tokens: contradicts max_new_tokens"),
    ({"logprobs": 2, "return_logprob": True}, "return_logprob: contradicts logprobs"),
    ({"regex": "a", "structured_outputs": {"regex": "b"}}, "structured_outputs: contradicts regex"),
]


@pytest.mark.parametrize("params, message", CONTRADICTIONS, ids=[message for _, message in CONTRADICTIONS])
def test_contradictions_are_refused(params, message):
    with pytest.raises(InvalidRequest, match=f"^{message}"):
        SamplingParams.from_dict(params)


def test_each_answer_has_a_seed_of_its_own():
    params = SamplingParams(n=3, seed=(1 << 64) - 2, temperature=0.5)
    assert [params.of_answer(i).seed for i in range(3)] == [(1 << 64) - 2, (1 << 64) - 1, 0]
    assert params.of_answer(0) == SamplingParams(seed=(1 << 64) - 2, temperature=0.5)
    assert SamplingParams(n=3).of_answer(2) == SamplingParams()


# ---- README.md's table

# Where a parameter needs others beside it, or its type does not say what would change something.
EXAMPLES = {
    "priority": -3,
    "cache_salt": "x",
    "extra_key": "x",
    "n": 3,
    "temperature": 0.3,
    "top_p": 0.3,
    "min_p": 0.3,
    "top_k": 3,
    "stop": "x",
    "stop_token_ids": [3],
    "logit_bias": {"3": 1.5},
    "allowed_token_ids": [3],
    "bad_words": ["x"],
    "bad_words_ids": [[3]],
    "logprobs": 3,
    "prompt_logprobs": 3,
    "return_logprob": True,
    "json_schema": "{}",
    "regex": "a",
    "ebnf": "root ::= a",
    "choice": ["a"],
    "structured_outputs": {"regex": "a"},
    "guided_decoding": {"regex": "a"},
    "guided_json": {"type": "null"},
    "guided_regex": "a",
    "guided_grammar": 'root ::= "a"',
    "guided_choice": ["a"],
    "custom_params": {"a": 1},
    "extra_args": {"a": 1},
    "speculative": False,
    "skip_special_tokens": False,
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "no_stop_trim": True,
    "return_spec_trace": True,
    "top_logprobs_num": 3,
    "logprob_start_len": 0,
    **dict.fromkeys(("repetition_penalty", "frequency_penalty", "presence_penalty"), 1.5),
    **dict.fromkeys(("seed", "sampling_seed", "max_tokens", "min_tokens", "max_new_tokens", "min_new_tokens"), 3),
    **dict.fromkeys(("speculative_num_steps", "speculative_eagle_topk", "speculative_num_draft_tokens"), 3),
}
BESIDE = {"top_logprobs_num": {"return_logprob": True}, "logprob_start_len": {"return_logprob": True}}
ONLY_OFFLINE = ("return_text_in_logprobs",)  # an argument of Engine.generate
ONLY_WORDS = ("bad_words",)  # need a tokenizer


def read_table() -> dict[str, str]:
    """What README.md says of each parameter: applied, or refused."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    section = readme.split("### Every parameter of vLLM and SGLang")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {name: here.split()[0].strip(":;,") for names, _, here in rows for name in re.findall("`(.+?)`", names)}


TABLE = read_table()
APPLIED = [name for name, here in TABLE.items() if here == "applied" and name not in ONLY_OFFLINE]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer(save_byte_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def test_the_table_has_every_name():
    assert set(TABLE.values()) == {"applied", "refused"}
    own = {f.name for f in fields(SamplingParams)}
    applied = {*own, *ALIASES, *RETURN_LOGPROB, *GUIDE_OBJECTS, *ONLY_OFFLINE, *ONLY_WORDS}
    assert {name for name, here in TABLE.items() if here == "applied"} == applied
    assert {name for name, here in TABLE.items() if here == "refused"} == set(NOT_SERVED)
    assert set(OTHER_VALUES) <= own and set(ALIASES.values()) <= own


@pytest.mark.parametrize("name", APPLIED)
def test_what_the_table_calls_applied_is(tokenizer, name):
    beside = BESIDE.get(name, {})
    without = SamplingParams.from_dict(with_token_ids(tokenizer, beside))
    assert SamplingParams.from_dict(with_token_ids(tokenizer, {**beside, name: EXAMPLES[name]})) != without
    if name not in OTHER_VALUES and ALIASES.get(name) not in OTHER_VALUES:
        assert SamplingParams.from_dict(with_token_ids(tokenizer, {**beside, name: None})) == without


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_the_table_calls_refused_is(name):
    neutral, _ = NOT_SERVED[name]
    for value in (None, *neutral):
        assert SamplingParams.from_dict({name: value}) == SamplingParams()
    for value in ("something", 7, True, [7], {"a": 7}):
        if value not in neutral:
            with pytest.raises(InvalidRequest, match=f"^{name}: is not supported: ."):
                SamplingParams.from_dict({name: value})


def test_what_is_only_for_the_offline_engine_is_its_argument():
    from specbackend.engine import Engine

    assert set(ONLY_OFFLINE) | set(RETURN_LOGPROB) <= set(inspect.signature(Engine.generate).parameters)


GUIDES_AS_WRITTEN = [  # what users write, the field and its text
    ({"json_schema": '{"type": "null"}'}, "json_schema", '{"type": "null"}'),
    ({"json_schema": {"const": "é"}}, "json_schema", '{"const": "é"}'),
    ({"regex": ""}, "regex", ""),
    ({"ebnf": 'root ::= "a"'}, "ebnf", 'root ::= "a"'),
    ({"choice": ["a", "é"]}, "choice", '["a", "\\u00e9"]'),
    ({"choice": "a"}, "choice", '["a"]'),
    ({"structured_outputs": {"json": {"type": "null"}}}, "json_schema", '{"type": "null"}'),
    ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type": "object"}'),
    ({"structured_outputs": {"regex": "a+", "json_object": None, "disable_fallback": False}}, "regex", "a+"),
    ({"guided_decoding": {"grammar": 'root ::= "a"'}}, "ebnf", 'root ::= "a"'),
    ({"guided_decoding": {"choice": ["a"]}}, "choice", '["a"]'),
    ({"guided_json": {"type": "null"}}, "json_schema", '{"type": "null"}'),
    ({"guided_regex": "a+"}, "regex", "a+"),
    ({"guided_choice": ["a"]}, "choice", '["a"]'),
    ({"guided_grammar": 'root ::= "a"'}, "ebnf", 'root ::= "a"'),
]


@pytest.mark.parametrize("params, kind, text", GUIDES_AS_WRITTEN, ids=[str(each[0])[:50] for each in GUIDES_AS_WRITTEN])
def test_guides_have_many_names(params, kind, text):
    assert SamplingParams.from_dict(params).guide == (kind, text)


@pytest.mark.parametrize(
    "params",
    [{}, {"json_schema": None, "choice": None}, {"structured_outputs": None}, {"guided_decoding": {}}],
    ids=str,
)
def test_no_guide(params):
    assert SamplingParams.from_dict(params).guide is None


REFUSED_GUIDES = [
    ({"regex": 5}, "regex: must be a string, got 5"),
    ({"json_schema": [1]}, "json_schema: must be a string"),
    ({"json_schema": {"x": {1}}}, "json_schema: is no JSON"),
    ({"choice": ["a", 1]}, "choice: must be a string, got 1"),
    ({"ebnf": "\ud800"}, "ebnf: holds half of a surrogate pair"),
    ({"regex": "a", "choice": ["a"]}, "choice: cannot be combined with regex: only one of"),
    ({"regex": "a", "guided_json": "{}"}, "regex: cannot be combined with json_schema"),
    ({"regex": "a", "guided_regex": "b"}, "guided_regex: contradicts regex"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs: structural_tag is not supported"),
    ({"structured_outputs": "json"}, "structured_outputs: must be an object"),
    ({"regex": "é" * 5000}, "regex: has 10000 bytes, at most 8192 are served"),
    ({"ebnf": "a" * 10000}, "ebnf: has 10000 bytes, at most 8192"),
    ({"json_schema": " " * 70000}, "json_schema: has 70000 bytes, at most 65536"),
    ({"choice": ["a"] * 1025}, "choice: has 1025 strings, at most 1024"),
    ({"choice": ["a" * 70000]}, "choice: has 70004 bytes, at most 65536"),
    ({"regex": "a", "allowed_token_ids": [1]}, "allowed_token_ids: cannot be combined with regex: .* no token left"),
    ({"choice": ["a"], "bad_words_ids": [[1]]}, "bad_words_ids: cannot be combined with choice: .* no token left"),
    ({"regex": "a", "min_new_tokens": 1}, "min_new_tokens: cannot be combined with regex: .* no token left"),
    ({"ebnf": "a", "ignore_eos": True}, "ignore_eos: cannot be combined with ebnf: the text ends where"),
]


@pytest.mark.parametrize("params, message", REFUSED_GUIDES, ids=[str(each[0])[:50] for each in REFUSED_GUIDES])
def test_guides_that_are_refused(params, message):
    with pytest.raises(InvalidRequest, match=f"^{message}"):
        SamplingParams.from_dict(params)
