"""From requests to questions for llm: prompts as token ids, parameters under the names that the client used."""

import json
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from specbackend.gateway.answers import ALWAYS_ASKED
from specbackend.gateway.errors import refused
from specbackend.gateway.protocol import MOST_PROMPTS, ChatPrompt, ChatRequest, CompletionRequest, Generation, NamedTool
from specbackend.gateway.triton import Question
from specbackend.sampling_params import ANY_OBJECT, GUIDES, in_our_words
from specbackend.serving.chat import render_chat
from specbackend.tokenizer import Tokenizer

MAX_TOKENS = 16  # of a completion, if nothing is said
LENGTHS = ("max_tokens", "max_new_tokens")
GUIDE_NAMES = ("json_schema", "regex", "ebnf", "choice", "structured_outputs", "guided_decoding")


def chat_question(
    tokenizer: Tokenizer, request: ChatRequest, guide: str | None = None, shows_marks: bool = False
) -> Question:
    """The conversation in the chat template.

    guide: the JSON schema that calls of tools obey, if there must be any. shows_marks: special tokens are text, too.
    """
    sampling = _with_length(request.sampling(), None)  # up to the context length
    if shows_marks:
        sampling["skip_special_tokens"] = False
    names = {"input_ids": "messages", "logprobs": "top_logprobs"}
    if request.max_completion_tokens is not None:
        if sampling.get("max_tokens") not in (None, request.max_completion_tokens):
            raise refused("max_tokens", "contradicts max_completion_tokens, which is the same")
        sampling["max_tokens"] = request.max_completion_tokens
        names["max_tokens"] = "max_completion_tokens"
    _add_guide(sampling, names, "response_format", _schema_of_format(request))
    _add_guide(sampling, names, "tool_choice", guide)
    if request.logprobs:
        sampling["logprobs"] = request.top_logprobs or 0
    elif request.top_logprobs:
        raise refused("top_logprobs", "says nothing without logprobs")
    input_ids = tokenizer.encode(chat_text(tokenizer, request), add_special_tokens=False)
    return _question(request, input_ids, sampling, names)


def completion_questions(tokenizer: Tokenizer, request: CompletionRequest) -> list[Question]:
    """One for each prompt. The engine writes a token even if the prompt is all that is asked about."""
    sampling = _with_length(request.sampling(), MAX_TOKENS)
    if asks_for_nothing(request):
        sampling |= {name: 1 for name in LENGTHS if sampling.get(name) == 0}
    if request.logprobs is not None:
        sampling["logprobs"] = request.logprobs
        if request.echo:
            sampling["prompt_logprobs"] = request.logprobs
    names = {"input_ids": "prompt", "prompt_logprobs": "logprobs"}
    return [_question(request, ids, sampling, names) for ids in prompt_ids(tokenizer, "prompt", request.prompt)]


def asks_for_nothing(request: CompletionRequest) -> bool:
    """Whether the answer has no token: with `echo` and `logprobs` that is how a text is scored."""
    return any(type(length) is int and length == 0 for length in (request.max_tokens, request.max_new_tokens))


def _with_length(sampling: Mapping[str, Any], default: int | None) -> dict[str, Any]:
    """`max_tokens`, unless the client says it, under either name."""
    is_said = any(name in sampling for name in LENGTHS)
    return {**({} if is_said else {"max_tokens": default}), **sampling}


def is_guided(sampling: Mapping[str, Any]) -> bool:
    """Whether the answer's form is given, under any client's name. Raises InvalidRequest."""
    return any(own in GUIDES and value not in (None, [], {}) for _, own, value in in_our_words(dict(sampling)))


def prompt_ids(tokenizer: Tokenizer, name: str, prompt: str | list) -> list[list[int]]:
    """Of a text or token ids, or of a list of them."""
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    if len(prompts) > MOST_PROMPTS:
        raise refused(name, f"has {len(prompts)} prompts, at most {MOST_PROMPTS} are served")
    encoded = [tokenizer.encode(each) if isinstance(each, str) else each for each in prompts]
    if not all(encoded):
        raise refused(name, "is empty")
    return encoded


def chat_text(tokenizer: Tokenizer, request: ChatPrompt) -> str:
    """In the chat template, which brings its own special tokens. Raises InvalidRequest."""
    variables = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        variables["reasoning_effort"] = request.reasoning_effort
    return render_chat(
        tokenizer,
        request.messages,
        template_tools(request),
        variables,
        request.add_generation_prompt,
        request.continue_final_message,
    )


def template_tools(request: ChatPrompt) -> list[dict[str, Any]]:
    """Those that the model hears of."""
    if not request.tools or request.tool_choice == "none":
        return []
    return [tool.model_dump(exclude_unset=True) | {"type": "function"} for tool in request.tools]


def check_tools(request: ChatRequest) -> None:
    """Raises ApiError if the choice names no tool that there is."""
    choice, known = request.tool_choice, [tool.function.name for tool in request.tools or ()]
    if choice in ("auto", "required") and not known:
        raise refused("tool_choice", f"{choice} needs tools")
    if isinstance(choice, NamedTool) and choice.function.name not in known:
        raise refused("tool_choice", f"{choice.function.name} is not among tools")


def _schema_of_format(request: ChatRequest) -> str | None:
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return ANY_OBJECT
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise refused("response_format", "json_schema needs a schema")
    return json.dumps(wanted.json_schema.schema_)


def _add_guide(sampling: dict[str, Any], names: dict[str, str], name: str, schema: str | None) -> None:
    """What the text must be may be said once."""
    if schema is None:
        return
    if said := [other for other in GUIDE_NAMES if sampling.get(other) is not None]:
        raise refused(name, f"contradicts {names.get(said[0], said[0])}: send one of the two")
    sampling["json_schema"] = schema
    names["json_schema"] = name


def _question(
    request: Generation, input_ids: list[int], sampling: Mapping[str, Any], names: Mapping[str, str]
) -> Question:
    return Question(
        input_ids,
        sampling,
        llm_parameters(request.stream, num_answers(sampling), spec_trace=request.return_spec_trace),
        names,
        request_id=new_id(),
    )


def llm_parameters(
    stream: bool | None, n: int, spec_trace: bool | None = None, more: Iterable[str] = ()
) -> dict[str, bool]:
    """What a response says, and whether there are several: a response with several answers has no room for all."""
    asked = (*ALWAYS_ASKED, *(["return_spec_trace"] if spec_trace else []), *more)
    return {"stream": stream or n > 1, **dict.fromkeys(asked, True)}


def num_answers(sampling: Mapping[str, Any]) -> int:
    """How many is for llm to refuse. Raises ApiError for what is no number."""
    n = sampling.get("n")
    if n is not None and type(n) is not int:
        raise refused("n", "must be an integer")
    return 1 if n is None else n


def new_id() -> str:
    return uuid.uuid4().hex
