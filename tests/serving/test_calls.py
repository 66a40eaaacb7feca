"""What clients send, and what becomes of it: a value is used exactly, or refused by the name the client gave it."""

import json
import math
import time
from dataclasses import fields

import numpy as np
import pytest

from specbackend.errors import InvalidRequest
from specbackend.sampling_params import NOT_SERVED, UNLIMITED, SamplingParams
from specbackend.serving import calls
from specbackend.serving.calls import ANY_JSON, CallReader, CancelCall
from specbackend.serving.errors import Unsupported
from specbackend.serving.faces import VLLM
from specbackend.serving.protocol import Ready
from specbackend.serving.schemas import LLM_INPUTS, LLM_PARAMETERS
from specbackend.tokenizer import Tokenizer
from tests.fakes import CONTEXT_LENGTH, END_ID, VOCAB_SIZE, FakeRequest, VllmRequest

LIMITS = Ready(CONTEXT_LENGTH, VOCAB_SIZE, [END_ID], num_draft_tokens=8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tests.fakes import save_byte_checkpoint

    return Tokenizer(save_byte_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture
def read(tokenizer):
    """Read a request for the prompt "hi" with the given inputs and parameters."""

    def read_inputs(parameters=None, request_id="", timeout=0, outputs=None, **inputs):
        if "input_ids" not in inputs:
            inputs = {"text_input": "hi", **inputs}
        return CallReader(tokenizer, LIMITS).read(FakeRequest(request_id, parameters, timeout, outputs, **inputs))

    return read_inputs


@pytest.fixture
def read_vllm(tokenizer):
    """The same as a client of vllm_model."""

    def read_inputs(parameters=None, outputs=None, **inputs):
        if "input_ids" not in inputs:
            inputs = {"text_input": "hi", **inputs}
        return CallReader(tokenizer, LIMITS, VLLM).read(VllmRequest("", parameters, 0, outputs, **inputs))

    return read_inputs


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({}, {"temperature": 0.0}),
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"request_output_len": 5}, {"max_new_tokens": 5}),
        ({"max_tokens": 5, "request_output_len": 5}, {"max_new_tokens": 5}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"temperature": 0.7, "top_k": 1}, {"temperature": 0.0}),
        ({"temperature": 0.7, "top_k": 0}, {"temperature": 0.7}),
        ({"temperature": 0.7, "top_k": -1}, {"temperature": 0.7, "top_k": -1}),
        ({"temperature": 0.7, "top_k": 50}, {"temperature": 0.7, "top_k": 50}),
        ({"runtime_top_k": 50}, {"temperature": 1.0, "top_k": 50}),
        ({"runtime_top_k": 0, "runtime_top_p": 0.0}, {"temperature": 0.0, "top_k": -1, "top_p": 1.0}),
        ({"runtime_top_k": 1, "runtime_top_p": 0.9}, {"temperature": 0.0}),
        ({"top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({"top_p": 0.9, "temperature": 0.0}, {"temperature": 0.0, "top_p": 0.9}),
        ({"runtime_top_p": 1.0}, {"temperature": 0.0, "top_p": 1.0}),
        ({"min_tokens": 3}, {"min_new_tokens": 3}),
        ({"min_length": 3, "min_tokens": 3}, {"min_new_tokens": 3}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1, "temperature": 0.0}),
        ({"presence_penalty": -0.3, "frequency_penalty": 0.7}, {"presence_penalty": -0.3, "frequency_penalty": 0.7}),
        ({"bad_words": ["", ""]}, {"bad_words_ids": ()}),
        ({"embedding_bias_words": [""], "embedding_bias_weights": [0.0]}, {"logit_bias": ()}),
        ({"embedding_bias_weights": [0.0]}, {"logit_bias": ()}),
        ({"parameters": {"min_p": 0.1}}, {"min_p": 0.1, "temperature": 1.0}),
        ({"parameters": {"top_k": 3, "top_p": 1, "min_new_tokens": 2}}, {"top_k": 3, "top_p": 1, "min_new_tokens": 2}),
        ({"parameters": {"logit_bias": '{"5": -100, "6": 0.5}'}}, {"logit_bias": ((5, -100), (6, 0.5))}),
        ({"parameters": {"allowed_token_ids": "[5, 6]"}}, {"allowed_token_ids": (5, 6)}),
        ({"parameters": {"allowed_token_ids": 5}}, {"allowed_token_ids": (5,)}),
        ({"parameters": {"bad_words_ids": "[[5, 6], [7]]"}}, {"bad_words_ids": ((5, 6), (7,))}),
        ({"seed": (1 << 64) - 1}, {"seed": (1 << 64) - 1}),
        ({"random_seed": 3}, {"seed": 3}),
        ({"stop_words": ["é", "b"]}, {"stop": ("é", "b")}),
        ({"stop_words": [""]}, {"stop": ()}),
        ({"end_id": END_ID}, {"ignore_eos": False}),
        ({"end_id": -1}, {"ignore_eos": True}),
        ({"num_draft_tokens": 0}, {"speculative": False}),
        ({"num_draft_tokens": 8}, {"speculative": True, "speculative_num_draft_tokens": None}),
        ({"num_draft_tokens": 3}, {"speculative": True, "speculative_num_draft_tokens": 3}),
        (
            {
                "parameters": {
                    "speculative_num_steps": 2,
                    "speculative_eagle_topk": 1,
                    "speculative_num_draft_tokens": 3,
                }
            },
            {"speculative_num_steps": 2, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 3},
        ),
        ({"num_return_sequences": 3}, {"n": 3}),
        ({"parameters": {"n": 3}, "num_return_sequences": 3}, {"n": 3}),
        ({"return_log_probs": True}, {"logprobs": 0, "prompt_logprobs": None}),
        ({"return_log_probs": True, "parameters": {"logprobs": 2}}, {"logprobs": 2}),
        ({"return_log_probs": False}, {"logprobs": None}),
        ({"outputs": ["cum_log_probs"]}, {"logprobs": 0}),
        ({"outputs": ["prompt_logprobs"]}, {"prompt_logprobs": 0}),
        ({"parameters": {"prompt_logprobs": 3}}, {"logprobs": None, "prompt_logprobs": 3}),
        ({"parameters": {"return_logprob": True}}, {"logprobs": 0, "prompt_logprobs": None}),
        (
            {"parameters": {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 0}},
            {"logprobs": 2, "prompt_logprobs": 2},
        ),
        ({"guided_decoding_guide_type": "", "guided_decoding_guide": ""}, {"json_schema": None, "regex": None}),
        ({"guided_decoding_guide_type": "json"}, {"json_schema": ANY_JSON}),
        ({"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": "{}"}, {"json_schema": "{}"}),
        ({"guided_decoding_guide_type": "regex", "guided_decoding_guide": "a+"}, {"regex": "a+"}),
        ({"guided_decoding_guide_type": "ebnf_grammar", "guided_decoding_guide": "root ::= a"}, {"ebnf": "root ::= a"}),
        ({"parameters": {"json_schema": "{}"}}, {"json_schema": "{}"}),
        ({"parameters": {"regex": "a+"}}, {"regex": "a+"}),
        ({"parameters": {"ebnf": "root ::= a"}}, {"ebnf": "root ::= a"}),
        ({"parameters": {"choice": '["yes", "no"]'}}, {"choice": ("yes", "no")}),
        ({"parameters": {"custom_params": '{"a": {"b": 1}}'}}, {"custom_params": {"a": {"b": 1}}}),
        ({"parameters": {"extra_args": '{"a": 1}'}}, {"custom_params": {"a": 1}}),
        ({"parameters": {"no_stop_trim": True}}, {"include_stop_str_in_output": True}),
        ({"parameters": {"include_stop_str_in_output": True}}, {"include_stop_str_in_output": True}),
        ({"parameters": {"skip_special_tokens": False}}, {"skip_special_tokens": False}),
        ({"parameters": {"sampling_seed": 3}, "seed": 3}, {"seed": 3}),
        ({"parameters": {"seed": -1}}, {"seed": None}),  # vLLM's for none
        ({"stop": False}, {}),
        ({"beam_width": 1, "num_return_sequences": 1, "return_log_probs": False, "pad_id": 2}, {}),
        ({"top_p": 1.0, "repetition_penalty": 1.0, "bad_words": [""], "len_penalty": 0.5}, {}),
        (
            {"parameters": {"max_new_tokens": 5, "temperature": 0.5, "seed": 1, "ignore_eos": True}},
            {"max_new_tokens": 5},
        ),
        ({"parameters": {"stop": "x", "stop_token_ids": "[3, 4]"}}, {"stop": ("x",), "stop_token_ids": (3, 4)}),
        ({"parameters": {"stop_token_ids": 3, "temperature": 1}}, {"stop_token_ids": (3,), "temperature": 1}),
        ({"parameters": {"priority": -3, "cache_salt": "a"}}, {"priority": -3, "cache_salt": "a"}),
        ({"parameters": {"extra_key": "a"}}, {"cache_salt": "a"}),
        ({"parameters": {"id": "7", "priority": 0, "triton_enable_empty_final_response": True}}, {}),
    ],
)
def test_values_are_used_exactly(read, inputs, expected):
    params = read(**inputs).params
    assert {name: getattr(params, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text_input": ""}, "text_input: is required"),
        ({"text_input": "x" * CONTEXT_LENGTH}, "text_input: has 512 tokens"),
        ({"text_input": "x" * 10_000_000}, "text_input: has 10000000 bytes"),
        ({"text_input": np.array([[b"\xff"]], np.object_)}, "text_input: is not valid UTF-8"),
        (
            {"text_input": np.array([[b"a"], [b"b"]], np.object_)},
            "text_input: one prompt per request",
        ),
        ({"text_input": "x", "input_ids": [1]}, "input_ids: contradicts text_input"),
        ({"input_ids": []}, "input_ids: is empty"),
        ({"input_ids": [1, VOCAB_SIZE]}, "input_ids: must lie between 0 and 259"),
        ({"input_ids": [-1]}, "input_ids: must lie between"),
        ({"input_ids": [1] * CONTEXT_LENGTH}, "input_ids: has 512 tokens"),
        ({"input_ids": [1, 2], "input_lengths": 3}, "input_lengths: is 3"),
        ({"max_tokens": 0}, "max_tokens: must be between 1"),
        ({"request_output_len": -1}, "request_output_len: must be between 1"),
        ({"max_tokens": 5, "request_output_len": 6}, "request_output_len: contradicts max_tokens"),
        ({"temperature": float("nan")}, "temperature: must be finite"),
        ({"temperature": -1.0}, "temperature: must be finite"),
        ({"stop": True}, "stop: A request id must be provided"),
        ({"parameters": {"foo": 1}}, "foo: is not a known parameter"),
        ({"parameters": {"timeout": -1}}, "timeout: must not be negative"),
        ({"parameters": {"timeout": "soon"}}, "timeout: must be an integer"),
        ({"parameters": {"ignore_eos": "yes"}}, "ignore_eos: must be a bool"),
        ({"parameters": {"stream": 1}}, "stream: must be a bool"),
        ({"parameters": {"stop_token_ids": "[1,"}}, "stop_token_ids: must be a number or JSON"),
        ({"parameters": {"stop_token_ids": "[" * 100_000}}, "stop_token_ids: must be a number or JSON"),
        ({"parameters": {"stop_token_ids": "9" * 5000}}, "stop_token_ids: must be a number or JSON"),
        ({"stop_words": ["x"] * 65}, "stop_words: has 65 values, at most 64 are served"),
        ({"top_k": -2}, "top_k: must be between 1"),
        ({"runtime_top_k": -2}, "runtime_top_k: must be between 1"),
        ({"top_k": 3, "runtime_top_k": 4}, "runtime_top_k: contradicts top_k"),
        ({"runtime_top_p": 1.5}, "runtime_top_p: must be above 0"),
        ({"top_p": float("nan")}, "top_p: must be above 0"),
        ({"min_length": 3, "max_tokens": 2}, "min_length: must be at most max_new_tokens, 2, got 3"),
        ({"repetition_penalty": 2.5}, "repetition_penalty: must be above 0 and at most 2"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty: must be between -2 and 2"),
        ({"bad_words": ["x"] * 65}, "bad_words: has 65 values, at most 64 are served"),
        ({"bad_words": ["x" * 40]}, "bad_words: each sequence must have 1 to 32 tokens, got 40"),
        ({"bad_words": ["x" * 1_000_000]}, "bad_words: has a word of 1000000 bytes"),
        ({"embedding_bias_words": ["x"]}, "embedding_bias_words: has 1 words, but embedding_bias_weights has 0"),
        ({"embedding_bias_weights": [2.0]}, "embedding_bias_words: has 0 words, but embedding_bias_weights has 1"),
        (
            {"embedding_bias_words": ["x"], "embedding_bias_weights": [float("nan")]},
            "embedding_bias_words: must be between",
        ),
        ({"bad_words": ["x"], "parameters": {"bad_words_ids": "[[1]]"}}, "bad_words: contradicts bad_words_ids"),
        (
            {
                "embedding_bias_words": ["x"],
                "embedding_bias_weights": [1.0],
                "parameters": {"logit_bias": '{"1": 1}'},
            },
            "embedding_bias_words: contradicts logit_bias",
        ),
        ({"parameters": {"min_p": 1.5}}, "min_p: must be between 0 and 1"),
        ({"parameters": {"min_p": "0.5"}}, "min_p: must be a number"),
        ({"parameters": {"logit_bias": '{"5": 1'}}, "logit_bias: must be a number or JSON"),
        ({"parameters": {"logit_bias": '{"5": 1, "5": 2}'}}, "logit_bias: names token 5 twice"),
        ({"parameters": {"logit_bias": '{"5": NaN}'}}, "logit_bias: must be between"),
        ({"parameters": {"logit_bias": f'{{"{VOCAB_SIZE}": 1}}'}}, f"logit_bias: {VOCAB_SIZE} is not an id"),
        ({"parameters": {"logit_bias": 5}}, "logit_bias: must map token ids"),
        ({"parameters": {"allowed_token_ids": f"[{VOCAB_SIZE}]"}}, f"allowed_token_ids: {VOCAB_SIZE} is not an id"),
        ({"parameters": {"allowed_token_ids": '{"5": 1}'}}, "allowed_token_ids: must be an integer"),
        (
            {"parameters": {"allowed_token_ids": f"[{END_ID}]"}, "min_tokens": 1},
            "allowed_token_ids: with bad_words_ids",
        ),
        ({"parameters": {"bad_words_ids": "[5, 6]"}}, "bad_words_ids: must be lists of token ids"),
        ({"parameters": {"stop_token_ids": '["a"]'}}, "stop_token_ids: must be an integer"),
        ({"parameters": {"max_new_tokens": "5"}}, "max_new_tokens: must be an integer"),
        ({"parameters": {"stop": 5}}, "stop: must be a string"),
        ({"parameters": {"seed": True}}, "seed: must be an integer"),
        ({"num_draft_tokens": 9}, "num_draft_tokens: must lie between 0 (no speculation) and the server's own 8"),
        ({"num_draft_tokens": -1}, "num_draft_tokens: must lie between"),
        (
            {"num_draft_tokens": 3, "parameters": {"speculative_num_draft_tokens": 4}},
            "num_draft_tokens: contradicts speculative_num_draft_tokens",
        ),
        ({"num_draft_tokens": 0, "parameters": {"speculative": True}}, "num_draft_tokens: contradicts speculative"),
        ({"end_id": -1, "parameters": {"ignore_eos": False}}, "end_id: contradicts ignore_eos"),
        ({"num_return_sequences": 0}, "num_return_sequences: must be between 1"),
        ({"num_return_sequences": 2, "parameters": {"n": 3}}, "n: contradicts num_return_sequences"),
        ({"parameters": {"logprobs": 21}}, "logprobs: must be between 0 and 20"),
        ({"parameters": {"logprobs": -1}}, "logprobs: must be between 0 and 20"),
        ({"parameters": {"logprobs": True}}, "logprobs: must be an integer"),
        ({"parameters": {"return_logprob": True, "top_logprobs_num": 21}}, "top_logprobs_num: must be between 0"),
        ({"parameters": {"return_logprob": True, "logprob_start_len": 5}}, "logprob_start_len: must be -1"),
        ({"parameters": {"top_logprobs_num": 2}}, "top_logprobs_num: says nothing without return_logprob"),
        ({"parameters": {"choice": "[1"}}, "choice: must be a number or JSON"),
        ({"parameters": {"custom_params": "[1]"}}, "custom_params: must be an object"),
        ({"parameters": {"extra_args": "[1]"}}, "extra_args: must be an object"),
        ({"parameters": {"extra_args": f'{{"a": {10**30}}}'}}, "extra_args: cannot be sent"),
        ({"parameters": {"custom_params": '{"a": "\\ud800"}'}}, "custom_params: cannot be sent"),
        ({"parameters": {"choice": '["\\ud800"]'}}, "choice: holds half of a surrogate pair"),
        ({"parameters": {"stop": "\ud800"}}, "stop: cannot be sent"),
        ({"parameters": {"sampling_seed": -2}}, "sampling_seed: must be between"),
        ({"parameters": {"sampling_seed": 3}, "seed": 4}, "sampling_seed: contradicts seed"),
        ({"guided_decoding_guide": "{}"}, "guided_decoding_guide_type: must be json"),
        ({"guided_decoding_guide_type": "xml"}, "guided_decoding_guide_type: must be json"),
        ({"guided_decoding_guide_type": "regex"}, "guided_decoding_guide: is required by"),
        (
            {"guided_decoding_guide_type": "json", "guided_decoding_guide": "{}"},
            "guided_decoding_guide: must be json, with no guide",
        ),
        (
            {"guided_decoding_guide_type": "regex", "guided_decoding_guide": "a", "parameters": {"regex": "b"}},
            "guided_decoding_guide: contradicts regex",
        ),
    ],
)
def test_bad_values_are_refused_by_name(read, inputs, message):
    with pytest.raises(InvalidRequest) as error:
        read(**inputs)
    assert str(error.value).startswith(message)
    assert not isinstance(error.value, Unsupported)


@pytest.mark.parametrize(
    "inputs",
    [
        {"end_id": 5},
        {"beam_width": 2},
        {"return_context_logits": True},
        {"lora_task_id": 1},
        {"return_output_ids": True, "num_return_sequences": 2},
        {"return_log_probs": True, "parameters": {"n": 2}},
    ],
)
def test_what_is_not_served_is_refused_by_name(read, inputs):
    with pytest.raises(Unsupported) as error:
        read(**inputs)
    assert error.value.field == next(iter(inputs))


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_only_others_serve_is_refused_unless_it_changes_nothing(read, name):
    neutral, why = NOT_SERVED[name]
    for value in neutral:
        assert read(parameters={name: value}).params == read().params
    for value in ("something", 7, True):
        if value not in neutral:
            with pytest.raises(Unsupported, match=f"^{name}: is not supported.*: {why}"):
                read(parameters={name: value})


def test_bad_words_are_tokens_as_they_begin_a_text_and_after_a_space(read, tokenizer):
    encode = tokenizer.encode
    expected = (tuple(encode("no")), tuple(encode(" no")), tuple(encode(" ")))
    assert read(bad_words=["no", "", " no", " "]).params.bad_words_ids == expected
    assert read(parameters={"bad_words": "no"}).params.bad_words_ids == expected[:2]


def test_embedding_bias_counts_for_every_token_of_a_word(read, tokenizer):
    a, b = tokenizer.encode("ab")
    params = read(embedding_bias_words=["ab", "", "b"], embedding_bias_weights=[0.7, 9.0, -2.0]).params
    assert dict(params.logit_bias) == pytest.approx({a: 0.7, b: -1.3})


def test_prompt_is_tokenized_or_taken_as_it_is(read, tokenizer):
    assert read(text_input="hé").input_ids == tokenizer.encode("hé")
    assert read(input_ids=[5, 6], input_lengths=2).input_ids == [5, 6]


def test_too_many_ids_cost_nothing(read):
    """16 million fit a body; as a list they would hold up everybody for 20 s."""
    ids = np.ones((1, 16_000_000), np.int32)
    start = time.process_time()
    with pytest.raises(InvalidRequest, match="input_ids: has 16000000 tokens"):
        read(input_ids=ids)
    assert time.process_time() - start < 1


def test_echo_only_on_request(read, tokenizer):
    assert read().echo == ""
    assert read(exclude_input_in_output=True).echo == ""
    assert read(exclude_input_in_output=False).echo == "hi"
    assert read(exclude_input_in_output=False, input_ids=tokenizer.encode("hi")).echo == "hi"


def test_outputs_are_sent_when_asked(read):
    assert read().outputs == {"text_output"}
    assert read(return_finish_reason=True).outputs == {"text_output", "finish_reason"}
    assert "acceptance_length" in read(return_perf_metrics=True).outputs
    assert read(outputs=["output_ids"]).outputs == {"output_ids"}
    assert read(outputs=["text_output", "context_logits"]).outputs == {"text_output"}
    assert read(outputs=["text_output", "cum_log_probs"]).outputs == {"text_output", "cum_log_probs"}
    assert read(return_log_probs=True).outputs == {"text_output", "output_log_probs", "cum_log_probs"}
    assert read(parameters={"logprobs": 0}).outputs == {"text_output", "logprobs"}
    assert read(parameters={"return_logprob": True}).outputs == {"text_output", "logprobs"}
    assert read(parameters={"prompt_logprobs": 0}).outputs == {"text_output", "prompt_logprobs"}
    assert read(return_spec_trace=True).outputs == {"text_output", "spec_trace"}
    assert read(num_return_sequences=1).outputs == {"text_output"}
    assert read(num_return_sequences=2).outputs == {"text_output", "sequence_index"}


def test_a_trace_is_made_when_it_is_sent(read):
    asked = [{"return_spec_trace": True}, {"parameters": {"return_spec_trace": True}}, {"outputs": ["spec_trace"]}]
    for request in [*asked, {"parameters": {"sampling_parameters": '{"return_spec_trace": true}'}}]:
        call = read(**request)
        assert call.params.return_spec_trace and "spec_trace" in call.outputs
    for request in ({}, {"return_spec_trace": False}, {"return_spec_trace": True, "outputs": ["text_output"]}):
        call = read(**request)
        assert not call.params.return_spec_trace and call.outputs == {"text_output"}


def test_answers_of_different_lengths_fit_only_into_responses_of_their_own(read):
    asked = {"return_output_ids": True, "return_log_probs": True, "num_return_sequences": 2}
    assert {"output_ids", "output_log_probs"} <= read(stream=True, **asked).outputs
    with pytest.raises(Unsupported, match=r"^return_log_probs: output_log_probs of several answers .* stream"):
        read(parameters={"n": 2}, return_log_probs=True)
    with pytest.raises(Unsupported, match=r"^output_ids: "):
        read(parameters={"n": 2}, outputs=["output_ids"])


def test_too_many_prompt_logprobs_are_refused(read):
    assert read(input_ids=[5] * 500, parameters={"prompt_logprobs": 20, "n": 6}).params.n == 6
    for asked in ({"prompt_logprobs": 20}, {"return_logprob": True, "top_logprobs_num": 20, "logprob_start_len": 0}):
        with pytest.raises(InvalidRequest, match=r"^(top|prompt)_logprobs(_num)?: .*73500 numbers, at most 65536"):
            read(input_ids=[5] * 500, parameters={**asked, "n": 7})


@pytest.mark.parametrize(
    ("trees", "num_nodes"), [({}, 8), ({"speculative_num_draft_tokens": 4}, 4), ({"speculative": False}, 1)]
)
def test_too_much_for_one_response_is_refused(read, monkeypatch, trees, num_nodes):
    """A stream's are small, whatever it asks for."""
    monkeypatch.setattr(calls, "MOST_NUMBERS", 1 << 12)
    for asked, limit in (({"return_spec_trace": True, **trees}, 256 // num_nodes), ({"logprobs": 15}, 16)):
        name = next(iter(asked))
        parameters = {**asked, "n": 16}
        assert read(max_tokens=limit, parameters=parameters)
        assert read(max_tokens=500, stream=True, parameters=parameters)
        with pytest.raises(InvalidRequest, match=rf"^{name}: .* numbers, at most 4096"):
            read(max_tokens=limit + 1, parameters=parameters)
    assert read(max_tokens=500, outputs=["cum_log_probs"], parameters={"n": 64})  # no JSON
    read(input_ids=[5] * (CONTEXT_LENGTH - 16), max_tokens=500, parameters={"logprobs": 15, "n": 16})


def test_long_json_is_not_even_read(read, monkeypatch):
    monkeypatch.setattr(calls, "LONGEST_JSON", 100)
    for name, text in (("sampling_parameters", json.dumps({"temperature": 1})), ("allowed_token_ids", "[5]")):
        assert read(parameters={name: text.ljust(100)})
        with pytest.raises(InvalidRequest, match=f"^{name}: has 101 characters"):
            read(parameters={name: text.ljust(101)})


def test_what_the_engine_refuses_has_the_clients_name(read):
    call = read(
        num_draft_tokens=3,
        request_output_len=5,
        guided_decoding_guide_type="regex",
        guided_decoding_guide="a",
        embedding_bias_words=["x"],
        embedding_bias_weights=[1.0],
        parameters={"extra_args": '{"a": 1}', "speculative_num_steps": 3},
    )
    names = {
        "speculative_num_draft_tokens": "num_draft_tokens",
        "max_new_tokens": "request_output_len",
        "regex": "guided_decoding_guide",
        "logit_bias": "embedding_bias_words",
        "custom_params": "extra_args",
        "speculative_num_steps": "speculative_num_steps",
        "input_ids": "input_ids",
    }
    for own, name in names.items():
        assert str(call.refusal(own, "is too much")) == f"{name}: is too much"


@pytest.mark.parametrize(
    ("given", "inputs", "expected"),
    [
        ({}, {}, {"temperature": 1.0, "max_new_tokens": 16}),
        ({"max_tokens": "30", "min_tokens": "30"}, {}, {"max_new_tokens": 30, "min_new_tokens": 30}),
        ({"temperature": "0", "top_k": "0", "ignore_eos": "true"}, {}, {"temperature": 0, "ignore_eos": True}),
        ({"stop": ["1", "b"], "bad_words": ["c"]}, {}, {"stop": ("1", "b"), "bad_words_ids": ((66,), (220, 66))}),
        ({"stop": "1"}, {}, {"stop": ("1",)}),
        ({"cache_salt": "null"}, {}, {"cache_salt": "null"}),
        ({"extra_key": "42"}, {}, {"cache_salt": "42"}),
        ({"guided_regex": "[1]"}, {}, {"regex": "[1]"}),
        ({"guided_json": "true"}, {}, {"json_schema": "true"}),
        ({"logit_bias": {"5": 1.5}, "n": 2}, {}, {"logit_bias": ((5, 1.5),), "n": 2}),
        ({"structured_outputs": '{"regex": "a"}'}, {}, {"regex": "a"}),
        ({"temperature": 0.5}, {"max_tokens": 5}, {"temperature": 0.5, "max_new_tokens": 5}),
        ({"max_tokens": 5}, {"max_tokens": 5, "temperature": 0.0}, {"temperature": 0.0, "max_new_tokens": 5}),
        ({"max_tokens": None, "seed": None}, {}, {"max_new_tokens": UNLIMITED, "seed": None}),
    ],
    ids=str,
)
def test_vllms_sampling_parameters(read, given, inputs, expected):
    params = read(parameters={"sampling_parameters": json.dumps(given)}, **inputs).params
    assert {name: getattr(params, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[1]", "sampling_parameters: must be an object"),
        ("{", "sampling_parameters: must be a number or JSON"),
        ('{"min_tokens": "many"}', "min_tokens: must be an integer, got 'many'"),
        ('{"min_tokens": -1}', "min_tokens: must be between"),
        ('{"max_tokens": 6}', "max_tokens: contradicts request_output_len"),
        ('{"lora_nam": "x"}', "lora_nam: is not a supported sampling parameter"),
        ('{"best_of": 2}', "best_of: is not supported"),
        ('{"bad_words": ["x y z x y z x y z x y z x y z x y z"]}', "bad_words: each sequence must have"),
    ],
)
def test_vllms_sampling_parameters_are_refused_by_name(read, given, message):
    with pytest.raises(InvalidRequest) as error:
        read(request_output_len=5, parameters={"sampling_parameters": given})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"temperature": 1.0, "max_new_tokens": 16, "top_k": -1}),
        ({"max_tokens": "30", "min_tokens": "30"}, {"max_new_tokens": 30, "min_new_tokens": 30}),
        ({"temperature": "0.1", "top_p": "0.95"}, {"temperature": 0.1, "top_p": 0.95}),
        ({"temperature": 0, "stop": "1", "seed": "7"}, {"temperature": 0, "stop": ("1",), "seed": 7}),
        ({"ignore_eos": "true", "allowed_token_ids": "[5]"}, {"ignore_eos": True, "allowed_token_ids": (5,)}),
        ({"structured_outputs": '{"regex": "a"}'}, {"regex": "a"}),
        ({"logit_bias": '{"5": 1.5}', "n": 2, "speculative": False}, {"logit_bias": ((5, 1.5),), "speculative": False}),
        ({"frequency_penalty": 0.0, "n": 1, "logprobs": False, "best_of": 1}, {"logprobs": None}),
    ],
    ids=str,
)
def test_vllm_face_takes_sampling_parameters_from_either_place(read_vllm, given, expected):
    """As the vLLM backend: values may be text; beside the tensor, those of the request are ignored."""
    as_tensor = {"sampling_parameters": json.dumps(given)}
    contradiction = {"temperature": "0.7", "max_tokens": "100", "lora_name": "x", "unknown": "y"}
    for call in (
        read_vllm(parameters=given),
        read_vllm(**as_tensor),
        read_vllm(parameters=contradiction, **as_tensor),
    ):
        assert {name: getattr(call.params, name) for name in expected} == expected
    assert read_vllm(parameters={"timeout": 5, **contradiction}, **as_tensor).timeout_us == 5
    assert read_vllm(parameters={"bad_words": "c"}).params.bad_words_ids == ((66,), (220, 66))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_tokens": "many"}, "min_tokens: must be an integer, got 'many'"),
        ({"top_p": 0}, "top_p: must be above 0"),
        ({"lora_name": "x"}, "lora_name: is not supported: there are no adapters"),
        ({"best_of": "2"}, "best_of: is not supported"),
        ({"structured_outputs": "{"}, "structured_outputs: must be a"),
        ({"structured_outputs": '{"jsn": 1}'}, "structured_outputs: jsn is not supported"),
    ],
    ids=str,
)
def test_vllm_face_refuses_by_name(read_vllm, given, message):
    for request in ({"parameters": given}, {"sampling_parameters": json.dumps(given)}):
        with pytest.raises(InvalidRequest) as error:
            read_vllm(**request)
        assert str(error.value).startswith(message)
        assert isinstance(error.value, Unsupported) == ("is not supported:" in message or "best_of" in given)


@pytest.mark.parametrize(("stream", "exclude"), [(s, e) for s in (None, False, True) for e in (None, False, True)])
def test_vllm_face_echoes_as_the_vllm_backend(read_vllm, stream, exclude):
    inputs = {"stream": stream, "exclude_input_in_output": exclude}
    inputs = {name: value for name, value in inputs.items() if value is not None}
    if stream and exclude is False:
        with pytest.raises(InvalidRequest, match=r"When streaming, `exclude_input_in_output` = False is not allowed."):
            read_vllm(**inputs)
    else:
        assert read_vllm(**inputs).echo == ("" if stream or exclude else "hi")


def test_vllm_face_sends_what_is_asked_and_null_without_logprobs(read_vllm):
    assert read_vllm().outputs == {"text_output"}
    flags = ["finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens"]
    every = read_vllm(**{f"return_{name}": True for name in flags})
    assert every.outputs == {"text_output", *flags}
    assert every.nulls == {"logprobs"} and every.params.logprobs == 0  # the sum needs them
    assert read_vllm(return_logprobs=True).params.logprobs is None
    asked = read_vllm(return_logprobs=True, sampling_parameters='{"logprobs": "0"}')
    assert asked.nulls == frozenset() and asked.params.logprobs == 0
    assert read_vllm(outputs=["text_output", "finish_reason"]).outputs == {"text_output", "finish_reason"}
    assert read_vllm(sampling_parameters='{"logprobs": 1}').outputs == {"text_output"}
    with pytest.raises(Unsupported, match=r"^return_output_ids: .* n of 1"):
        read_vllm(return_output_ids=True, stream=True, sampling_parameters='{"n": 2}')


def test_every_sampling_parameter_can_be_said(read):
    """By a parameter or tensor of ours: no field of SamplingParams is out of a client's reach."""
    assert {f.name for f in fields(SamplingParams)} <= {spec.sets for spec in (*LLM_INPUTS, *LLM_PARAMETERS)}


def test_stop_with_an_id_is_a_cancellation(read):
    assert read(stop=True, request_id="7") == CancelCall("7")


def test_timeout_from_either_place(read):
    assert not read().is_late(math.inf)
    for call in (read(timeout=2_000_000), read(parameters={"timeout": 2_000_000})):
        arrival = call.arrival_ns / 1e9
        assert call.is_late(arrival + 2.001) and not call.is_late(arrival + 1.999)


def test_defaults_are_the_offline_engines_except_greedy(read):
    assert read().params == SamplingParams(temperature=0.0)
