"""The real tritonserver, real clients, the real engine."""

import http.client
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import jsonschema
import pytest
from tritonclient.grpc import InferenceServerClient

from specbackend.serving.client import Answer, generate_http, stream_grpc, stream_http
from specbackend.serving.tritonserver import TritonServer, TritonServerError, processes_of
from specbackend.tokenizer import Tokenizer
from tests.conftest import DEMO_TARGET
from tests.e2e.conftest import engine_pid, make_repository, slots
from tests.test_tools import load_tool

NUM_REQUESTS, CONCURRENCY, MAX_TOKENS = 40, 16, 48
UNSUPPORTED, UNAVAILABLE = (400, 501), (400, 503)  # by Triton's version: 2.51 answers 400 to every model error
CLIENTS = {"grpc": stream_grpc, "http": stream_http}


def ask(server: TritonServer, kind: str, model: str, inputs: dict, **options) -> Answer:
    url = server.grpc_url if kind == "grpc" else server.http_url
    return CLIENTS[kind](url, model, inputs, **options)


def chat(question: str) -> str:
    return Tokenizer(DEMO_TARGET).apply_chat_template([{"role": "user", "content": question}])


def wait_until(condition, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def questions(gsm8k_questions) -> list[str]:
    return gsm8k_questions[: NUM_REQUESTS // 2]


@pytest.fixture(scope="module")
def expected(offline, questions) -> dict[str, dict]:
    """The offline engine's answer to each question, as a chat."""
    chats = [chat(question) for question in questions]
    answers = offline.generate(chats, {"max_new_tokens": MAX_TOKENS, "temperature": 0})
    return dict(zip(questions, answers, strict=True))


@pytest.mark.parametrize("model", ["llm", "ensemble"])
def test_concurrent_streams_equal_the_offline_engine(server, expected, questions, model):
    """Through llm a third of the clients leaves after two responses; of them only the cache keeps something."""

    def run(number: int) -> tuple[str, Answer]:
        question = questions[number % len(questions)]
        text = question if model == "ensemble" else chat(question)
        inputs = {"text_input": text, "max_tokens": MAX_TOKENS, "stream": True}
        kind = "grpc" if number < NUM_REQUESTS // 2 else "http"
        cancel_after = 2 if model == "llm" and number % 3 == 0 else None
        return question, ask(server, kind, model, inputs, cancel_after=cancel_after, request_id=str(number % 5))

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        answers = list(pool.map(run, range(NUM_REQUESTS)))
    assert [answer.error for _, answer in answers] == [None] * NUM_REQUESTS
    for question, answer in answers:
        if answer.cancelled:
            assert expected[question]["text"].startswith(answer.text)
        else:
            assert answer.text == expected[question]["text"]
            assert len(answer.responses) > 1
    assert any(answer.cancelled for _, answer in answers) == (model == "llm")
    assert wait_until(lambda: slots(server)["used"] == 0, 5), slots(server)
    assert slots(server)["free"] == slots(server)["max"]


def test_one_response_without_stream(server, expected, questions):
    inputs = {"text_input": questions[0], "max_tokens": MAX_TOKENS, "return_finish_reason": True}
    inputs |= {"return_num_input_tokens": True, "return_num_output_tokens": True, "return_perf_metrics": True}
    status, body = generate_http(server.http_url, "ensemble", inputs)
    meta = expected[questions[0]]["meta_info"]
    assert (status, body["text_output"]) == (200, expected[questions[0]]["text"])
    assert body["finish_reason"] == meta["finish_reason"]
    assert body["num_input_tokens"] == meta["prompt_tokens"]
    assert body["num_output_tokens"] == meta["completion_tokens"]
    assert body["acceptance_length"] == pytest.approx(meta["accept_length"])
    answer = stream_grpc(server.grpc_url, "ensemble", inputs)
    assert [r["text_output"] for r in answer.responses] == [body["text_output"]]
    assert "output_ids" not in body


def test_token_ids_and_speculation_switched_off(server, offline):
    ids = offline.tokenizer.encode("How many eggs")
    inputs = {"input_ids": ids, "max_tokens": 20, "return_output_ids": True, "return_perf_metrics": True}
    fast = stream_grpc(server.grpc_url, "llm", inputs).responses[0]
    plain = stream_grpc(server.grpc_url, "llm", {**inputs, "num_draft_tokens": 0}).responses[0]
    assert (
        fast["output_ids"]
        == plain["output_ids"]
        == offline.generate(input_ids=ids, sampling_params={"max_new_tokens": 20, "temperature": 0})["output_ids"]
    )
    assert plain["acceptance_length"] <= fast["acceptance_length"]
    assert plain["total_draft_tokens"] == 0


@pytest.mark.parametrize("speculative", [True, False], ids=["drafted", "plain"])
def test_sampling_parameters_reach_the_engine(server, offline, speculative):
    ids = list(range(40, 60))
    params = {
        "max_new_tokens": 20,
        "seed": 3,
        "top_k": 30,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.5,
        "min_new_tokens": 5,
        "min_p": 0.01,
        "logit_bias": {"50": 2.5},
        "bad_words_ids": [[51], [50, 50]],
    }
    as_json = {name: json.dumps(params[name]) for name in ("logit_bias", "bad_words_ids")}
    request = {"input_ids": ids, "return_output_ids": True, "speculative": speculative, **params, **as_json}
    status, body = generate_http(server.http_url, "llm", request)
    assert status == 200, body
    expected = offline.generate(input_ids=ids, sampling_params={**params, "temperature": 1.0})["output_ids"]
    assert body["output_ids"] == expected


@pytest.fixture(scope="module")
def several(offline, questions) -> tuple[dict, list[str]]:
    """A request for three sampled answers, and the offline engine's."""
    inputs = {"max_tokens": 24, "temperature": 1.2, "seed": 7, "num_return_sequences": 3}
    params = {"max_new_tokens": 24, "temperature": 1.2, "seed": 7, "n": 3}
    texts = [answer["text"] for answer in offline.generate(chat(questions[0]), params)]
    assert len(set(texts)) == 3
    return inputs, texts


def prompt_for(model: str, question: str) -> dict:
    return {"text_input": question if model == "ensemble" else chat(question)}


@pytest.mark.parametrize("model", ["llm", "ensemble"])
def test_several_answers_in_one_response(server, questions, several, model):
    inputs, texts = several
    inputs = {**prompt_for(model, questions[0]), **inputs, "return_finish_reason": True}
    status, body = generate_http(server.http_url, model, inputs)
    assert (status, body["text_output"], body["sequence_index"]) == (200, texts, [0, 1, 2])
    assert len(body["finish_reason"]) == 3
    answer = stream_grpc(server.grpc_url, model, inputs)
    assert [response["text_output"] for response in answer.responses] == [texts]
    assert answer.error is None


@pytest.mark.parametrize("kind", CLIENTS)
@pytest.mark.parametrize("model", ["llm", "ensemble"])
def test_several_answers_as_streams(server, questions, several, model, kind):
    inputs, texts = several
    inputs = {**prompt_for(model, questions[0]), **inputs, "stream": True}
    answer = ask(server, kind, model, {**inputs, "return_finish_reason": True})
    assert answer.error is None and len(answer.responses) > 3
    assert [answer.texts[index] for index in range(3)] == texts
    assert sum("finish_reason" in response for response in answer.responses) == 3


def test_several_answers_are_dropped_together(server):
    inputs = {"text_input": "How many", "max_tokens": 900, "end_id": -1, "stream": True, "num_return_sequences": 4}
    assert ask(server, "grpc", "llm", inputs, cancel_after=2).cancelled
    assert wait_until(lambda: slots(server)["used"] == 0, 5), slots(server)


@pytest.mark.parametrize("model", ["llm", "ensemble"])
def test_logprobs(server, offline, questions, model):
    inputs = {**prompt_for(model, questions[0]), "max_tokens": 20, "logprobs": 1, "prompt_logprobs": 0}
    body = generate_http(server.http_url, model, {**inputs, "return_log_probs": True})[1]
    sampling = {"temperature": 0, "max_new_tokens": 20, "logprobs": 1, "prompt_logprobs": 0}
    meta = offline.generate(chat(questions[0]), sampling)["meta_info"]
    expected = [logprob for logprob, *_ in meta["output_token_logprobs"]]
    assert body["output_log_probs"] == pytest.approx(expected, abs=1e-4)
    assert body["cum_log_probs"] == pytest.approx(sum(expected), abs=1e-3)
    places = json.loads(body["logprobs"])
    assert [next(iter(place)) for place in places] == [str(token) for _, token, _ in meta["output_token_logprobs"]]
    assert "".join(next(iter(place.values()))["decoded_token"] for place in places) == body["text_output"]
    assert len(json.loads(body["prompt_logprobs"])) == len(meta["input_token_logprobs"])


@pytest.mark.parametrize("model", ["llm", "ensemble"])
def test_traces(server, offline, questions, model):
    """Of the offline engine's steps, response by response; times are of the same clock as Triton's process has."""
    inputs = {**prompt_for(model, questions[0]), "max_tokens": 20, "return_spec_trace": True}
    expected = offline.generate(
        chat(questions[0]), {"temperature": 0, "max_new_tokens": 20, "return_spec_trace": True}
    )["meta_info"]["spec_trace"]
    status, body = generate_http(server.http_url, model, inputs)
    assert status == 200, body
    started = time.monotonic()
    answer = ask(server, "grpc", model, {**inputs, "stream": True})
    elapsed_ms = 1e3 * (time.monotonic() - started)
    assert answer.error is None and len(answer.responses) > 2
    for responses in ([body], answer.responses):
        for response in responses:
            steps = json.loads(response["spec_trace"])
            assert "".join(text for step in steps for text in step["token_texts"]) == response["text_output"]
        steps = [step for response in responses for step in json.loads(response["spec_trace"])]
        for step, other in zip(steps, expected, strict=True):
            assert [step[name] for name in ("kind", "token_ids", "accepted", "bonus")] == [
                other[name] for name in ("kind", "token_ids", "accepted", "bonus")
            ]
            assert step.get("tree", {}).get("token_ids") == other.get("tree", {}).get("token_ids")
    assert 0 < steps[0]["started_ms"] < steps[-1]["started_ms"] + steps[-1]["step_ms"] < elapsed_ms
    assert "spec_trace" not in generate_http(server.http_url, model, prompt_for(model, questions[0]))[1]


def test_a_tree_of_its_own(server, offline):
    inputs = {"text_input": "How many eggs", "max_tokens": 20, "return_perf_metrics": True}
    whole = generate_http(server.http_url, "llm", inputs)[1]
    small = generate_http(server.http_url, "llm", {**inputs, "num_draft_tokens": 3})[1]
    assert small["text_output"] == whole["text_output"]
    assert small["total_draft_tokens"] == 2 * small["num_spec_steps"]
    assert whole["total_draft_tokens"] == 7 * whole["num_spec_steps"]
    status, body = generate_http(server.http_url, "llm", {**inputs, "speculative_num_steps": 99})
    assert status == 400 and "speculative_num_steps: must be at most the server's 5" in body["error"]


def test_a_shown_stop_string_and_special_tokens(server, offline):
    text = offline.generate("How many eggs", {"max_new_tokens": 20, "temperature": 0})["text"]
    inputs = {"text_input": "How many eggs", "max_tokens": 20, "stop_words": [text[8:12]], "no_stop_trim": True}
    assert generate_http(server.http_url, "llm", inputs)[1]["text_output"] == text[: text.index(text[8:12]) + 4]
    inputs = {"text_input": chat("What is 2 + 2?"), "max_tokens": 400, "skip_special_tokens": False}
    without, with_it = [
        generate_http(server.http_url, "llm", {**inputs, "include_stop_str_in_output": each})[1]["text_output"]
        for each in (False, True)
    ]
    assert with_it.startswith(without) and "<|" in with_it[len(without) :]


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer", "minimum": 0}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
GUIDES = [
    {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": json.dumps(SCHEMA)},
    {"json_schema": json.dumps(SCHEMA)},
    {"structured_outputs": json.dumps({"json": SCHEMA})},
]


@pytest.mark.parametrize("model", ["llm", "ensemble"])
@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: next(iter(guide)))
def test_structured_output(server, questions, model, guide):
    inputs = {**prompt_for(model, questions[0]), **guide, "max_tokens": 120, "temperature": 1.0, "seed": 4}
    texts = []
    for speculative in (True, False):
        status, body = generate_http(server.http_url, model, {**inputs, "speculative": speculative})
        assert status == 200, body
        texts.append(body["text_output"])
    assert texts[0] == texts[1]
    jsonschema.validate(json.loads(texts[0]), SCHEMA)


@pytest.mark.parametrize("model", ["llm", "ensemble"])
@pytest.mark.parametrize(
    ("inputs", "status", "message"),
    [
        ({"text_input": ""}, 400, "text_input: is required and must not be empty"),
        ({"text_input": "x " * 3000}, 400, "too many for context_length 1024"),
        ({"text_input": "x" * 10_000_000}, 400, "text_input: has 10000000 bytes"),
        ({"text_input": "x", "max_tokens": 0}, 400, "max_tokens: must be between 1"),
        ({"text_input": "x", "max_tokens": -5}, 400, "max_tokens: must be between 1"),
        ({"text_input": "x", "temperature": -1.0}, 400, "temperature: must be finite"),
        ({"text_input": "x", "top_p": 1.5}, 400, "top_p: must be above 0 and at most 1"),
        ({"text_input": "x", "logit_bias": '{"1024": 1}'}, 400, "logit_bias: 1024 is not an id of the vocabulary"),
        ({"text_input": "x", "n": 0}, 400, "n: must be between 1"),
        ({"text_input": "x", "regex": "("}, 400, "regex: cannot be compiled"),
        ({"text_input": "x", "regex": "((a{1,900}){1,900}){1,900}"}, 400, "regex: "),
        ({"text_input": "x", "json_schema": '{"not":' * 3000 + "{}" + "}" * 3000}, 400, "json_schema: is nested"),
        (
            {"text_input": "x", "guided_decoding_guide_type": "regex", "guided_decoding_guide": "("},
            400,
            "guided_decoding_guide: cannot be compiled",
        ),
        ({"text_input": "x", "custom_params": "{}"}, 400, "custom_params: this server has no"),
        ({"text_input": "x", "best_of": 2}, UNSUPPORTED, "best_of: is not supported"),
        ({"text_input": "x", "n": 2, "return_output_ids": True}, UNSUPPORTED, "return_output_ids: output_ids of"),
        ({"text_input": "x", "beam_width": 4}, UNSUPPORTED, "beam_width: is not supported"),
        ({"text_input": "x", "no_such_thing": 4}, 400, "no_such_thing: is not a known parameter"),
        ({"text_input": "x", "timeout": 1}, 400, "Request timeout expired"),
        ({"text_input": "x", "max_tokens": "many"}, 500, "Unable to parse 'data'"),
    ],
)
def test_bad_input_is_named_and_the_server_lives(server, model, inputs, status, message):
    got_status, body = generate_http(server.http_url, model, inputs)
    assert message in body["error"]
    assert got_status in (status if isinstance(status, tuple) else (status,))
    assert generate_http(server.http_url, model, {"text_input": "How many", "max_tokens": 1})[0] == 200


def test_large_form_encoded_body_is_refused_and_the_server_lives(server):
    """curl -d names this content type by default; tritonserver then parses the body on a thread's stack."""
    body = json.dumps({"text_input": "x" * 10_000_000})
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    with closing(http.client.HTTPConnection(server.http_url, timeout=30)) as connection:
        connection.request("POST", "/v2/models/llm/generate", body, headers)
        response = connection.getresponse()
        assert (response.status, "text_input: has 10000000 bytes" in response.read().decode()) == (400, True)
    assert generate_http(server.http_url, "llm", {"text_input": "How many", "max_tokens": 1})[0] == 200


def test_bad_token_ids(server):
    answer = stream_grpc(server.grpc_url, "llm", {"input_ids": [5, 10**6]})
    assert "input_ids: must lie between 0 and" in answer.error


@pytest.mark.parametrize("model", ["llm", "ensemble"])
def test_audit_of_a_running_server(server, questions, monkeypatch, capsys, tmp_path, model):
    audit, prompts = load_tool("audit", monkeypatch), tmp_path / "prompts.jsonl"
    texts = questions[:4] if model == "ensemble" else map(chat, questions[:4])
    prompts.write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    params = '{"top_p": 0.9, "stop": ["####"], "bad_words_ids": [[50, 50]], "frequency_penalty": 0.1}'
    command = ["audit", "--url", server.grpc_url, "--model", model, "--params", params, "--prompts", str(prompts)]
    command += ["--max-new-tokens", "24", "--draws", "60", "--draw-prompts", "1"]
    command += ["--html", str(tmp_path / "report.html")]
    monkeypatch.setattr("sys.argv", command)
    assert audit.main() == 0, capsys.readouterr().out
    greedy, seeded, distributions = capsys.readouterr().out.splitlines()
    assert "4 prompts" in greedy and "all equal; accept length" in seeded
    assert "1 prompts, 60 draws each way, 5 tests: no difference" in distributions
    assert f"model {model}" in (tmp_path / "report.html").read_text()


def test_stop_cancels_by_request_id(server):
    """The way to cancel through the ensemble, too, where Triton does not pass cancellation on."""
    inputs = {"text_input": "How many", "max_tokens": 900, "end_id": -1, "stream": True, "return_finish_reason": True}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, server, "grpc", "ensemble", inputs, request_id="long")
        time.sleep(0.5)
        stopped = ask(server, "grpc", "ensemble", {"text_input": "x", "stop": True}, request_id="long")
        assert stopped.text == "" and stopped.error is None
        assert running.result(10).responses[-1]["finish_reason"] == "abort"


def test_killed_engine(server):
    """Clients hear of it within a second, the next request is served, and health was never wrong."""
    inputs = {"text_input": "How many", "max_tokens": 900, "end_id": -1, "stream": True}
    with ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(ask, server, kind, "llm", inputs) for kind in ("grpc", "http") * 2]
        single = pool.submit(generate_http, server.http_url, "llm", {**inputs, "stream": False})
        time.sleep(0.7)
        os.kill(engine_pid(server), signal.SIGKILL)
        killed = time.monotonic()
        errors = [answer.result(10).error for answer in answers]
        assert time.monotonic() - killed < 1
    known = ("the engine process was killed by SIGKILL", "the engine process has ended")  # to the face that started it
    assert {error.endswith(known) for error in errors} == {True}, errors
    assert all(answer.result().responses for answer in answers)
    assert single.result()[0] in UNAVAILABLE
    assert generate_http(server.http_url, "llm", {"text_input": "How many", "max_tokens": 3})[0] == 200


def test_reload_under_load(tmp_path):
    """Triton starts the new instance before the old one has finished: both have an engine, and nothing is lost."""
    repository = make_repository(tmp_path / "models")
    args = ["--model-control-mode=explicit", "--load-model=*"]
    with TritonServer(repository, log_path=tmp_path / "server.log", args=args) as server:
        old_engine = engine_pid(server)
        inputs = {"text_input": "How many", "max_tokens": 300, "end_id": -1, "stream": True}
        with ThreadPoolExecutor(3) as pool:
            answers = [pool.submit(ask, server, "grpc", "llm", inputs) for _ in range(3)]
            time.sleep(0.3)
            make_repository(repository, random_seed=1)  # only a changed model is loaded anew
            with closing(InferenceServerClient(server.grpc_url)) as client:
                client.load_model("llm")
            assert generate_http(server.http_url, "llm", {"text_input": "How many", "max_tokens": 3})[0] == 200
            assert [answer.result().error for answer in answers] == [None] * 3
            assert len({answer.result().text for answer in answers}) == 1
        assert wait_until(lambda: old_engine not in processes_of(server.server_id), 10)
        assert generate_http(server.http_url, "ensemble", {"text_input": "How many", "max_tokens": 3})[0] == 200


def test_killed_tritonserver_leaves_no_process(tmp_path):
    with TritonServer(make_repository(tmp_path / "models"), log_path=tmp_path / "server.log") as server:
        inputs = {"text_input": "How many", "max_tokens": 900, "end_id": -1, "stream": True}
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, server, "grpc", "llm", inputs)
            time.sleep(0.5)
            server.process.kill()
            server.process.wait()
            assert wait_until(lambda: not processes_of(server.server_id), 2), processes_of(server.server_id)
            assert answer.result(10).error


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"speculative_steps": 3}, "unknown parameter speculative_steps; known: attention_backend, "),
        ({"context_length": 4096}, "context_length: 4096 is more than the model's 1024"),
    ],
)
def test_wrong_parameters_stop_the_server_with_a_reason(tmp_path, params, message):
    repository = make_repository(tmp_path / "models", **params)
    with pytest.raises(TritonServerError) as error, TritonServer(repository, log_path=tmp_path / "server.log"):
        pass
    assert message in str(error.value)
