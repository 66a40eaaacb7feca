"""The bodies of requests. A name that is not here is refused; what a value may be, llm says of most of them."""

import json
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator
from pydantic_core import PydanticCustomError

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

TokenId = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]  # llm's tensor has 32 bits
Few = Field(fail_fast=True)  # of a list: its first fault is told, and the others cost nothing
Some = Field(min_length=1, fail_fast=True)
Ids = Annotated[list[TokenId], Some]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _with_one_unknown(cls, given: Any) -> Any:
        """Only the first unknown name is told of, and each would be an error of its own. With null it says nothing."""
        if not isinstance(given, dict):
            return given
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next((name for name, value in given.items() if name not in known and value is not None), None)
        return {name: value for name, value in given.items() if name in known or name == unknown}


class Body(Model):
    """Of a whole request."""

    @model_validator(mode="before")
    @classmethod
    def _can_be_passed_on(cls, given: Any) -> Any:
        """JSON's escapes can say what is no UTF-8: it would fail further on, or in the answer that quotes it."""
        if isinstance(given, bytes):  # FastAPI's word for what was not sent as JSON
            raise PydanticCustomError("no_json", "send JSON, and say so: Content-Type: application/json")
        try:
            json.dumps(given, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise PydanticCustomError("no_text", "the body holds half of a surrogate pair, which is no text") from None
        except RecursionError:
            raise PydanticCustomError("too_deep", "the body is nested too deep") from None
        return given


SamplingFields = create_model("SamplingFields", __base__=Body, **{name: (Any, None) for name in sorted(SAMPLING_NAMES)})


class StreamOptions(Model):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: in each chunk
    include_obfuscation: bool | None = None  # padding against who listens in, of which there is none


class Generation(SamplingFields):
    """What chats and completions have in common, beside the sampling parameters."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_spec_trace: bool | None = None
    # labels of the client's own, which change nothing
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: bool | None = None  # nothing is
    service_tier: Literal["auto", "default"] | None = None

    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that the client names, as it names them."""
        return {name: getattr(self, name) for name in sorted(SAMPLING_NAMES & self.model_fields_set)}


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


class ChatPrompt(Model):
    """What the chat template makes a prompt of. Messages go to it as they are."""

    messages: Annotated[list[dict[str, Any]], Some]
    tools: Annotated[list[Tool], Few] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None  # None: auto if there are tools
    add_generation_prompt: bool | None = None  # None: unless the final message is to be continued
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


class ChatRequest(ChatPrompt, Generation):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    parallel_tool_calls: bool | None = None  # None: true
    separate_reasoning: bool | None = None  # None: true
    modalities: Annotated[list[Literal["text"]], Few] | None = None


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: str | Ids | Annotated[list[str | Ids], Some]
    logprobs: Annotated[int, Field(strict=True, ge=0, le=MOST_LOGPROBS)] | None = None  # true is a chat's
    echo: bool | None = None
    suffix: Literal[""] | None = None  # nothing here fills gaps


class GenerateRequest(Body):
    """POST /generate, SGLang's own. What may be a list has an element for each prompt then."""

    text: str | Annotated[list[str], Some] | None = None
    input_ids: Ids | Annotated[list[Ids], Some] | None = None
    sampling_params: dict[str, Any] | Annotated[list[dict[str, Any]], Few] | None = None
    stream: bool | None = None
    rid: str | Annotated[list[str], Few] | None = None
    return_logprob: bool | Annotated[list[bool], Few] | None = None
    logprob_start_len: int | Annotated[list[int], Few] | None = None
    top_logprobs_num: int | Annotated[list[int], Few] | None = None
    return_text_in_logprobs: bool | None = None
    return_spec_trace: bool | None = None
    priority: int | None = None
    extra_key: str | Annotated[list[str], Few] | None = None
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
    return_routed_experts: Literal[False] | None = None
    return_indexer_topk: Literal[False] | None = None
    return_entropy: Literal[False] | None = None
    require_reasoning: Literal[False] | None = None
    background: Literal[False] | None = None
    # known, and nothing to do about: meta_info has the usage in any case
    stream_options: StreamOptions | None = None
    log_metrics: bool | None = None


class AbortRequest(Body):
    """POST /abort_request, SGLang's."""

    rid: Annotated[str, Field(min_length=1)]
    abort_all: Literal[False] | None = None


class TokenizeRequest(ChatPrompt, Body):
    """POST /tokenize, vLLM's: a text, or a chat."""

    model: str | None = None
    messages: Annotated[list[dict[str, Any]], Some] | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None  # None: of a text; the chat template brings its own
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """POST /detokenize, vLLM's."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Few]
