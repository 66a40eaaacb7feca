"""The tensors of the models, as tables: the names of TensorRT-LLM and the vLLM backend, whose clients work unchanged.

The config.pbtxt files repeat them: `python -m specbackend.serving.schemas MODEL` prints their text.
"""

import sys
from dataclasses import dataclass, fields

from specbackend.sampling_params import ALIASES, GUIDE_OBJECTS, NOT_SERVED, RETURN_LOGPROB, SamplingParams

ANY = None  # every value is neutral


@dataclass(frozen=True)
class Input:
    """A tensor that a client may send (all are optional), or a request parameter; dims are without the batch dimension.

    `sets` says what it means to `calls.CallReader`. Without it the input is declared because stock clients send it:
    the neutral values, which change nothing, pass and all others are refused. LOOSE is what the vLLM backend makes of
    values: "0.1" is 0.1.
    """

    name: str
    dtype: str  # as in config.pbtxt, without TYPE_; of a parameter also JSON, a list or an object, ANY, or LOOSE
    dims: tuple[int, ...] = (1,)
    sets: str | None = None
    neutral: tuple | None = ()
    why: str = ""  # other values are refused


@dataclass(frozen=True)
class Output:
    """A tensor that a client may get: when an input `asked_by` is true, or it requests just this output by name."""

    name: str
    dtype: str
    dims: tuple[int, ...] = (1,)
    asked_by: str | tuple[str, ...] = ()  # (): declared, never sent
    has_batch_dimension: bool = True  # where the face's tensors have one
    ragged: bool = False  # as long as the answer, so that several answers do not fit side by side
    needs: str | None = None  # the sampling parameter that whoever asks for this asks for, too
    null: str | None = None  # the sampling parameter without which this is the JSON value null
    until_end: str | None = None  # what it is in responses that have no value of it; None: they are without it


ALWAYS, BY_NAME = "always", "by name"
LIST = (-1,)
WORD_LIST = (2, -1)  # TensorRT-LLM's: the ids of all words in a row, below the place where each word ends, then -1

ONE_BEAM = "see num_return_sequences"
NO_LOGITS = "what is returned is tokens and their logprobs"
OWN_DRAFTS = "drafts are the server's own"
NO_LOOKAHEAD = "how is drafted is the server's choice, see num_draft_tokens"
NO_RETENTION = "the cache's policy is the server's"
DECODERS = "models are decoders only"
TEXT_ONLY = "prompts are text or token ids"
NO_ADAPTERS = "there are no adapters"

CHAT_INPUTS = (
    Input("messages", "STRING", sets="messages"),  # JSON of OpenAI's; instead of text_input, as the next ones with it
    Input("tools", "STRING", sets="tools"),  # JSON of OpenAI's
    Input("chat_template_kwargs", "STRING", sets="chat_template_kwargs"),  # a JSON object
    Input("add_generation_prompt", "BOOL", sets="add_generation_prompt"),  # absent: true, unless the next is
    Input("continue_final_message", "BOOL", sets="continue_final_message"),  # go on with the last message
)

LLM_INPUTS = (
    # prompt
    Input("text_input", "STRING", sets="text"),
    Input("input_ids", "INT32", LIST, sets="input_ids"),  # instead of text_input
    Input("input_lengths", "INT32", sets="input_length"),
    *CHAT_INPUTS,
    # length and end
    Input("max_tokens", "INT32", sets="max_new_tokens"),
    Input("request_output_len", "INT32", sets="max_new_tokens"),
    Input("sampling_param_max_tokens", "INT32", sets="max_new_tokens"),
    Input("stop_words", "STRING", LIST, sets="stop"),  # at most calls.MOST_VALUES, as all such lists
    Input("sampling_param_stop", "STRING", LIST, sets="stop"),
    Input("stop_words_list", "INT32", WORD_LIST, sets="stop_word_ids"),  # of one token each
    Input("end_id", "INT32", sets="end_id"),  # -1: ignore_eos
    # choice of tokens
    Input("temperature", "FP32", sets="temperature"),  # absent: 1 if top_k, top_p or min_p chooses, else greedy
    Input("sampling_param_temperature", "FP32", sets="temperature"),
    Input("top_k", "INT32", sets="top_k"),  # 0: all; 1: greedy
    Input("runtime_top_k", "INT32", sets="top_k"),
    Input("sampling_param_top_k", "INT32", sets="top_k"),
    Input("top_p", "FP32", sets="top_p"),  # 0: all
    Input("runtime_top_p", "FP32", sets="top_p"),
    Input("sampling_param_top_p", "FP32", sets="top_p"),
    Input("min_tokens", "INT32", sets="min_new_tokens"),
    Input("min_length", "INT32", sets="min_new_tokens"),
    Input("repetition_penalty", "FP32", sets="repetition_penalty"),
    Input("presence_penalty", "FP32", sets="presence_penalty"),
    Input("sampling_param_presence_penalty", "FP32", sets="presence_penalty"),
    Input("frequency_penalty", "FP32", sets="frequency_penalty"),
    Input("sampling_param_frequency_penalty", "FP32", sets="frequency_penalty"),
    Input("bad_words", "STRING", LIST, sets="bad_words"),
    Input("bad_words_list", "INT32", WORD_LIST, sets="bad_word_ids"),
    Input("embedding_bias_words", "STRING", LIST, sets="bias_words"),
    Input("embedding_bias_weights", "FP32", LIST, sets="bias_weights"),
    Input("seed", "UINT64", sets="seed"),
    Input("random_seed", "UINT64", sets="seed"),
    Input("sampling_param_seed", "UINT64", sets="seed"),
    Input("guided_decoding_guide_type", "STRING", sets="guide_type"),  # json, json_schema, regex or ebnf_grammar
    Input("guided_decoding_guide", "STRING", sets="guide"),
    Input("num_draft_tokens", "INT32", sets="num_draft_tokens"),  # 0: no speculation for this request
    Input("num_return_sequences", "INT32", sets="n"),
    # the answer
    Input("stream", "BOOL", sets="stream"),
    Input("streaming", "BOOL", sets="stream"),
    Input("exclude_input_in_output", "BOOL", sets="exclude_input_in_output"),  # absent: true
    Input("sampling_param_exclude_input_from_output", "BOOL", sets="exclude_input_in_output"),
    Input("return_log_probs", "BOOL", sets="return_log_probs"),
    Input("return_cumulative_logprob", "BOOL", sets="return_cumulative_logprob"),
    Input("return_finish_reason", "BOOL", sets="return_finish_reason"),
    Input("return_stop_reason", "BOOL", sets="return_stop_reason"),
    Input("return_output_ids", "BOOL", sets="return_output_ids"),
    Input("return_num_input_tokens", "BOOL", sets="return_num_input_tokens"),
    Input("return_num_output_tokens", "BOOL", sets="return_num_output_tokens"),
    Input("return_perf_metrics", "BOOL", sets="return_perf_metrics"),
    Input("sampling_param_return_perf_metrics", "BOOL", sets="return_perf_metrics"),
    Input("return_spec_trace", "BOOL", sets="return_spec_trace"),
    # control
    Input("stop", "BOOL", sets="cancel"),  # end the running requests that have this request's id
    # declared for stock clients, served only where they change nothing
    Input("pad_id", "INT32", neutral=ANY),  # answers are not padded
    Input("beam_width", "INT32", neutral=(1,), why=ONE_BEAM),
    Input("length_penalty", "FP32", neutral=ANY),  # of beams, as the next three
    Input("len_penalty", "FP32", neutral=ANY),
    Input("early_stopping", "BOOL", neutral=ANY),
    Input("beam_search_diversity_rate", "FP32", neutral=ANY),
    Input("sampling_param_best_of", "INT32", neutral=(1,), why=NOT_SERVED["best_of"][1]),
    Input("sampling_param_logits_post_processor_name", "STRING", neutral=("",), why=NOT_SERVED["logits_processors"][1]),
    Input("runtime_top_p_decay", "FP32", neutral=(1.0,)),
    Input("runtime_top_p_min", "FP32", neutral=ANY),  # of a top_p that decays, as the next
    Input("runtime_top_p_reset_ids", "INT32", neutral=ANY),
    Input("embedding_bias", "FP32", LIST, neutral=(0.0,), why="see embedding_bias_words and logit_bias"),
    Input("return_context_logits", "BOOL", neutral=(False,), why=NO_LOGITS),
    Input("return_generation_logits", "BOOL", neutral=(False,), why=NO_LOGITS),
    Input("draft_input_ids", "INT32", LIST, why=OWN_DRAFTS),
    Input("draft_logits", "FP32", (-1, -1), why=OWN_DRAFTS),
    Input("draft_acceptance_threshold", "FP32", why="drafts are accepted exactly"),
    Input("use_draft_logits", "BOOL", neutral=(False,), why=OWN_DRAFTS),
    Input("lookahead_window_size", "INT32", neutral=(1,), why=NO_LOOKAHEAD),
    Input("lookahead_ngram_size", "INT32", neutral=(1,), why=NO_LOOKAHEAD),
    Input("lookahead_verification_set_size", "INT32", neutral=(0,), why=NO_LOOKAHEAD),
    Input("retention_token_range_starts", "INT32", LIST, why=NO_RETENTION),
    Input("retention_token_range_ends", "INT32", LIST, why=NO_RETENTION),
    Input("retention_token_range_priorities", "INT32", LIST, why=NO_RETENTION),
    Input("retention_token_range_durations_ms", "INT32", LIST, why=NO_RETENTION),
    Input("retention_decode_priority", "INT32", neutral=(35,), why=NO_RETENTION),  # TensorRT-LLM's default
    Input("retention_decode_duration_ms", "INT32", why=NO_RETENTION),
    Input("decoder_text_input", "STRING", neutral=("",), why=DECODERS),
    Input("decoder_input_ids", "INT32", LIST, why=DECODERS),
    Input("decoder_input_lengths", "INT32", neutral=(0,), why=DECODERS),
    Input("encoder_input_features", "FP16", (-1, -1), why=DECODERS),
    Input("encoder_output_lengths", "INT32", neutral=(0,), why=DECODERS),
    Input("cross_attention_mask", "BOOL", (-1, -1), why=DECODERS),
    Input("skip_cross_attn_blocks", "BOOL", neutral=(False,), why=DECODERS),
    Input("prompt_embedding_table", "FP16", (-1, -1), why=TEXT_ONLY),
    Input("prompt_table_extra_id", "UINT64", neutral=(0,), why=TEXT_ONLY),
    Input("prompt_table_extra_ids", "UINT64", LIST, neutral=(0,), why=TEXT_ONLY),
    Input("prompt_vocab_size", "INT32", neutral=(0,), why=TEXT_ONLY),
    Input("mrope_rotary_cos_sin", "FP32", LIST, why=TEXT_ONLY),
    Input("mrope_position_deltas", "INT64", neutral=(0,), why=TEXT_ONLY),
    Input("context_phase_params", "UINT8", LIST, why="prompt and answer are computed in one place"),
    Input("lora_task_id", "UINT64", why=NO_ADAPTERS),
    Input("lora_weights", "FP16", (-1, -1), why=NO_ADAPTERS),
    Input("lora_config", "INT32", (-1, 3), why=NO_ADAPTERS),
    Input("lora_id", "UINT64", why=NO_ADAPTERS),
    Input("lora_name", "STRING", why=NO_ADAPTERS),
    Input("lora_path", "STRING", why=NO_ADAPTERS),
    Input("lora_ckpt_source", "STRING", neutral=ANY),  # of the file that lora_path names
    Input("image_input", "FP16", (-1, -1, -1), why=TEXT_ONLY),
    Input("image_bytes_input", "UINT8", (-1, -1, -1, -1), why=TEXT_ONLY),
    Input("image_url", "STRING", LIST, neutral=("",), why=TEXT_ONLY),
    Input("image_url_input", "STRING", LIST, neutral=("",), why=TEXT_ONLY),
    Input("video_bytes_input", "UINT8", (-1, -1, -1, -1), why=TEXT_ONLY),
)

# Request parameters beside the tensors' names: SGLang's sampling parameters, and what Triton's front ends add. JSON is
# a number, or text that holds a list or an object.
SAMPLING_PARAMETERS = (
    Input("max_new_tokens", "INT64", sets="max_new_tokens"),
    Input("stop", "STRING", sets="stop"),  # a string here, as SGLang's users expect; the tensor of this name cancels
    Input("stop_token_ids", "JSON", sets="stop_token_ids"),
    Input("ignore_eos", "BOOL", sets="ignore_eos"),
    Input("n", "INT64", sets="n"),
    Input("speculative", "BOOL", sets="speculative"),
    Input("speculative_num_steps", "INT64", sets="speculative_num_steps"),
    Input("speculative_eagle_topk", "INT64", sets="speculative_eagle_topk"),
    Input("speculative_num_draft_tokens", "INT64", sets="speculative_num_draft_tokens"),
    Input("priority", "INT64", sets="priority"),
    Input("cache_salt", "STRING", sets="cache_salt"),
    Input("min_new_tokens", "INT64", sets="min_new_tokens"),
    Input("min_p", "FP64", sets="min_p"),
    Input("logit_bias", "JSON", sets="logit_bias"),  # {"id": bias}
    Input("allowed_token_ids", "JSON", sets="allowed_token_ids"),
    Input("bad_words_ids", "JSON", sets="bad_words_ids"),  # lists of ids
    Input("json_schema", "STRING", sets="json_schema"),
    Input("regex", "STRING", sets="regex"),
    Input("ebnf", "STRING", sets="ebnf"),
    Input("choice", "JSON", sets="choice"),
    Input("structured_outputs", "JSON", sets="structured_outputs"),
    Input("guided_decoding", "JSON", sets="guided_decoding"),
    Input("custom_params", "JSON", sets="custom_params"),
    Input("logprobs", "INT64", sets="logprobs"),
    Input("prompt_logprobs", "INT64", sets="prompt_logprobs"),
    Input("return_logprob", "BOOL", sets="return_logprob"),
    Input("top_logprobs_num", "INT64", sets="top_logprobs_num"),
    Input("logprob_start_len", "INT64", sets="logprob_start_len"),
    Input("include_stop_str_in_output", "BOOL", sets="include_stop_str_in_output"),
    Input("skip_special_tokens", "BOOL", sets="skip_special_tokens"),
)
_TENSOR_NAMES = {spec.name for spec in LLM_INPUTS}
_TYPES = {spec.sets: spec.dtype for spec in (*LLM_INPUTS, *SAMPLING_PARAMETERS)}

# About the request, not the tokens.
REQUEST_PARAMETERS = (
    Input("timeout", "INT64", sets="timeout"),  # microseconds
    Input("return_error_code", "BOOL", neutral=ANY),  # see triton_io.returns_code, which reads it
    Input("id", "STRING", neutral=ANY),  # generate's request id; read from the request itself
    Input("triton_enable_empty_final_response", "BOOL", neutral=ANY),
    Input("binary_data_output", "BOOL", neutral=ANY),
    Input("sequence_id", "INT64", neutral=ANY),
    Input("sequence_start", "BOOL", neutral=ANY),
    Input("sequence_end", "BOOL", neutral=ANY),
    Input("Streaming", "BOOL", neutral=ANY),  # of TensorRT-LLM's own client, which has the tensor as well
)

LLM_PARAMETERS = (
    *SAMPLING_PARAMETERS,
    *(Input(name, _TYPES[own], sets=own) for name, own in ALIASES.items() if name not in _TENSOR_NAMES),
    *(Input(name, "ANY", neutral=neutral, why=why) for name, (neutral, why) in NOT_SERVED.items()),
    Input("sampling_parameters", "STRING", sets="sampling_parameters"),  # JSON of vLLM's, with its defaults
    *REQUEST_PARAMETERS,
)

# At an answer's end.
PERF_METRICS = (
    Output("num_cached_tokens", "INT32", LIST, asked_by="return_perf_metrics"),
    Output("kv_cache_reused_blocks", "INT32", LIST, asked_by="return_perf_metrics"),  # the same: a block is one token
    Output("kv_cache_alloc_new_blocks", "INT32", LIST, asked_by="return_perf_metrics"),  # of prompt and answer
    Output("kv_cache_alloc_total_blocks", "INT32", LIST, asked_by="return_perf_metrics"),  # with the reused
    Output("acceptance_length", "FP32", LIST, asked_by="return_perf_metrics"),  # tokens per step, bonus included
    Output("acceptance_rate", "FP32", LIST, asked_by="return_perf_metrics"),  # accepted of all drafted
    Output("total_accepted_draft_tokens", "INT32", LIST, asked_by="return_perf_metrics"),
    Output("total_draft_tokens", "INT32", LIST, asked_by="return_perf_metrics"),
    Output("num_spec_steps", "INT32", LIST, asked_by="return_perf_metrics"),
    Output("acceptance_histogram", "INT32", (-1, -1), asked_by="return_perf_metrics"),  # steps that accepted 0, 1, ...
    Output("arrival_time_ns", "INT64", LIST, asked_by="return_perf_metrics"),  # of the machine's monotonic clock
    Output("first_scheduled_time_ns", "INT64", LIST, asked_by="return_perf_metrics"),
    Output("first_token_time_ns", "INT64", LIST, asked_by="return_perf_metrics"),
    Output("last_token_time_ns", "INT64", LIST, asked_by="return_perf_metrics"),
)

# Without `stream` and with n above 1, a LIST has an element for each answer.
LLM_OUTPUTS = (
    # what is new when streaming, else all; [n], as TensorRT-LLM's clients read it
    Output("text_output", "STRING", LIST, asked_by=ALWAYS, has_batch_dimension=False),
    Output("finish_reason", "STRING", LIST, asked_by="return_finish_reason"),  # stop, length, abort; at an answer's end
    Output("stop_reason", "STRING", LIST, asked_by="return_stop_reason"),  # a stop string, the id of a token, or None
    Output("output_ids", "INT32", (-1, -1), asked_by=("return_output_ids", "input_length"), ragged=True),
    Output("sequence_length", "INT32", LIST, asked_by="input_length"),  # of output_ids; clients with ids get ids
    Output("num_input_tokens", "INT32", asked_by="return_num_input_tokens"),
    Output("num_output_tokens", "INT32", LIST, asked_by="return_num_output_tokens"),  # in this response
    Output("sequence_index", "INT32", LIST, asked_by="n"),  # of the answer that this response is about
    Output("output_log_probs", "FP32", (-1, -1), asked_by="return_log_probs", ragged=True, needs="logprobs"),
    Output("cum_log_probs", "FP32", LIST, asked_by="return_log_probs", needs="logprobs"),  # of all so far, not the new
    Output("cumulative_logprob", "FP32", LIST, asked_by="return_cumulative_logprob", needs="logprobs"),  # the same
    Output("logprobs", "STRING", LIST, asked_by="logprobs", needs="logprobs"),  # JSON, as the vLLM backend has it
    Output("prompt_logprobs", "STRING", LIST, asked_by="prompt_logprobs", needs="prompt_logprobs"),  # with the first
    Output("spec_trace", "STRING", LIST, asked_by="return_spec_trace"),  # JSON: the steps of the new tokens
    *PERF_METRICS,
    Output("kv_cache_reused_block", "INT32", LIST, asked_by="return_perf_metrics"),  # TensorRT-LLM's other model
    Output("kv_cache_missed_block", "INT32", LIST, asked_by="return_perf_metrics"),  # of the prompt
    Output("kv_cache_hit_rate", "FP32", LIST, asked_by="return_perf_metrics"),  # of the prompt
    # when requested by name
    Output("batch_index", "INT32", asked_by=BY_NAME),  # 0
    # declared for stock clients
    Output("context_logits", "FP32", (-1, -1)),
    Output("generation_logits", "FP32", (-1, -1, -1)),
)

# The vLLM backend's tensors, and ours. What a client does not send as a tensor it says in sampling_parameters.
VLLM_INPUTS = (
    # prompt
    Input("text_input", "STRING", sets="text"),
    Input("input_ids", "INT32", LIST, sets="input_ids"),  # instead of text_input
    *CHAT_INPUTS,
    Input("image", "STRING", LIST, neutral=("",), why=TEXT_ONLY),
    Input("embedding_request", "STRING", why="there are no embeddings"),
    # the answer
    Input("stream", "BOOL", sets="stream"),
    Input("exclude_input_in_output", "BOOL", sets="exclude_input_in_output"),  # absent: true if it streams, else false
    Input("return_finish_reason", "BOOL", sets="return_finish_reason"),
    Input("return_cumulative_logprob", "BOOL", sets="return_cumulative_logprob"),
    Input("return_logprobs", "BOOL", sets="return_logprobs"),
    Input("return_num_input_tokens", "BOOL", sets="return_num_input_tokens"),
    Input("return_num_output_tokens", "BOOL", sets="return_num_output_tokens"),
    Input("return_output_ids", "BOOL", sets="return_output_ids"),
    Input("return_perf_metrics", "BOOL", sets="return_perf_metrics"),
    Input("return_spec_trace", "BOOL", sets="return_spec_trace"),
    # choice of tokens
    Input("sampling_parameters", "STRING", sets="sampling_parameters"),  # JSON; beside it VLLM_PARAMETERS are ignored
)

# What the vLLM backend passes to vLLM's SamplingParams, and what is in the JSON of sampling_parameters.
VLLM_PARAMETERS = (
    *(Input(each.name, "LOOSE", sets=each.name) for each in fields(SamplingParams)),
    *(Input(name, "LOOSE", sets=own) for name, own in ALIASES.items()),
    *(Input(name, "LOOSE", sets=name) for name in (*RETURN_LOGPROB, *GUIDE_OBJECTS)),
    Input("bad_words", "LOOSE", LIST, sets="bad_words"),
    *(Input(name, "LOOSE", neutral=neutral, why=why) for name, (neutral, why) in NOT_SERVED.items()),
    Input("lora_name", "STRING", why=NO_ADAPTERS),
    *REQUEST_PARAMETERS,
)

# A LIST has an element for each answer, in streams, too, as the vLLM backend has it.
VLLM_OUTPUTS = (
    Output("text_output", "STRING", LIST, asked_by=ALWAYS),
    Output("finish_reason", "STRING", LIST, asked_by="return_finish_reason", until_end="None"),
    Output("cumulative_logprob", "FP32", LIST, asked_by="return_cumulative_logprob", needs="logprobs"),
    Output("logprobs", "STRING", LIST, asked_by="return_logprobs", null="logprobs"),  # JSON of the new tokens
    Output("num_input_tokens", "UINT32", asked_by="return_num_input_tokens"),
    Output("num_output_tokens", "UINT32", LIST, asked_by="return_num_output_tokens"),  # in this response
    Output("prompt_logprobs", "STRING", LIST, asked_by="prompt_logprobs", needs="prompt_logprobs", until_end="null"),
    Output("output_ids", "INT32", LIST, asked_by="return_output_ids", ragged=True),
    Output("spec_trace", "STRING", LIST, asked_by="return_spec_trace"),  # JSON: the steps of the new tokens
    *PERF_METRICS,
)

# The ensemble's own extra input; preprocessing turns text into ids, so the ensemble takes neither ids nor messages.
APPLY_CHAT_TEMPLATE = Input("apply_chat_template", "BOOL")
NOT_IN_ENSEMBLE = ("input_ids", "input_lengths", *(spec.name for spec in CHAT_INPUTS))

PREPROCESSING_INPUTS = (LLM_INPUTS[0], APPLY_CHAT_TEMPLATE)
PREPROCESSING_OUTPUTS = (Output("input_ids", "INT32", LIST, asked_by=ALWAYS),)
ENSEMBLE_INPUTS = (*(i for i in LLM_INPUTS if i.name not in NOT_IN_ENSEMBLE), APPLY_CHAT_TEMPLATE)
ENSEMBLE_OUTPUTS = LLM_OUTPUTS

RADIX_CACHE_INPUTS = (
    Input("action", "STRING"),  # see radix_cache.RadixCache
    Input("text_input", "STRING"),  # of lookup: the prompt as llm gets it, or its ids
    Input("input_ids", "INT32", LIST),
    Input("cache_salt", "STRING"),
)
RADIX_CACHE_OUTPUTS = (Output("result", "STRING", asked_by=ALWAYS),)  # JSON


TENSORS = {
    "llm": (LLM_INPUTS, LLM_OUTPUTS),
    "vllm_model": (VLLM_INPUTS, VLLM_OUTPUTS),
    "preprocessing": (PREPROCESSING_INPUTS, PREPROCESSING_OUTPUTS),
    "ensemble": (ENSEMBLE_INPUTS, ENSEMBLE_OUTPUTS),
    "radix_cache": (RADIX_CACHE_INPUTS, RADIX_CACHE_OUTPUTS),
}


def config_text(model: str) -> str:
    """The input and output sections of a model's config.pbtxt."""
    inputs, outputs = TENSORS[model]
    input_lines = ",\n".join(f"  {{ {_tensor_text(spec)}{_flags_text(spec, model)} }}" for spec in inputs)
    output_lines = ",\n".join(f"  {{ {_tensor_text(spec)} }}" for spec in outputs)
    return f"input [\n{input_lines}\n]\noutput [\n{output_lines}\n]"


def _tensor_text(spec: Input | Output) -> str:
    return f'name: "{spec.name}" data_type: TYPE_{spec.dtype} dims: {list(spec.dims)}'


def _flags_text(spec: Input, model: str) -> str:
    if model == "preprocessing" and spec.name == "text_input":
        return ""
    # ragged: requests with lists of different lengths may share one execute()
    return " optional: true" + (" allow_ragged_batch: true" if model == "llm" and -1 in spec.dims else "")


if __name__ == "__main__":
    print(config_text(sys.argv[1]))
