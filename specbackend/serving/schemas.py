"""The tensors of the models, as tables: TensorRT-LLM's names, so that its clients work unchanged.

The config.pbtxt files repeat them: `python -m specbackend.serving.schemas MODEL` prints their text.
"""

import sys
from dataclasses import dataclass

from specbackend.sampling_params import ALIASES, NOT_SERVED

ANY = None  # every value is neutral


@dataclass(frozen=True)
class Input:
    """A tensor that a client may send (all are optional), or a request parameter; dims are without the batch dimension.

    `sets` says what it means to `calls.CallReader`. Without it the input is declared because stock clients send it:
    the neutral values, which change nothing, pass and all others are refused.
    """

    name: str
    dtype: str  # as in config.pbtxt, without TYPE_; of a parameter also JSON, a list or an object, or ANY
    dims: tuple[int, ...] = (1,)
    sets: str | None = None
    neutral: tuple | None = ()
    why: str = ""  # other values are refused


@dataclass(frozen=True)
class Output:
    """A tensor that a client may get: when the input `asked_by` is true, or it requests just this output by name."""

    name: str
    dtype: str
    dims: tuple[int, ...] = (1,)
    asked_by: str | None = None  # None: declared, never sent
    ragged: bool = False  # as long as the answer, so that several answers do not fit side by side


ALWAYS = "always"
LIST = (-1,)

LLM_INPUTS = (
    # prompt
    Input("text_input", "STRING", sets="text"),
    Input("input_ids", "INT32", LIST, sets="input_ids"),  # instead of text_input
    Input("input_lengths", "INT32", sets="input_length"),
    # length and end
    Input("max_tokens", "INT32", sets="max_new_tokens"),
    Input("request_output_len", "INT32", sets="max_new_tokens"),
    Input("stop_words", "STRING", LIST, sets="stop"),  # at most calls.MOST_VALUES
    Input("end_id", "INT32", sets="end_id"),  # -1: ignore_eos
    # choice of tokens
    Input("temperature", "FP32", sets="temperature"),  # absent: 1 if top_k, top_p or min_p chooses, else greedy
    Input("top_k", "INT32", sets="top_k"),  # 0: all; 1: greedy
    Input("runtime_top_k", "INT32", sets="top_k"),
    Input("top_p", "FP32", sets="top_p"),  # 0: all
    Input("runtime_top_p", "FP32", sets="top_p"),
    Input("min_tokens", "INT32", sets="min_new_tokens"),
    Input("min_length", "INT32", sets="min_new_tokens"),
    Input("repetition_penalty", "FP32", sets="repetition_penalty"),
    Input("presence_penalty", "FP32", sets="presence_penalty"),
    Input("frequency_penalty", "FP32", sets="frequency_penalty"),
    Input("bad_words", "STRING", LIST, sets="bad_words"),  # at most calls.MOST_VALUES, as the next two
    Input("embedding_bias_words", "STRING", LIST, sets="bias_words"),
    Input("embedding_bias_weights", "FP32", LIST, sets="bias_weights"),
    Input("seed", "UINT64", sets="seed"),
    Input("random_seed", "UINT64", sets="seed"),
    Input("guided_decoding_guide_type", "STRING", sets="guide_type"),  # json, json_schema, regex or ebnf_grammar
    Input("guided_decoding_guide", "STRING", sets="guide"),
    Input("num_draft_tokens", "INT32", sets="num_draft_tokens"),  # 0: no speculation for this request
    Input("num_return_sequences", "INT32", sets="n"),
    # the answer
    Input("stream", "BOOL", sets="stream"),
    Input("streaming", "BOOL", sets="stream"),
    Input("exclude_input_in_output", "BOOL", sets="exclude_input_in_output"),  # absent: true
    Input("return_log_probs", "BOOL", sets="return_log_probs"),
    Input("return_finish_reason", "BOOL", sets="return_finish_reason"),
    Input("return_output_ids", "BOOL", sets="return_output_ids"),
    Input("return_num_input_tokens", "BOOL", sets="return_num_input_tokens"),
    Input("return_num_output_tokens", "BOOL", sets="return_num_output_tokens"),
    Input("return_perf_metrics", "BOOL", sets="return_perf_metrics"),
    Input("return_spec_trace", "BOOL", sets="return_spec_trace"),
    # control
    Input("stop", "BOOL", sets="cancel"),  # end the running requests that have this request's id
    # declared for stock clients, served only where they change nothing
    Input("length_penalty", "FP32", neutral=ANY),  # of beam search only
    Input("len_penalty", "FP32", neutral=ANY),
    Input("pad_id", "INT32", neutral=ANY),  # answers are not padded
    Input("beam_width", "INT32", neutral=(1,)),
    Input("return_context_logits", "BOOL", neutral=(False,)),
    Input("return_generation_logits", "BOOL", neutral=(False,)),
    Input("use_draft_logits", "BOOL", neutral=(False,)),
    Input("decoder_text_input", "STRING", neutral=("",)),
    Input("prompt_embedding_table", "FP16", (-1, -1)),
    Input("prompt_table_extra_id", "UINT64"),
    Input("prompt_vocab_size", "INT32", neutral=(0,)),
    Input("lora_task_id", "UINT64"),
    Input("lora_weights", "FP16", (-1, -1)),
    Input("lora_config", "INT32", (-1, 3)),
    Input("image_input", "FP16", (-1, -1, -1)),
    Input("image_bytes_input", "UINT8", (-1, -1, -1, -1)),
    Input("image_url_input", "STRING", LIST, neutral=("",)),
    Input("video_bytes_input", "UINT8", (-1, -1, -1, -1)),
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

LLM_PARAMETERS = (
    *SAMPLING_PARAMETERS,
    *(Input(name, _TYPES[own], sets=own) for name, own in ALIASES.items() if name not in _TENSOR_NAMES),
    *(Input(name, "ANY", neutral=neutral, why=why) for name, (neutral, why) in NOT_SERVED.items()),
    Input("sampling_parameters", "STRING", sets="sampling_parameters"),  # JSON of vLLM's, with its defaults
    Input("timeout", "INT64", sets="timeout"),  # microseconds
    Input("id", "STRING", neutral=ANY),  # generate's request id; read from the request itself
    Input("triton_enable_empty_final_response", "BOOL", neutral=ANY),
    Input("binary_data_output", "BOOL", neutral=ANY),
    Input("sequence_id", "INT64", neutral=ANY),
    Input("sequence_start", "BOOL", neutral=ANY),
    Input("sequence_end", "BOOL", neutral=ANY),
)

# Without `stream` and with n above 1, a LIST has an element for each answer.
LLM_OUTPUTS = (
    Output("text_output", "STRING", LIST, asked_by=ALWAYS),  # what is new when streaming, else all
    Output("finish_reason", "STRING", LIST, asked_by="return_finish_reason"),  # stop, length, abort; at an answer's end
    Output("output_ids", "INT32", LIST, asked_by="return_output_ids", ragged=True),
    Output("num_input_tokens", "INT32", asked_by="return_num_input_tokens"),
    Output("num_output_tokens", "INT32", LIST, asked_by="return_num_output_tokens"),  # in this response
    Output("sequence_index", "INT32", LIST, asked_by="n"),  # of the answer that this response is about
    Output("output_log_probs", "FP32", (-1, -1), asked_by="return_log_probs", ragged=True),  # of the new tokens
    Output("cum_log_probs", "FP32", LIST, asked_by="return_log_probs"),  # of all tokens so far
    Output("logprobs", "STRING", LIST, asked_by="logprobs"),  # JSON, as the vLLM backend has it
    Output("prompt_logprobs", "STRING", LIST, asked_by="prompt_logprobs"),  # with an answer's first response
    Output("spec_trace", "STRING", LIST, asked_by="return_spec_trace"),  # JSON: the steps of the new tokens
    # at an answer's end
    Output("num_cached_tokens", "INT32", LIST, asked_by="return_perf_metrics"),
    Output("kv_cache_reused_blocks", "INT32", LIST, asked_by="return_perf_metrics"),  # the same: a block is one token
    Output(
        "acceptance_length", "FP32", LIST, asked_by="return_perf_metrics"
    ),  # tokens per verification, bonus included
    Output("acceptance_rate", "FP32", LIST, asked_by="return_perf_metrics"),  # accepted of all drafted
    Output("total_accepted_draft_tokens", "INT32", LIST, asked_by="return_perf_metrics"),
    Output("total_draft_tokens", "INT32", LIST, asked_by="return_perf_metrics"),
    Output("num_spec_steps", "INT32", LIST, asked_by="return_perf_metrics"),
    Output("arrival_time_ns", "INT64", LIST, asked_by="return_perf_metrics"),  # of the machine's monotonic clock
    Output("first_token_time_ns", "INT64", LIST, asked_by="return_perf_metrics"),
    Output("last_token_time_ns", "INT64", LIST, asked_by="return_perf_metrics"),
    # declared for stock clients
    Output("context_logits", "FP32", (-1, -1)),
    Output("generation_logits", "FP32", (-1, -1, -1)),
    Output("batch_index", "INT32"),
    Output("kv_cache_alloc_new_blocks", "INT32"),
    Output("kv_cache_alloc_total_blocks", "INT32"),
    Output("first_scheduled_time_ns", "INT64"),
)

# The ensemble's own extra input; preprocessing turns text into ids, so the ensemble takes no ids.
APPLY_CHAT_TEMPLATE = Input("apply_chat_template", "BOOL")
NOT_IN_ENSEMBLE = ("input_ids", "input_lengths")

PREPROCESSING_INPUTS = (LLM_INPUTS[0], APPLY_CHAT_TEMPLATE)
PREPROCESSING_OUTPUTS = (Output("input_ids", "INT32", LIST, asked_by=ALWAYS),)
ENSEMBLE_INPUTS = (*(i for i in LLM_INPUTS if i.name not in NOT_IN_ENSEMBLE), APPLY_CHAT_TEMPLATE)
ENSEMBLE_OUTPUTS = LLM_OUTPUTS

RADIX_CACHE_INPUTS = (
    Input("action", "STRING"),  # a key of radix_cache.ACTIONS
    Input("text_input", "STRING"),  # of lookup: the prompt as llm gets it, or its ids
    Input("input_ids", "INT32", LIST),
    Input("cache_salt", "STRING"),
)
RADIX_CACHE_OUTPUTS = (Output("result", "STRING", asked_by=ALWAYS),)  # JSON


TENSORS = {
    "llm": (LLM_INPUTS, LLM_OUTPUTS),
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
