"""The bodies of requests. A name that is not here is refused; what a value may be, llm says of most of them."""

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from specbackend.sampling_params import (
    ALIASES,
    GUIDE_OBJECTS,
    MOST_LOGPROBS,
    NOT_SERVED,
    RETURN_LOGPROB,
    SamplingParams,
)

MOST_PROMPTS = 256  # of one request: each is a stream of its own to Triton
# The sampling parameters of all clients, under every name they have. What is told of the tokens has OpenAI's fields.
OF_LOGPROBS = ("logprobs", "prompt_logprobs", *RETURN_LOGPROB)
SAMPLING_NAMES = frozenset(
    {*(each.name for each in fields(SamplingParams)), *ALIASES, *NOT_SERVED, *GUIDE_OBJECTS, "bad_words"}
    - {*OF_LOGPROBS, "return_spec_trace"}
)

SamplingFields = create_model(
    "SamplingFields",
    __config__=ConfigDict(extra="forbid"),
    **{name: (Any, None) for name in sorted(SAMPLING_NAMES)},
)
TokenId = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]  # llm's tensor has 32 bits
Ids = Annotated[list[TokenId], Field(min_length=1)]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(Model):
    include_usage: bool = False


class Generation(SamplingFields):
    """What chats and completions have in common, beside the sampling parameters."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_spec_trace: bool = False
    # labels of the client's own, which change nothing
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that the client names, as it names them."""
        return {name: getattr(self, name) for name in sorted(SAMPLING_NAMES & self.model_fields_set)}

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class JsonSchema(Model):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None  # it always is
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(Model):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(Model):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Model):
    type: Literal["function"] = "function"
    function: Function


class FunctionName(Model):
    name: str


class NamedTool(Model):
    type: Literal["function"] = "function"
    function: FunctionName


class ChatRequest(Generation):
    """POST /v1/chat/completions. Messages go to the chat template as they are."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(min_length=1)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None  # None: auto if there are tools
    parallel_tool_calls: bool | None = None  # None: true
    separate_reasoning: bool = True
    # of the chat template
    add_generation_prompt: bool | None = None  # None: unless the final message is to be continued
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: Annotated[str, Field(min_length=1)] | Ids | Annotated[list[str | Ids], Field(min_length=1)]
    max_tokens: int | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool = False
    suffix: Literal[""] | None = None  # nothing here fills gaps


class GenerateRequest(Model):
    """POST /generate, SGLang's own. What may be a list has an element for each prompt then."""

    text: str | Annotated[list[str], Field(min_length=1)] | None = None
    input_ids: Ids | Annotated[list[Ids], Field(min_length=1)] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    stream: bool = False
    rid: str | list[str] | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    return_text_in_logprobs: bool = False
    return_spec_trace: bool = False
    priority: int | None = None
    extra_key: str | list[str] | None = None
    # known, and refused unless they say nothing
    input_embeds: None = None
    image_data: None = None
    video_data: None = None
    audio_data: None = None
    token_ids_logprob: None = None
    lora_path: None = None
    session_params: None = None
    custom_logit_processor: None = None
    return_hidden_states: Literal[False] | None = None
    background: Literal[False] | None = None
    log_metrics: bool | None = None


class AbortRequest(Model):
    """POST /abort_request, SGLang's."""

    rid: Annotated[str, Field(min_length=1)]
    abort_all: Literal[False] = False
