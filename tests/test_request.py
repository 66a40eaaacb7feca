"""What a client may ask for, and that every refusal names the field."""

import math
import pickle

import pytest

from specbackend.errors import InvalidRequest
from specbackend.request import FinishReason, Request, Update
from specbackend.sampling_params import LONGEST_BAD_WORD, MOST_BAD_WORDS, UNLIMITED, SamplingParams

REFUSED = [
    ("max_new_tokens", 0),
    ("max_new_tokens", -1),
    ("max_new_tokens", 1.0),
    ("max_new_tokens", "8"),
    ("max_new_tokens", True),
    ("max_new_tokens", None),
    ("max_new_tokens", UNLIMITED + 1),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", 10**400),
    ("temperature", 1e39),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", None),
    ("seed", -1),
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
    ("speculative", None),
    ("top_k", 0),
    ("top_k", -2),
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
    ("presence_penalty", None),
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
    ({"structured_outputs": "json"}, "structured_outputs: must be a dict"),
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


def test_requests_of_equal_content_are_different_requests():
    assert Request("a", [1]) != Request("a", [1])


def test_request_counts_prompt_and_output():
    request = Request("a", [1, 2], output_ids=[3])
    assert (request.num_tokens, request.all_ids) == (3, [1, 2, 3])


def test_text_array_follows_the_output():
    request = Request("a", [1, 2])
    assert list(request.text_array()) == [1, 2]
    for more in ([3], [], [4, 5]):
        request.output_ids += more
        assert list(request.text_array()) == request.all_ids
    assert list(Request("b", [1, 2], output_ids=[3]).text_array()) == [1, 2, 3]


def test_update_is_finished_when_it_says_why():
    assert not Update("a", [1]).finished
    assert Update("a", [1], FinishReason.STOP).finished
