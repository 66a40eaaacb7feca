"""Every name that a face declares: what it does to the call that becomes of it, or how it is refused."""

import dataclasses
import json

import numpy as np
import pytest

from specbackend.errors import InvalidRequest
from specbackend.sampling_params import NOT_SERVED, SamplingParams
from specbackend.serving.calls import CallReader, CancelCall
from specbackend.serving.errors import Unsupported
from specbackend.serving.faces import LLM, VLLM
from specbackend.serving.protocol import Ready
from specbackend.serving.schemas import ANY, PERF_METRICS, REQUEST_PARAMETERS
from specbackend.tokenizer import Tokenizer
from tests.fakes import (
    CHAT_TEMPLATE,
    CONTEXT_LENGTH,
    END_ID,
    VOCAB_SIZE,
    FakeRequest,
    VllmRequest,
    byte_tokenizer,
    save_byte_checkpoint,
)

FACES = {"llm": (LLM, FakeRequest), "vllm_model": (VLLM, VllmRequest)}
LIMITS = Ready(CONTEXT_LENGTH, VOCAB_SIZE, [END_ID], num_draft_tokens=8)
ADDED = "outputs beside those that come without asking"  # as a key: what is sent


def ids(text: str) -> list[int]:
    return byte_tokenizer().encode(text).ids


A, B = ids("ab")
CHAT = '[{"role": "user", "content": "a"}]'
METRICS = {spec.name for spec in PERF_METRICS}
METRICS_OF_LLM = METRICS | {"kv_cache_reused_block", "kv_cache_missed_block", "kv_cache_hit_rate"}

# Tensors: a value, what it must make of the call, and what else has to be sent.
EFFECTS = {
    "text_input": ("ab", {"input_ids": [A, B]}),
    "input_ids": ([A, B], {"input_ids": [A, B]}),
    "input_lengths": (2, {ADDED: {"output_ids", "sequence_length"}}, {"input_ids": [A, B]}),
    "messages": (CHAT, {"input_ids": ids("<|user|>a<|assistant|>")}),
    "tools": ("[{}]", {"input_ids": ids("T<|user|>a<|assistant|>")}, {"messages": CHAT}),
    "chat_template_kwargs": ('{"style": "S"}', {"input_ids": ids("S<|user|>a<|assistant|>")}, {"messages": CHAT}),
    "add_generation_prompt": (False, {"input_ids": ids("<|user|>a")}, {"messages": CHAT}),
    "continue_final_message": (True, {"input_ids": ids("<|user|>a")}, {"messages": CHAT}),
    "max_tokens": (5, {"max_new_tokens": 5}),
    "request_output_len": (5, {"max_new_tokens": 5}),
    "sampling_param_max_tokens": (5, {"max_new_tokens": 5}),
    "stop_words": (["x", "y"], {"stop": ("x", "y")}),
    "sampling_param_stop": (["x", "y"], {"stop": ("x", "y")}),
    "stop_words_list": (np.array([[[A, B, 0], [1, 2, -1]]], np.int32), {"stop_token_ids": (A, B)}),
    "end_id": (-1, {"ignore_eos": True}),
    "temperature": (0.5, {"temperature": 0.5}),
    "sampling_param_temperature": (0.5, {"temperature": 0.5}),
    "top_k": (3, {"top_k": 3, "temperature": 1.0}),
    "runtime_top_k": (3, {"top_k": 3}),
    "sampling_param_top_k": (3, {"top_k": 3}),
    "top_p": (0.5, {"top_p": 0.5, "temperature": 1.0}),
    "runtime_top_p": (0.5, {"top_p": 0.5}),
    "sampling_param_top_p": (0.5, {"top_p": 0.5}),
    "min_tokens": (2, {"min_new_tokens": 2}),
    "min_length": (2, {"min_new_tokens": 2}),
    "repetition_penalty": (1.5, {"repetition_penalty": 1.5}),
    "presence_penalty": (0.5, {"presence_penalty": 0.5}),
    "sampling_param_presence_penalty": (0.5, {"presence_penalty": 0.5}),
    "frequency_penalty": (0.5, {"frequency_penalty": 0.5}),
    "sampling_param_frequency_penalty": (0.5, {"frequency_penalty": 0.5}),
    "bad_words": (["a"], {"bad_words_ids": ((A,), (220, A))}),
    "bad_words_list": (np.array([[[A, B, B], [1, 3, -1]]], np.int32), {"bad_words_ids": ((A,), (B, B))}),
    "embedding_bias_words": (["a"], {"logit_bias": ((A, 2.0),)}, {"embedding_bias_weights": [2.0]}),
    "embedding_bias_weights": ([2.0], {"logit_bias": ((A, 2.0),)}, {"embedding_bias_words": ["a"]}),
    "seed": (7, {"seed": 7}),
    "random_seed": (7, {"seed": 7}),
    "sampling_param_seed": (7, {"seed": 7}),
    "guided_decoding_guide_type": ("json", {"json_schema": '{"type": ["object", "array"]}'}),
    "guided_decoding_guide": ("a+", {"regex": "a+"}, {"guided_decoding_guide_type": "regex"}),
    "num_draft_tokens": (0, {"speculative": False}),
    "num_return_sequences": (2, {"n": 2, ADDED: {"sequence_index"}}),
    "stream": (True, {"stream": True}),
    "streaming": (True, {"stream": True}),
    "exclude_input_in_output": (False, {"echo": "hi"}),
    "sampling_param_exclude_input_from_output": (False, {"echo": "hi"}),
    "return_log_probs": (True, {"logprobs": 0, ADDED: {"output_log_probs", "cum_log_probs"}}),
    "return_cumulative_logprob": (True, {"logprobs": 0, ADDED: {"cumulative_logprob"}}),
    "return_logprobs": (True, {ADDED: {"logprobs"}}),
    "return_finish_reason": (True, {ADDED: {"finish_reason"}}),
    "return_stop_reason": (True, {ADDED: {"stop_reason"}}),
    "return_output_ids": (True, {ADDED: {"output_ids"}}),
    "return_num_input_tokens": (True, {ADDED: {"num_input_tokens"}}),
    "return_num_output_tokens": (True, {ADDED: {"num_output_tokens"}}),
    "return_perf_metrics": (True, {ADDED: METRICS}),
    "return_spec_trace": (True, {"return_spec_trace": True, ADDED: {"spec_trace"}}),
    "sampling_param_return_perf_metrics": (True, {ADDED: METRICS}),
    "sampling_parameters": ('{"max_tokens": 5}', {"max_new_tokens": 5}),
}
EFFECTS_OF_VLLM = {**EFFECTS, "exclude_input_in_output": (True, {"echo": ""})}  # absent, it is false unless it streams
# Tensors that are refused with this value.
REFUSED = {
    "beam_width": 2,
    "sampling_param_best_of": 2,
    "sampling_param_logits_post_processor_name": "x",
    "runtime_top_p_decay": 0.5,
    "embedding_bias": [0.0, 1.0],
    "return_context_logits": True,
    "return_generation_logits": True,
    "draft_input_ids": [1],
    "draft_logits": [0.0],
    "draft_acceptance_threshold": 0.5,
    "use_draft_logits": True,
    "lookahead_window_size": 7,
    "lookahead_ngram_size": 7,
    "lookahead_verification_set_size": 7,
    "retention_token_range_starts": [0],
    "retention_token_range_ends": [1],
    "retention_token_range_priorities": [100],
    "retention_token_range_durations_ms": [1],
    "retention_decode_priority": 100,
    "retention_decode_duration_ms": 1,
    "decoder_text_input": "x",
    "decoder_input_ids": [1],
    "decoder_input_lengths": 1,
    "encoder_input_features": [0.0],
    "encoder_output_lengths": 1,
    "cross_attention_mask": [True],
    "skip_cross_attn_blocks": True,
    "prompt_embedding_table": [0.0],
    "prompt_table_extra_id": 1,
    "prompt_table_extra_ids": [0, 1],
    "prompt_vocab_size": 1,
    "mrope_rotary_cos_sin": [0.0],
    "mrope_position_deltas": 1,
    "context_phase_params": [1],
    "lora_task_id": 1,
    "lora_weights": [0.0],
    "lora_config": [1],
    "lora_id": 1,
    "lora_name": "x",
    "lora_path": "x",
    "image_input": [0.0],
    "image_bytes_input": [1],
    "image_url": ["x"],
    "image_url_input": ["x"],
    "video_bytes_input": [1],
    "image": ["x"],
    "embedding_request": "{}",
}
# Tensors that speak only of what another one, which is refused, brings about.
OF_ANOTHER = {
    "length_penalty": "beam_width",
    "len_penalty": "beam_width",
    "early_stopping": "beam_width",
    "beam_search_diversity_rate": "beam_width",
    "runtime_top_p_min": "runtime_top_p_decay",
    "runtime_top_p_reset_ids": "runtime_top_p_decay",
    "lora_ckpt_source": "lora_path",
}
OF_NOTHING = {"pad_id"}  # answers are not padded
CANCEL = {"stop"}

SCHEMA = '{"type": "integer"}'
PARAMETERS = {
    "max_new_tokens": (5, {"max_new_tokens": 5}),
    "max_tokens": (5, {"max_new_tokens": 5}),
    "temperature": (0.5, {"temperature": 0.5}),
    "seed": (7, {"seed": 7}),
    "sampling_seed": (7, {"seed": 7}),
    "stop": ("x", {"stop": ("x",)}),
    "stop_token_ids": ("[1, 2]", {"stop_token_ids": (1, 2)}),
    "ignore_eos": (True, {"ignore_eos": True}),
    "n": (2, {"n": 2}),
    "return_spec_trace": (True, {"return_spec_trace": True}),
    "speculative": (False, {"speculative": False}),
    "speculative_num_steps": (2, {"speculative_num_steps": 2}),
    "speculative_eagle_topk": (2, {"speculative_eagle_topk": 2}),
    "speculative_num_draft_tokens": (2, {"speculative_num_draft_tokens": 2}),
    "priority": (3, {"priority": 3}),
    "cache_salt": ("a", {"cache_salt": "a"}),
    "extra_key": ("a", {"cache_salt": "a"}),
    "top_k": (3, {"top_k": 3}),
    "top_p": (0.5, {"top_p": 0.5}),
    "min_p": (0.5, {"min_p": 0.5}),
    "repetition_penalty": (1.5, {"repetition_penalty": 1.5}),
    "frequency_penalty": (0.5, {"frequency_penalty": 0.5}),
    "presence_penalty": (0.5, {"presence_penalty": 0.5}),
    "min_new_tokens": (2, {"min_new_tokens": 2}),
    "min_tokens": (2, {"min_new_tokens": 2}),
    "logit_bias": ('{"5": 1.5}', {"logit_bias": ((5, 1.5),)}),
    "allowed_token_ids": ("[1, 2]", {"allowed_token_ids": (1, 2)}),
    "bad_words_ids": ("[[1, 2]]", {"bad_words_ids": ((1, 2),)}),
    "bad_words": ("a", {"bad_words_ids": ((A,), (220, A))}),
    "json_schema": (SCHEMA, {"json_schema": SCHEMA}),
    "guided_json": (SCHEMA, {"json_schema": SCHEMA}),
    "regex": ("a+", {"regex": "a+"}),
    "guided_regex": ("a+", {"regex": "a+"}),
    "ebnf": ("root ::= a", {"ebnf": "root ::= a"}),
    "guided_grammar": ("root ::= a", {"ebnf": "root ::= a"}),
    "choice": ('["a"]', {"choice": ("a",)}),
    "guided_choice": ('["a"]', {"choice": ("a",)}),
    "structured_outputs": ('{"regex": "a+"}', {"regex": "a+"}),
    "guided_decoding": ('{"regex": "a+"}', {"regex": "a+"}),
    "custom_params": ('{"a": 1}', {"custom_params": {"a": 1}}),
    "extra_args": ('{"a": 1}', {"custom_params": {"a": 1}}),
    "logprobs": (1, {"logprobs": 1}),
    "prompt_logprobs": (1, {"prompt_logprobs": 1}),
    "return_logprob": (True, {"logprobs": 0}),
    "top_logprobs_num": (2, {"logprobs": 2}, {"return_logprob": True}),
    "logprob_start_len": (0, {"prompt_logprobs": 0}, {"return_logprob": True}),
    "include_stop_str_in_output": (True, {"include_stop_str_in_output": True}),
    "no_stop_trim": (True, {"include_stop_str_in_output": True}),
    "skip_special_tokens": (False, {"skip_special_tokens": False}),
    "sampling_parameters": ('{"max_tokens": 5}', {"max_new_tokens": 5}),
    "timeout": (5, {"timeout_us": 5}),
}
REFUSED_PARAMETERS = {**dict.fromkeys(NOT_SERVED, "zzz"), "lora_name": "x"}
OF_TRITON = {spec.name for spec in REQUEST_PARAMETERS} - {"timeout"}  # how the request travels, not what it asks for


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = save_byte_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    (folder / "chat_template.jinja").write_text("{% if tools %}T{% endif %}{{ style }}" + CHAT_TEMPLATE)
    return Tokenizer(folder)


@pytest.fixture
def read(tokenizer):
    def read_request(model: str, parameters=None, request_id="", **inputs):
        face, request = FACES[model]
        prompt = {} if {"text_input", "input_ids", "messages"} & inputs.keys() else {"text_input": "hi"}
        return CallReader(tokenizer, LIMITS, face).read(request(request_id, parameters, **{**prompt, **inputs}))

    return read_request


def of_both(names, table: str) -> list:
    """The (model, name) pairs of names that a face declares in this table of its."""
    pairs = [(model, spec.name) for model, (face, _) in FACES.items() for spec in getattr(face, table)]
    return [pair for pair in pairs if pair[1] in names]


def check_effect(call, expected: dict) -> None:
    for what, value in expected.items():
        if what == ADDED:
            assert call.outputs - {"text_output"} >= value
        else:
            assert getattr(call.params if hasattr(call.params, what) else call, what) == value, what


def test_each_declared_name_is_in_one_of_the_tables():
    tensors = [*EFFECTS, *REFUSED, *OF_ANOTHER, *OF_NOTHING, *CANCEL]
    parameters = [*PARAMETERS, *REFUSED_PARAMETERS, *OF_TRITON]
    for names, table in ((tensors, "inputs"), (parameters, "parameters")):
        assert len(names) == len(set(names))
        assert {spec.name for face, _ in FACES.values() for spec in getattr(face, table)} == set(names)


@pytest.mark.parametrize(("model", "name"), of_both(EFFECTS, "inputs"))
def test_a_tensor_has_its_effect(read, model, name):
    value, expected, *others = (EFFECTS_OF_VLLM if model == "vllm_model" else EFFECTS)[name]
    others = others[0] if others else {}
    check_effect(read(model, **{name: value, **others}), expected)
    with pytest.raises((AssertionError, InvalidRequest)):  # it is this name's effect
        check_effect(read(model, **others), expected)


@pytest.mark.parametrize(("model", "name"), of_both(PARAMETERS, "parameters"))
def test_a_parameter_has_its_effect(read, model, name):
    value, expected, *others = PARAMETERS[name]
    others = others[0] if others else {}
    check_effect(read(model, {name: value, **others}), expected)
    with pytest.raises(AssertionError):
        check_effect(read(model, others), expected)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(SamplingParams)])
def test_sampling_parameters_of_vllm_are_in_the_json_too(read, name):
    value, expected = PARAMETERS[name]
    value = json.loads(value) if name == "choice" else value
    check_effect(read("vllm_model", sampling_parameters=json.dumps({name: value})), expected)


@pytest.mark.parametrize(("model", "name"), of_both(REFUSED, "inputs"))
def test_a_tensor_is_refused_unless_it_changes_nothing(read, model, name):
    spec = FACES[model][0].tensor[name]
    with pytest.raises(Unsupported) as error:
        read(model, **{name: REFUSED[name]})
    assert error.value.field == name and spec.why in str(error.value)
    for neutral in spec.neutral:
        read(model, **{name: [neutral] if spec.dims != (1,) else neutral})
    if spec.dims != (1,):
        read(model, **{name: []})


@pytest.mark.parametrize(("model", "name"), of_both(REFUSED_PARAMETERS, "parameters"))
def test_a_parameter_is_refused_unless_it_changes_nothing(read, model, name):
    spec = FACES[model][0].parameter[name]
    with pytest.raises(Unsupported) as error:
        read(model, {name: REFUSED_PARAMETERS[name]})
    assert error.value.field == name and spec.why in str(error.value)
    for neutral in spec.neutral:
        read(model, {name: neutral})


@pytest.mark.parametrize(("model", "name"), of_both({*OF_ANOTHER, *OF_NOTHING}, "inputs"))
def test_a_tensor_says_nothing_without_another_that_is_refused(read, model, name):
    assert FACES[model][0].tensor[name].neutral is ANY
    assert name in OF_NOTHING or OF_ANOTHER[name] in REFUSED
    value = {"STRING": "x", "BOOL": True}.get(FACES[model][0].tensor[name].dtype, 3)
    assert read(model, **{name: value}).params == read(model).params


@pytest.mark.parametrize(("model", "name"), of_both(OF_TRITON, "parameters"))
def test_how_a_request_travels_changes_nothing(read, model, name):
    value = {"STRING": "x", "INT64": 7, "BOOL": True}[FACES[model][0].parameter[name].dtype]
    call = read(model, {name: value})
    assert dataclasses.replace(call, arrival_ns=0) == dataclasses.replace(read(model), arrival_ns=0)


def test_stop_is_a_cancellation_as_a_tensor_only(read):
    assert read("llm", request_id="7", stop=True) == CancelCall("7")
    assert "stop" not in VLLM.tensor


def test_metrics_have_all_names_of_tensorrt_llms_models(read):
    assert read("llm", return_perf_metrics=True).outputs >= METRICS_OF_LLM
    assert "batch_index" not in read("llm", return_perf_metrics=True).outputs


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bad_words_list", [[A, B], [2, 1]]),  # not behind each other
        ("bad_words_list", [[A, B], [3, -1]]),  # beyond the ids
        ("bad_words_list", [[A, B], [0, -1]]),  # an empty word
        ("bad_words_list", [[A, B], [-2, 1]]),
        ("stop_words_list", [[A, B], [2, 2]]),
    ],
)
def test_word_lists_that_make_no_sense(read, name, words):
    with pytest.raises(ValueError, match=f"^{name}: words must end behind each other"):
        read("llm", **{name: np.array([words], np.int32)})


def test_word_lists_of_stock_clients(read):
    """No words are one id of padding; a stop word of several tokens is refused, by its name."""
    none = np.array([[[0], [-1]]], np.int32)
    call = read("llm", stop_words_list=none, bad_words_list=none)
    assert (call.params.stop_token_ids, call.params.bad_words_ids) == ((), ())
    with pytest.raises(Unsupported, match=r"^stop_words_list: has \[\d+, \d+\], only single tokens"):
        read("llm", stop_words_list=np.array([[[A, B], [2, -1]]], np.int32))
