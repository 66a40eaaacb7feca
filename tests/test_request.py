"""What a client may ask for, and that every refusal names the field."""

import math
import pickle

import pytest

from specbackend.errors import InvalidRequest
from specbackend.request import UNLIMITED, FinishReason, Request, SamplingParams, Update

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
    ("top_p", 0.9),
    ("nonsense", 1),
]


@pytest.mark.parametrize("name, value", REFUSED, ids=[f"{name}={str(value)[:10]}" for name, value in REFUSED])
def test_refusals_name_the_field(name, value):
    with pytest.raises(InvalidRequest, match=rf"^{name}: ") as refusal:
        SamplingParams.from_dict({name: value})
    assert refusal.value.field == name


def test_refusal_of_an_unknown_name_lists_the_known():
    with pytest.raises(InvalidRequest, match=r"max_new_tokens.*temperature"):
        SamplingParams.from_dict({"top_k": 3})


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
]


@pytest.mark.parametrize("name, given, kept", ACCEPTED, ids=[f"{name}={given}" for name, given, _ in ACCEPTED])
def test_accepted(name, given, kept):
    params = SamplingParams.from_dict({name: given})
    assert getattr(params, name) == kept
    assert hash(params) == hash(SamplingParams.from_dict({name: given}))


def test_requests_of_equal_content_are_different_requests():
    assert Request("a", [1]) != Request("a", [1])


def test_request_counts_prompt_and_output():
    request = Request("a", [1, 2], output_ids=[3])
    assert (request.num_tokens, request.all_ids) == (3, [1, 2, 3])


def test_update_is_finished_when_it_says_why():
    assert not Update("a", [1]).finished
    assert Update("a", [1], FinishReason.STOP).finished
