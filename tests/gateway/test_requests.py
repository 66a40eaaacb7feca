"""What the gateway makes of requests, before a fake tritonserver that says what it is told to."""

import json
import socket
import threading
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import pytest
from fastapi.testclient import TestClient
from openai.types import Completion, chat, completion_create_params
from pydantic import ValidationError
from tritonclient.grpc import service_pb2, service_pb2_grpc

from specbackend.errors import ConfigError
from specbackend.gateway import app as gateway_app
from specbackend.gateway import protocol, sglang, triton
from specbackend.gateway.settings import GatewaySettings
from specbackend.tokenizer import Tokenizer
from tests.conftest import DEMO_TARGET
from tests.gateway.conftest import DEADLINE_S

CHAT, COMPLETION, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
BODIES = {
    CHAT: {"model": "llm", "messages": [{"role": "user", "content": "Hi"}]},
    COMPLETION: {"model": "llm", "prompt": "Hi"},
    GENERATE: {"text": "Hi"},
}
MANY = 5000
CALL = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "now"}}]
FINISHED = {
    "finish_reason": "stop",
    **dict.fromkeys(("num_cached_tokens", "total_accepted_draft_tokens", "total_draft_tokens", "num_spec_steps"), 0),
    **dict.fromkeys(("acceptance_length", "acceptance_rate"), 0.0),
}


class FakeTriton:
    """Answers every question with `text`, a character at a time."""

    def __init__(self):
        self.text, self.outputs = "Yes", {}
        self.questions = []
        self.context_lengths = [1024]

    async def generate(self, question):
        self.questions.append(question)
        for char in self.text:
            yield {"text_output": char, "num_output_tokens": 1, **self.outputs}
        yield {"text_output": "", "num_output_tokens": 0, **FINISHED}

    async def radix_cache(self, action):
        self.questions.append(action)
        return {"engines": [{"context_length": length} for length in self.context_lengths]}

    async def close(self) -> None:
        pass


@pytest.fixture
def fake(monkeypatch) -> FakeTriton:
    fake = FakeTriton()
    monkeypatch.setattr(gateway_app, "TritonServer", lambda url, model: fake)
    return fake


@pytest.fixture
def post(fake) -> Callable[..., httpx.Response]:
    """Ask a gateway with these settings."""

    def post(path: str, body: dict | bytes, **settings) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        with TestClient(gateway_app.create_app(GatewaySettings(str(DEMO_TARGET), **settings))) as client:
            return client.post(path, content=content, headers={"Content-Type": "application/json"})

    return post


def events(response: httpx.Response) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize(
    "wrong",
    [{"api_key": ("",)}, {"api_key": ("good", " ")}, {"api_key": ("a ",)}, {"max_open_requests": 0}],
    ids=str,
)
def test_settings_that_would_let_in_all_or_none(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        GatewaySettings(str(DEMO_TARGET), **wrong)


BAD = {
    "prompts": (protocol.CompletionRequest, {**BODIES[COMPLETION], "prompt": [None] * MANY}),
    "prompts' ids": (protocol.CompletionRequest, {**BODIES[COMPLETION], "prompt": [[None] * MANY] * 2}),
    "messages": (protocol.ChatRequest, {**BODIES[CHAT], "messages": [None] * MANY}),
    "tools": (protocol.ChatRequest, {**BODIES[CHAT], "tools": [None] * MANY}),
    "modalities": (protocol.ChatRequest, {**BODIES[CHAT], "modalities": [None] * MANY}),
    "unknown": (protocol.ChatRequest, {**BODIES[CHAT], **{f"x{i}": 1 for i in range(MANY)}}),
    "unknown of a tool": (protocol.ChatRequest, {**BODIES[CHAT], "tools": [{f"x{i}": 1 for i in range(MANY)}]}),
    "unknown of SGLang's": (protocol.GenerateRequest, {**BODIES[GENERATE], **{f"x{i}": 1 for i in range(MANY)}}),
    **{
        name: (protocol.GenerateRequest, {name: [None] * MANY})
        for name, field in protocol.GenerateRequest.model_fields.items()
        if "list" in str(field.annotation)
    },
}


@pytest.mark.parametrize("kind, body", BAD.values(), ids=BAD.keys())
def test_a_thousand_faults_cost_few_errors(kind, body):
    with pytest.raises(ValidationError) as refusal:
        kind.model_validate(body)
    assert refusal.value.error_count() < 10


PLACES = [
    (COMPLETION, {"prompt": 5}, "prompt: Input should be a valid string"),
    (COMPLETION, {"prompt": [[1, "a"]]}, "prompt.0.1: Input should be a valid integer"),
    (CHAT, {"tool_choice": "any"}, "tool_choice: Input should be 'none', 'auto' or 'required'"),
    (CHAT, {"tool_choice": {"type": "function"}}, "tool_choice.function: Field required"),
    (CHAT, {"tools": [{"type": "custom"}]}, "tools.0.type: Input should be 'function'"),
    (CHAT, {"Frobnicate": 1}, "Unrecognized request argument supplied: Frobnicate"),
    (CHAT, {"tools": [{**TOOLS[0], "Name": 1}]}, "Unrecognized request argument supplied: tools.0.Name"),
    (GENERATE, {"return_logprob": [True, "x"]}, "return_logprob.1: Input should be a valid boolean"),
    (GENERATE, {"top_logprobs_num": "x"}, "top_logprobs_num: Input should be a valid integer"),
    (GENERATE, {"logprob_start_len": [0, "x"]}, "logprob_start_len.1: Input should be a valid integer"),
]


@pytest.mark.parametrize("path, part, message", PLACES, ids=str)
def test_a_fault_is_told_by_its_place_in_the_body(post, path, part, message):
    error = post(path, {**BODIES[path], **part}).json()["error"]
    assert error["message"].startswith(message) and error["param"] == next(iter(part))


def test_labels_are_not_looked_at(post):
    assert post(CHAT, {**BODIES[CHAT], "metadata": {str(i): None for i in range(MANY)}}).status_code == 200


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "part", [{"\ud800": 1}, {"rid": "\ud800"}, {"stop": ["\udc00"]}, {"user": {"\ud800": 1}}], ids=ascii
)
def test_half_a_surrogate_pair_is_refused(post, fake, path, part):
    response = post(path, {**BODIES[path], **part})
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"
    assert fake.questions == []


def test_half_a_surrogate_pair_in_bytes_is_refused(post):
    assert post(GENERATE, b'{"text": "\xed\xa0\x80"}').status_code == 400


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain"])
def test_what_is_not_sent_as_json_is_refused(fake, path, kind):
    """As curl -d does. A page of somebody else could send text without asking first."""
    with TestClient(gateway_app.create_app(GatewaySettings(str(DEMO_TARGET)))) as client:
        body = json.dumps(BODIES[path]).encode()
        response = client.post(path, content=body, headers={"Content-Type": kind})
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]
    assert fake.questions == []


def test_what_is_nested_too_deep_is_refused(post):
    for depth in (300, 900, 100_000):
        assert post(CHAT, json.dumps(BODIES[CHAT])[:-1].encode() + b', "stop": ' + b"[" * depth).status_code == 400
        whole = b'{"text": "a", "sampling_params": {"stop": ' + b"[" * depth + b"]" * depth + b"}}"
        assert post(GENERATE, whole).status_code in (200, 400)
    value: list = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(ValidationError, match="nested too deep"):
        protocol.ChatRequest.model_validate({**BODIES[CHAT], "stop": value})


GUIDES = {
    **{name: {name: ["Yes"]} for name in ("choice", "guided_choice")},
    **{name: {name: "Yes"} for name in ("regex", "guided_regex", "ebnf", "guided_grammar", "json_schema")},
    "guided_json": {"guided_json": {"const": 1}},
    "structured_outputs": {"structured_outputs": {"choice": ["Yes"]}},
    "guided_decoding": {"guided_decoding": {"json_object": True}},
    "response_format": {"response_format": {"type": "json_object"}},
    "tool_choice": {"tools": TOOLS, "tool_choice": "required"},
}
NO_GUIDES = [{}, {"choice": []}, {"regex": None}, {"structured_outputs": {}}, {"response_format": {"type": "text"}}]


@pytest.mark.parametrize("guide", GUIDES.values(), ids=GUIDES.keys())
def test_a_guided_answer_does_not_begin_within_a_thought(post, fake, guide):
    for fake.text, thought in (("Yes", None), ("<think>Hm</think>Yes", "Hm")):
        message = post(CHAT, {**BODIES[CHAT], **guide}, reasoning_parser="deepseek-r1").json()["choices"][0]["message"]
        assert (message["content"], message.get("reasoning_content")) == ("Yes", thought)


@pytest.mark.parametrize("guide", NO_GUIDES, ids=str)
def test_without_a_guide_it_does(post, guide):
    message = post(CHAT, {**BODIES[CHAT], **guide}, reasoning_parser="deepseek-r1").json()["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("", "Yes")


@pytest.mark.parametrize("path, default", [(CHAT, None), (COMPLETION, 16)])
def test_the_length_may_have_either_name(post, fake, path, default):
    for sent in ({"max_new_tokens": 7}, {"max_tokens": 7}, {}):
        assert post(path, {**BODIES[path], **sent}).status_code == 200
    assert [question.sampling for question in fake.questions] == [
        {"max_new_tokens": 7},
        {"max_tokens": 7},
        {"max_tokens": default},
    ]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("n", ["2", True, 2.0, [2]], ids=repr)
def test_a_number_of_answers_is_a_number(post, fake, path, n):
    response = post(path, BODIES[path] | ({"sampling_params": {"n": n}} if path == GENERATE else {"n": n}))
    assert response.status_code == 400 and response.json()["error"]["param"] == "n"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("parallel, count", [(None, 2), (True, 2), (False, 1)])
def test_one_call_is_one_call(post, fake, stream, parallel, count):
    fake.text = CALL + CALL
    body = {**BODIES[CHAT], "tools": TOOLS, "parallel_tool_calls": parallel, "stream": stream}
    response = post(CHAT, body, tool_call_parser="hermes")
    said = [chunk["choices"][0]["delta"] for chunk in events(response)] if stream else []
    calls = [c for step in said or [response.json()["choices"][0]["message"]] for c in step.get("tool_calls", ())]
    assert len([call for call in calls if "id" in call]) == count
    assert "".join(call["function"].get("arguments", "") for call in calls) == "{}" * count


OPENAIS_CHAT, OPENAIS_COMPLETION = (
    sorted(typing.get_type_hints(params).keys() - BODIES[path].keys())
    for params, path in (
        (chat.completion_create_params.CompletionCreateParamsNonStreaming, CHAT),
        (completion_create_params.CompletionCreateParamsNonStreaming, COMPLETION),
    )
)


@pytest.mark.parametrize("text", ["Yes", CALL])
def test_objects_have_the_fields_and_types_of_openais(post, fake, text):
    """Its package does not look at what it gets, but others do."""
    fake.text, fake.outputs = text, {"logprobs": place("a")}
    Completion.model_validate(post(COMPLETION, {**BODIES[COMPLETION], "logprobs": 1}).json(), strict=True)
    asked = {**BODIES[CHAT], "logprobs": True, "top_logprobs": 1, "tools": TOOLS}
    answer = post(CHAT, asked, tool_call_parser="hermes").json()
    chat.ChatCompletion.model_validate(answer, strict=True)
    [choice] = answer["choices"]
    assert choice["message"]["refusal"] is choice["logprobs"]["refusal"] is None
    asked |= {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in events(post(CHAT, asked, tool_call_parser="hermes")):
        chat.ChatCompletionChunk.model_validate(chunk, strict=True)
        assert all(each["logprobs"]["refusal"] is None for each in chunk["choices"] if each["logprobs"])


NEUTRAL = {
    CHAT: [
        *(
            {name: None}
            for name in ("stream", "separate_reasoning", "logprobs", "continue_final_message", "modalities")
        ),
        *({"tools": []}, {"store": True}, {"modalities": ["text"]}, {"return_spec_trace": None}, {"stop": None}),
        dict.fromkeys(OPENAIS_CHAT),
    ],
    COMPLETION: [
        *({name: None} for name in ("stream", "echo", "logprobs", "suffix", "n", "best_of")),
        dict.fromkeys(OPENAIS_COMPLETION),
    ],
    GENERATE: [
        *({name: None} for name in ("stream", "return_text_in_logprobs", "return_spec_trace", "lora_path")),
        # what SGLang's own benchmarks send
        {"return_routed_experts": False, "return_logprob": False, "logprob_start_len": -1},
        {"stream_options": {"include_usage": True}},
        {"return_entropy": False, "require_reasoning": False, "return_indexer_topk": False},
    ],
}


@pytest.mark.parametrize("path, part", [(path, part) for path, parts in NEUTRAL.items() for part in parts], ids=str)
def test_values_that_change_nothing_are_taken(post, path, part):
    plain, other = (post(path, {**BODIES[path], **more}) for more in ({}, part))
    assert other.status_code == 200, other.text
    assert other.json().get("choices") == plain.json().get("choices")


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("continuous", [None, False, True])
def test_usage_in_a_stream(post, path, continuous):
    options = {"include_usage": True, "continuous_usage_stats": continuous, "include_obfuscation": False}
    *chunks, last = events(post(path, {**BODIES[path], "stream": True, "stream_options": options}))
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 3
    counts = [chunk["usage"] and chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == ([1, 2, 3, 3] if continuous else [None] * 4)
    options["include_usage"] = None
    assert not any(
        "usage" in e for e in events(post(path, {**BODIES[path], "stream": True, "stream_options": options}))
    )


@pytest.mark.parametrize("length", ["max_tokens", "max_new_tokens"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("echo", [False, True])
def test_a_completion_may_have_no_token(post, fake, length, stream, echo):
    """The engine writes one in any case, of which nobody hears."""
    fake.text, fake.outputs = "a", {"logprobs": place("a"), "prompt_logprobs": f"[null, {place('i')[1:]}"}
    asked = {**BODIES[COMPLETION], length: 0, "echo": echo, "logprobs": 1, "stream": stream, "prompt": [1, 2]}
    answer = post(COMPLETION, {**asked, "stream_options": {"include_usage": True}})
    *chunks, last = events(answer) if stream else [answer.json()] * 2
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == (Tokenizer(DEMO_TARGET).decode([1, 2]) if echo else "")
    assert sum(len(choice["logprobs"]["tokens"]) for choice in choices if choice["logprobs"]) == (2 if echo else 0)
    assert (choices[-1]["finish_reason"], last["usage"]["completion_tokens"]) == ("length", 0)
    [sampling] = [question.sampling for question in fake.questions]
    assert {name: sampling[name] for name in ("max_tokens", "max_new_tokens") if name in sampling} == {length: 1}
    for path, refused in ((CHAT, 0), (COMPLETION, False)):
        post(path, {**BODIES[path], length: refused})
        assert fake.questions[-1].sampling[length] is refused  # for llm to refuse


def test_top_logprobs_have_the_token_that_was_picked_and_the_likelier_of_two_that_look_alike(post, fake):
    known = {"5": (" is", -2.5, 4), "6": ("\ufffd", -0.5, 1), "7": ("\ufffd", -1.0, 2), "8": (" was", -1.5, 3)}
    entries = {token: {"decoded_token": t, "logprob": p, "rank": r} for token, (t, p, r) in known.items()}
    fake.text, fake.outputs = "a", {"logprobs": json.dumps([entries])}
    for count, tops in ((0, {}), (1, {"\ufffd": -0.5}), (3, {"\ufffd": -0.5, " was": -1.5})):
        logprobs = post(COMPLETION, {**BODIES[COMPLETION], "logprobs": count}).json()["choices"][0]["logprobs"]
        assert (logprobs["tokens"], logprobs["token_logprobs"]) == ([" is"], [-2.5])
        assert logprobs["top_logprobs"] == [{**tops, " is": -2.5}]
    assert post(COMPLETION, {**BODIES[COMPLETION], "logprobs": True}).status_code == 400


def test_an_empty_prompt_is_refused_where_it_has_no_token(post):
    for prompt in ("", [""], [[1], ""]):
        response = post(COMPLETION, {**BODIES[COMPLETION], "prompt": prompt})
        assert response.json()["error"]["message"] == "prompt: is empty"


def place(text: str) -> str:
    """llm's JSON of one place and nothing but the token that was picked."""
    return json.dumps([{"5": {"logprob": -1.0, "rank": 1, "decoded_token": text}}])


def test_a_place_is_written_once_however_long_the_stream(post, fake, monkeypatch):
    picks = []
    monkeypatch.setattr(sglang, "picked", lambda place: (picks.append(place), (5, place["5"]))[1])
    fake.text = "a" * 50
    fake.outputs = {"logprobs": place("a")}
    chunks = events(post(GENERATE, {**BODIES[GENERATE], "stream": True, "return_logprob": True, "top_logprobs_num": 1}))
    assert len(picks) == 50
    for name, each in (("output_token_logprobs", [-1.0, 5, None]), ("output_top_logprobs", [[-1.0, 5, None]])):
        assert [len(chunk["meta_info"][name]) for chunk in chunks] == [*range(1, 51), 50]
        assert chunks[-1]["meta_info"][name] == [each] * 50


class Hangs(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A tritonserver that is well, but says so too late."""

    def __init__(self):
        self.is_over = threading.Event()

    def ServerReady(self, request, context):
        self.is_over.wait(DEADLINE_S)
        return service_pb2.ServerReadyResponse(ready=True)

    def ModelReady(self, request, context):
        return service_pb2.ModelReadyResponse(ready=True)

    def ModelConfig(self, request, context):
        self.is_over.wait(DEADLINE_S)
        return service_pb2.ModelConfigResponse()

    def ModelInfer(self, request, context):
        self.is_over.wait(DEADLINE_S)
        return service_pb2.ModelInferResponse()

    def ModelStreamInfer(self, requests, context):
        self.is_over.wait(DEADLINE_S)
        response = service_pb2.ModelInferResponse()
        response.parameters["triton_final_response"].bool_param = True
        yield service_pb2.ModelStreamInferResponse(infer_response=response)


@pytest.fixture
def hanging() -> Iterator[str]:
    server, hangs = grpc.server(ThreadPoolExecutor(2)), Hangs()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(hangs, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    hangs.is_over.set()
    server.stop(None)


@pytest.mark.parametrize("path", ["/health", "/health_generate"])
def test_a_tritonserver_that_hangs_is_not_well(hanging, monkeypatch, path):
    monkeypatch.setattr(triton, "READY_TIMEOUT_S", 0.2)
    monkeypatch.setattr(gateway_app, "HEALTH_TIMEOUT_S", 0.2)
    with TestClient(gateway_app.create_app(GatewaySettings(str(DEMO_TARGET), grpc_url=hanging))) as client:
        assert client.get(path).status_code == 503


@pytest.mark.parametrize(
    "path, body",
    [("/get_model_info", None), ("/get_server_info", None), ("/flush_cache", {}), ("/abort_request", {"rid": "a"})],
)
def test_a_tritonserver_that_hangs_holds_nobody(hanging, monkeypatch, path, body):
    monkeypatch.setattr(triton, "ANSWER_TIMEOUT_S", 0.2)
    with TestClient(gateway_app.create_app(GatewaySettings(str(DEMO_TARGET), grpc_url=hanging))) as client:
        response = client.get(path) if body is None else client.post(path, json=body)
    assert response.status_code == 504
    assert response.json()["error"] == {
        **{"message": "tritonserver has not answered within 0.2 s", "type": "server_error"},
        **{"param": None, "code": None},
    }


@pytest.mark.parametrize(
    "path, body", [("/v1/models", None), ("/v1/models/llm", None), ("/tokenize", {"prompt": "How"})]
)
def test_the_context_length_is_not_waited_for(hanging, monkeypatch, path, body):
    """What needs no tritonserver otherwise: probes and clients list models first."""
    monkeypatch.setattr(triton, "ANSWER_TIMEOUT_S", 2 * DEADLINE_S)
    monkeypatch.setattr(gateway_app, "CONTEXT_LENGTH_TIMEOUT_S", 0.2)
    with TestClient(gateway_app.create_app(GatewaySettings(str(DEMO_TARGET), grpc_url=hanging))) as client:
        answer = client.get(path) if body is None else client.post(path, json=body)
    assert answer.status_code == 200 and '"max_model_len":null' in answer.text


@pytest.mark.parametrize(
    "kept_s, told, asked", [(0.0, [1024, 512, 512, 2048], 4), (1000.0, [1024] * 4, 1)], ids=["again", "kept"]
)
def test_the_context_length_is_asked_for_now_and_then(fake, monkeypatch, kept_s, told, asked):
    """What nobody says is what was said last."""
    monkeypatch.setattr(gateway_app, "CONTEXT_LENGTH_KEPT_S", kept_s)
    with TestClient(gateway_app.create_app(GatewaySettings(str(DEMO_TARGET)))) as client:
        for fake.context_lengths, length in zip([[1024], [4096, 512], [], [2048]], told, strict=True):
            assert client.get("/v1/models").json()["data"][0]["max_model_len"] == length
    assert fake.questions == ["engines"] * asked


def test_a_long_text_is_encoded_and_written_beside_the_event_loop(fake, monkeypatch):
    render, threads = gateway_app.JSONResponse.render, []

    def noted(response, content):
        threads.append(threading.current_thread().name)
        return render(response, content)

    async def loop_thread() -> str:
        return threading.current_thread().name

    monkeypatch.setattr(gateway_app.JSONResponse, "render", noted)
    with TestClient(gateway_app.create_app(GatewaySettings(str(DEMO_TARGET)))) as client:
        assert client.post("/tokenize", json={"prompt": "How many"}).json()["max_model_len"] == 1024
        assert threads and client.portal.call(loop_thread) not in threads


def test_metrics_that_hang_hold_nobody(monkeypatch):
    monkeypatch.setattr(gateway_app, "ANSWER_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = GatewaySettings(str(DEMO_TARGET), metrics_url=f"127.0.0.1:{silent.getsockname()[1]}")
        with TestClient(gateway_app.create_app(settings)) as client:
            response = client.get("/metrics")
    assert response.status_code == 503 and "timed out" in response.json()["error"]["message"]
