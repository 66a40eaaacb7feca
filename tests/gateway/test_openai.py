"""What OpenAI's own client gets from the gateway in front of the real tritonserver."""

import asyncio
import json

import httpx
import jsonschema
import openai
import pytest

from specbackend.tokenizer import Tokenizer
from tests.conftest import DEMO_TARGET
from tests.gateway.conftest import MODEL, client_of, running

NUM_STREAMS, MAX_TOKENS = 16, 32
SCHEMA = {
    "type": "object",
    "properties": {"apples": {"type": "integer", "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["apples", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(DEMO_TARGET)


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url) as http:
        yield http


def chat_text(tokenizer: Tokenizer, question: str) -> str:
    return tokenizer.apply_chat_template(messages(question))


def messages(question: str | list) -> list[dict]:
    return [{"role": "user", "content": question}]


def ask_offline(offline, tokenizer, question: str, **params) -> dict:
    ids = tokenizer.encode(chat_text(tokenizer, question), add_special_tokens=False)
    return offline.generate(input_ids=ids, sampling_params={"max_new_tokens": MAX_TOKENS, **params})


def joined(chunks, index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join((c.delta.content if hasattr(c, "delta") else c.text) or "" for c in choices)


PARAMS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.9, "seed": 5, "top_p": 0.9, "top_k": 30, "min_p": 0.01, "repetition_penalty": 1.1},
    "plain": {"temperature": 1, "seed": 6, "speculative": False},
    "penalties": {"temperature": 0, "frequency_penalty": 0.5, "presence_penalty": 0.25, "logit_bias": {"50": 5}},
    "stop": {"temperature": 0, "stop": ["has", "e "]},
    "stopped once": {"temperature": 0, "stop": " the", "include_stop_str_in_output": True},
}
OPENAI_NAMES = ("temperature", "seed", "top_p", "frequency_penalty", "presence_penalty", "logit_bias", "stop")


def openai_words(params: dict) -> dict:
    """What OpenAI has no name for goes into extra_body."""
    extra = {name: value for name, value in params.items() if name not in OPENAI_NAMES}
    return {**{name: value for name, value in params.items() if name in OPENAI_NAMES}, "extra_body": extra}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_chat_says_what_the_engine_says(client, offline, tokenizer, gsm8k_questions, params):
    question = gsm8k_questions[0]
    asked = {"model": MODEL, "messages": messages(question), "max_tokens": MAX_TOKENS, **openai_words(params)}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    expected = ask_offline(offline, tokenizer, question, **params)
    assert whole.choices[0].message.content == joined(chunks) == expected["text"]
    assert whole.choices[0].message.role == chunks[0].choices[0].delta.role == "assistant"
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert {*reasons[:-1]} <= {None}
    assert reasons[-1] == whole.choices[0].finish_reason == expected["meta_info"]["finish_reason"]
    assert len(reasons) > 1 or "stop" in params
    for usage in (whole.usage, chunks[-1].usage):
        assert usage.prompt_tokens == expected["meta_info"]["prompt_tokens"]
        assert usage.completion_tokens == expected["meta_info"]["completion_tokens"]
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0  # asked twice
    drafted = whole.usage.completion_tokens_details
    assert (drafted.accepted_prediction_tokens + drafted.rejected_prediction_tokens > 0) == (
        "speculative" not in params
    )


def test_the_default_is_to_sample_up_to_an_end(client, offline, tokenizer):
    """OpenAI's temperature is 1, and a chat's length is the context's."""
    answer = client.chat.completions.create(model=MODEL, messages=messages("How many eggs?"), seed=11)
    expected = ask_offline(offline, tokenizer, "How many eggs?", seed=11, temperature=1.0, max_new_tokens=None)
    assert answer.choices[0].message.content == expected["text"]
    assert answer.usage.completion_tokens == expected["meta_info"]["completion_tokens"]
    assert client.completions.create(model=MODEL, prompt="How", seed=1).usage.completion_tokens <= 16
    asked = {"model": MODEL, "messages": messages("How many eggs?"), "extra_body": {"ignore_eos": True}}
    assert client.chat.completions.create(**asked, max_completion_tokens=3).usage.completion_tokens == 3


@pytest.mark.parametrize("form", ["text", "texts", "ids", "several ids"])
def test_prompts_in_every_form(client, offline, tokenizer, form):
    prompts = ["How many eggs", "Tom has 3 apples. He"]
    ids = [tokenizer.encode(text) for text in prompts]
    prompt = {"text": prompts[0], "texts": prompts, "ids": ids[0], "several ids": ids}[form]
    asked = {"model": MODEL, "prompt": prompt, "max_tokens": 20, "temperature": 0.8, "seed": 2, "n": 2}
    answer = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True))
    count = 2 if form in ("texts", "several ids") else 1
    params = {"max_new_tokens": 20, "temperature": 0.8, "seed": 2, "n": 2}
    expected = [each for own in ids[:count] for each in offline.generate(input_ids=own, sampling_params=params)]
    texts = [each["text"] for each in expected]
    assert [choice.index for choice in answer.choices] == list(range(2 * count))
    assert [choice.text for choice in answer.choices] == texts
    assert [joined(chunks, index) for index in range(2 * count)] == texts
    assert answer.usage.prompt_tokens == sum(map(len, ids[:count]))
    assert answer.usage.completion_tokens == sum(each["meta_info"]["completion_tokens"] for each in expected)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_logprobs_of_a_chat(client, offline, tokenizer, stream):
    asked = {"model": MODEL, "messages": messages("How many?"), "max_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, n=2, stream=stream)
    choices = [c for chunk in answer for c in chunk.choices] if stream else answer.choices
    expected = ask_offline(offline, tokenizer, "How many?", max_new_tokens=12, temperature=0, logprobs=3)["meta_info"]
    for index in range(2):
        entries = [e for c in choices if c.index == index and c.logprobs for e in c.logprobs.content]
        assert [entry.logprob for entry in entries] == pytest.approx(
            [logprob for logprob, _, _ in expected["output_token_logprobs"]]
        )
        for entry, top in zip(entries, expected["output_top_logprobs"], strict=True):
            assert [each.logprob for each in entry.top_logprobs] == pytest.approx([each[0] for each in top])
            assert entry.top_logprobs[0].token == entry.token  # greedy
            assert bytes(entry.bytes).decode() == entry.token


def test_logprobs_and_echo_of_a_completion(client, offline, tokenizer):
    prompt = "How many eggs"
    asked = {"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 2, "echo": True}
    answer = client.completions.create(**asked).choices[0]
    chunks = list(client.completions.create(**asked, stream=True))
    ids = tokenizer.encode(prompt)
    params = {"max_new_tokens": 8, "temperature": 0, "logprobs": 2, "prompt_logprobs": 2}
    expected = offline.generate(input_ids=ids, sampling_params=params)
    assert answer.text == joined(chunks) == prompt + expected["text"]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [e for c in chunks for e in getattr(c.choices[0].logprobs, name)] == getattr(answer.logprobs, name)
    logprobs = answer.logprobs
    meta = expected["meta_info"]
    both = [*meta["input_token_logprobs"], *meta["output_token_logprobs"]]
    assert logprobs.token_logprobs == pytest.approx([entry[0] for entry in both])
    assert logprobs.tokens == [tokenizer.decode([entry[1]], skip_special_tokens=False) for entry in both]
    assert logprobs.top_logprobs[0] is None
    likeliest = [*meta["input_top_logprobs"], *meta["output_top_logprobs"]]
    for top, two, (own, *_) in zip(logprobs.top_logprobs[1:], likeliest[1:], both[1:], strict=True):
        assert sorted(top.values()) == pytest.approx(sorted({own, *(logprob for logprob, *_ in two)}))
    assert logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]


def json_schema(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_how_each_step_came_by_its_tokens(client, offline, tokenizer, stream):
    """Only who asks is told."""
    asked = {"model": MODEL, "messages": messages("How many?"), "max_tokens": 12, "temperature": 0, "stream": stream}
    choices = {}
    for asks in (False, True):
        answer = client.chat.completions.create(**asked, extra_body={"return_spec_trace": asks})
        choices[asks] = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    expected = ask_offline(offline, tokenizer, "How many?", max_new_tokens=12, temperature=0)["output_ids"]
    steps = [step for choice in choices[True] for step in choice.spec_trace]
    assert [token for step in steps for token in step["token_ids"]][: len(expected)] == expected
    assert steps[0]["kind"] == "prefill" and {"speculative"} <= {step["kind"] for step in steps}
    assert not any(hasattr(choice, "spec_trace") for choice in choices[False])


FORMATS = {
    "json_schema": {"response_format": json_schema(SCHEMA)},
    "json_object": {"response_format": {"type": "json_object"}},
    "guided_json": {"extra_body": {"guided_json": SCHEMA}},
    "structured_outputs": {"extra_body": {"structured_outputs": {"json": SCHEMA}}},
}


@pytest.mark.parametrize("form", FORMATS)
def test_json_is_valid(client, form):
    answer = client.chat.completions.create(
        model=MODEL, messages=messages("Answer in JSON."), max_tokens=60, temperature=0, **FORMATS[form]
    )
    if form != "json_object" or answer.choices[0].finish_reason == "stop":
        value = json.loads(answer.choices[0].message.content)
        jsonschema.validate(value, {"type": "object"} if form == "json_object" else SCHEMA)
    assert answer.choices[0].message.content.lstrip().startswith("{")


def test_turns_of_a_conversation_reuse_the_cache(client):
    first = messages("Sue has 12 pens and loses 5 of them. How many pens does she have now?")
    answer = client.chat.completions.create(model=MODEL, messages=first, temperature=0, max_tokens=40)
    second = [*first, answer.choices[0].message.model_dump(exclude_none=True), *messages("And then?")]
    usage = client.chat.completions.create(model=MODEL, messages=second, temperature=0, max_tokens=4).usage
    assert usage.prompt_tokens_details.cached_tokens >= answer.usage.prompt_tokens
    salted = {"cache_salt": "another"}
    usage = client.chat.completions.create(model=MODEL, messages=second, max_tokens=4, extra_body=salted).usage
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_many_streams_at_once(url, offline, tokenizer, gsm8k_questions):
    """Of one asynchronous client: each gets its own answer, and all run side by side."""
    questions = gsm8k_questions[:NUM_STREAMS]
    ids = [tokenizer.encode(chat_text(tokenizer, question), add_special_tokens=False) for question in questions]
    params = {"max_new_tokens": MAX_TOKENS, "temperature": 0}
    expected = [each["text"] for each in offline.generate(input_ids=ids, sampling_params=params)]
    events: list[int] = []

    async def stream(client, number: int) -> str:
        chunks = await client.chat.completions.create(
            model=MODEL, messages=messages(questions[number]), max_tokens=MAX_TOKENS, temperature=0, stream=True
        )
        text = ""
        async for chunk in chunks:
            events.append(number)
            text += chunk.choices[0].delta.content or ""
        return text

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(stream(client, number) for number in range(NUM_STREAMS)))

    assert asyncio.run(run()) == expected
    assert len(set(events[: len(events) // 2])) > NUM_STREAMS // 2, "one after the other"


REFUSED = {
    "unknown": ({"extra_body": {"frobnicate": 1}}, "frobnicate"),
    "range": ({"temperature": -1}, "temperature"),
    "type": ({"extra_body": {"top_k": "many"}}, "top_k"),
    "alias": ({"max_completion_tokens": 0}, "max_completion_tokens"),
    "not served": ({"extra_body": {"stop_regex": "a+"}}, "stop_regex"),
    "guide": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
        "response_format",
    ),
    "two guides": ({"response_format": {"type": "json_object"}, "extra_body": {"regex": "a"}}, "response_format"),
    "top_logprobs": ({"top_logprobs": 2}, "top_logprobs"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages",
    ),
    "no messages": ({"messages": []}, "messages"),
    "tool_choice": ({"tool_choice": "required"}, "tool_choice"),
    "n": ({"n": 1000}, "n"),
}


@pytest.mark.parametrize("change, param", REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_refusal_names_what_is_wrong(client, change, param, stream):
    asked = {"model": MODEL, "messages": messages("How?"), "max_tokens": 4, "stream": stream, **change}
    if param == "max_completion_tokens":
        del asked["max_tokens"]
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(**asked)
    assert refusal.value.param == param
    assert param in refusal.value.message
    assert refusal.value.type == "invalid_request_error"


def test_other_refusals(client):
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.chat.completions.create(model="gpt-4", messages=messages("How?"))
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model=MODEL, prompt="How", suffix="end")
    with pytest.raises(openai.BadRequestError, match="prompt"):
        client.completions.create(model=MODEL, prompt=[1 << 40])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_prompt_that_is_too_long_is_known_by_its_code(client, stream):
    """And by its words, by which LangChain, LiteLLM and agents know that a conversation has to be cut."""
    words = "messages: prompt is too long: this model's maximum context length is 1024 tokens"
    with pytest.raises(openai.BadRequestError, match=words) as refusal:
        client.chat.completions.create(model=MODEL, messages=messages("many eggs " * 4000), stream=stream)
    assert (refusal.value.code, refusal.value.param) == ("context_length_exceeded", "messages")


def test_models(client):
    [model] = client.models.list()
    assert model == client.models.retrieve(MODEL)
    assert (model.id, model.root, model.parent, model.max_model_len) == (MODEL, str(DEMO_TARGET), None, 1024)


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("form", ["text", "ids"])
def test_texts_are_scored_as_lm_evaluation_harness_does(client, offline, tokenizer, form, max_tokens):
    texts = ["How many eggs does she have?", "Tom has 3 apples"]
    ids = [tokenizer.encode(text) for text in texts]
    answer = client.completions.create(
        **{"model": MODEL, "prompt": texts if form == "text" else ids, "temperature": 0, "seed": 1234},
        **{"max_tokens": max_tokens, "logprobs": 1, "echo": True},
    )
    params = {"max_new_tokens": 1, "temperature": 0, "logprobs": 1, "prompt_logprobs": 1}
    for own, text, choice in zip(ids, texts, answer.choices, strict=True):
        answered, logprobs = offline.generate(input_ids=own, sampling_params=params), choice.logprobs
        expected = answered["meta_info"]
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(own) + max_tokens
        places = zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
        assert next(places) == (None, None)
        theirs = zip(expected["input_token_logprobs"], expected["input_top_logprobs"], strict=True)
        for (logprob, top), (entry, likeliest) in zip(places, [*theirs][1:], strict=max_tokens == 0):
            assert (logprob, max(top.values())) == (pytest.approx(entry[0]), pytest.approx(likeliest[0][0]))
            assert len(top) == 1 + (logprob < max(top.values()))
        assert choice.text == text + (answered["text"] if max_tokens else "")
        assert choice.finish_reason == (expected["finish_reason"] if max_tokens else "length")
    assert answer.usage.completion_tokens == 2 * max_tokens


def test_tokens_of_texts_and_chats(http, tokenizer):
    """vLLM's routes."""
    said = {"messages": messages("How?"), "tools": [{"type": "function", "function": {"name": "now"}}]}
    text, chat = "Zo\u00eb has 3", tokenizer.apply_chat_template(said["messages"], said["tools"])
    for body, ids in (
        ({"prompt": text}, tokenizer.encode(text)),
        ({"prompt": "", "model": MODEL, "add_special_tokens": False}, []),
        (said, tokenizer.encode(chat, add_special_tokens=False)),
    ):
        answer = http.post("/tokenize", json=body).json()
        assert answer == {"count": len(ids), "max_model_len": 1024, "tokens": ids, "token_strs": None}
    answer = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["token_strs"][-1].endswith("3") and len(answer["token_strs"]) == answer["count"]
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", **said}, "messages"),
        ("/tokenize", {"prompt": "a", "tools": said["tools"]}, "tools"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/detokenize", {"tokens": [1 << 20]}, "tokens"),
    ):
        assert http.post(path, json=body).json()["error"]["param"] == param


def test_keys(settings):
    with running(settings, api_key=("first", "second")) as url:
        for key in ("first", "second"):
            assert client_of(url, api_key=key).models.list().data
        for key in ("wrong", "firs", "first1"):
            with pytest.raises(openai.AuthenticationError):
                client_of(url, api_key=key).models.list()
