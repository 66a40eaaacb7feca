"""What Engine.generate makes of its arguments and the engine's updates, without an engine."""

import pytest

from specbackend.errors import InvalidRequest
from specbackend.offline import OfflineAnswer, Question, read_questions
from specbackend.request import Failure, FinishReason, Update
from specbackend.sampling_params import SamplingParams
from specbackend.tokenizer import Tokenizer
from tests.fakes import fake_logprobs, save_byte_checkpoint

A, B, C = (float(-token / 8) for token in (64, 65, 66))  # of the letters, as fake_logprobs has them


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer(save_byte_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture
def read(tokenizer):
    def read_one(params: dict | None = None, text: str = "abcab", **logprobs) -> Question:
        defaults = {"return_logprob": False, "top_logprobs_num": 0, "logprob_start_len": -1}
        [question] = read_questions(tokenizer, [tokenizer.encode(text)], params, **{**defaults, **logprobs})
        return question

    return read_one


def update(tokenizer: Tokenizer, text: str, question: Question, finish=FinishReason.LENGTH) -> Update:
    ids, params = tokenizer.encode(text), question.params
    of_prompt = fake_logprobs(question.input_ids[1:], params.prompt_logprobs)
    logprobs = fake_logprobs(ids, params.logprobs)
    return Update("generate-0", ids, finish, 5, len(ids), 0, 1, logprobs=logprobs, prompt_logprobs=of_prompt)


def answer(tokenizer: Tokenizer, question: Question, text: str, with_texts: bool = False) -> dict:
    growing = OfflineAnswer(0, question, tokenizer, with_texts)
    growing.take(update(tokenizer, text, question))
    return growing.to_dict()["meta_info"]


def test_the_letters_are_as_likely_as_the_constants_say(tokenizer):
    assert [each.logprob for each in fake_logprobs(tokenizer.encode("abc"), 0)] == [A, B, C]


def test_without_return_logprob_there_are_none(tokenizer, read):
    assert not [name for name in answer(tokenizer, read(), "ab") if "logprobs" in name]


def test_logprobs_of_the_answer(tokenizer, read):
    a, b = tokenizer.encode("ab")
    meta = answer(tokenizer, read(return_logprob=True), "ab")
    assert meta["output_token_logprobs"] == [(A, a, None), (B, b, None)]
    assert not {"output_top_logprobs", "input_token_logprobs", "input_top_logprobs"} & meta.keys()
    meta = answer(tokenizer, read({"logprobs": 2}), "b", with_texts=True)
    assert meta["output_token_logprobs"] == [(B, b, "b")]
    assert meta["output_top_logprobs"] == [[(A, a, "a"), (B, b, "b")]]


def test_logprobs_of_the_prompt(tokenizer, read):
    a, b, c = tokenizer.encode("abc")
    meta = answer(tokenizer, read(return_logprob=True, logprob_start_len=0, top_logprobs_num=1), "ab")
    assert meta["input_token_logprobs"] == [(None, a, None), (B, b, None), (C, c, None), (A, a, None), (B, b, None)]
    assert meta["input_top_logprobs"][:3] == [None, [(A, a, None)], [(B, b, None)]]
    assert meta["output_top_logprobs"][1] == [(A, a, None)]


def test_logprobs_of_the_prompts_end(tokenizer, read):
    a, b, _ = tokenizer.encode("abc")
    for question in (
        read(return_logprob=True, logprob_start_len=3),
        read({"return_logprob": True, "logprob_start_len": 3}),
    ):
        assert answer(tokenizer, question, "a")["input_token_logprobs"] == [(None, a, None), (B, b, None)]


def test_a_stop_string_cuts_the_logprobs_too(tokenizer, read):
    growing = OfflineAnswer(0, read({"logprobs": 0, "stop": "b"}), tokenizer, False)
    growing.take(update(tokenizer, "abc", growing.question, finish=None))
    assert growing.stopped
    assert [logprob for logprob, *_ in growing.to_dict()["meta_info"]["output_token_logprobs"]] == [A, B]


def test_one_value_is_for_all_prompts_and_a_list_for_each(tokenizer):
    prompts = [[1, 2], [3, 4]]
    one = read_questions(tokenizer, prompts, {"n": 2}, return_logprob=True)
    assert [question.params for question in one] == [SamplingParams(n=2, logprobs=0)] * 2
    each = read_questions(tokenizer, prompts, [{}, {"n": 2}], return_logprob=[True, False], top_logprobs_num=[3, 0])
    assert [question.params for question in each] == [SamplingParams(logprobs=3), SamplingParams(n=2)]


@pytest.mark.parametrize(
    ("logprobs", "name"),
    [
        ({"return_logprob": True, "top_logprobs_num": 21}, "top_logprobs_num"),
        ({"return_logprob": True, "logprob_start_len": 5}, "logprob_start_len"),
        ({"return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
        ({"top_logprobs_num": 2}, "top_logprobs_num"),
        ({"return_logprob": "yes"}, "return_logprob"),
    ],
    ids=str,
)
def test_refusals(read, logprobs, name):
    with pytest.raises(InvalidRequest, match=f"^{name}: "):
        read(**logprobs)


@pytest.mark.parametrize(
    ("params", "own", "name"),
    [
        ({"structured_outputs": {"regex": "a"}}, "regex", "structured_outputs"),
        ({"extra_args": {"a": 1}}, "custom_params", "extra_args"),
        ({"bad_words": ["a"]}, "bad_words_ids", "bad_words"),
        ({}, "input_ids", "input_ids"),
    ],
)
def test_what_the_engine_finds_has_the_callers_name(read, params, own, name):
    with pytest.raises(InvalidRequest, match=f"^{name}: "), read(params).in_callers_words():
        raise InvalidRequest(own, "cannot be")


def test_a_failure_is_raised(tokenizer, read):
    failed = Update("generate-0", [], FinishReason.ABORT, failure=Failure("regex", "cannot go on"))
    with pytest.raises(InvalidRequest, match="regex: cannot go on"):
        OfflineAnswer(0, read(), tokenizer, False).take(failed)
