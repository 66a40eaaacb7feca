"""Both faces on the real tritonserver: the very tensors that the stock clients of other backends send."""

import json
import queue
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from tritonclient.utils import np_to_triton_dtype

from specbackend.serving.client import generate_http, stream_grpc, stream_http

PROMPT = "How many eggs"
GREEDY = {"temperature": 0, "max_new_tokens": 30}


def send(
    server,
    model: str,
    tensors: Mapping[str, np.ndarray],
    outputs: Iterable[str] = (),
    parameters=None,
    request_id="",
    has_begun: threading.Event | None = None,
) -> list[grpc_client.InferResult]:
    """The responses to a request of these very tensors. Fails if one of them is an error.

    has_begun: is set when the first one arrives.
    """
    results, inputs, has_begun = queue.SimpleQueue(), [], has_begun or threading.Event()
    for name, array in tensors.items():
        inputs.append(grpc_client.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    with closing(grpc_client.InferenceServerClient(server.grpc_url)) as client:
        client.start_stream(callback=lambda result, error: (results.put((result, error)), has_begun.set()))
        requested = [grpc_client.InferRequestedOutput(name) for name in outputs] or None
        client.async_stream_infer(model, inputs, outputs=requested, parameters=parameters, request_id=request_id)
        client.stop_stream()  # waits for the last response
    pairs = [results.get() for _ in range(results.qsize())]
    assert [error for _, error in pairs if error] == []
    assert pairs[-1][0].get_response().parameters["triton_final_response"].bool_param
    return [result for result, _ in pairs]


def texts(results: Iterable[grpc_client.InferResult]) -> str:
    return "".join(result.as_numpy("text_output").item().decode() for result in results)


def text(*strings: str) -> np.ndarray:
    return np.array([string.encode() for string in strings], dtype=object)


@pytest.fixture(scope="module")
def answer(offline) -> str:
    return offline.generate(PROMPT, GREEDY)["text"]


# ---- the vLLM backend's clients


@pytest.mark.parametrize("stream", [True, False])
def test_vllm_backends_sample_client(server, answer, stream):
    """It sends its parameters twice, as a tensor and as strings among the request's parameters."""
    sampling = {"temperature": "0", "top_p": "0.95", "max_tokens": "30"}
    tensors = {
        "text_input": text(PROMPT),
        "stream": np.array([stream]),
        "sampling_parameters": text(json.dumps(sampling)),
        "exclude_input_in_output": np.array([True]),
    }
    results = send(server, "vllm_model", tensors, ["text_output"], sampling, request_id="0")
    assert texts(results) == answer
    assert (len(results) > 1) == stream
    assert {(*result.as_numpy("text_output").shape, result.get_response().id) for result in results} == {(1, "0")}


def test_vllm_backends_additional_outputs(server, answer):
    flags = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")
    tensors = {
        "text_input": text(PROMPT),
        "stream": np.array([True]),
        "sampling_parameters": text('{"temperature": 0, "max_tokens": 30, "logprobs": 1}'),
        **{f"return_{name}": np.array([True]) for name in flags},
    }
    results = send(server, "vllm_model", tensors)
    types = {"finish_reason": object, "cumulative_logprob": np.float32, "logprobs": object}
    types |= {"num_input_tokens": np.uint32, "num_output_tokens": np.uint32}
    for result in results:
        assert {output.name for output in result.get_response().outputs} == {"text_output", *flags}
        assert all(result.as_numpy(name).dtype == dtype for name, dtype in types.items())
        assert all(result.as_numpy(name).shape == (1,) for name in flags)
    reasons = [result.as_numpy("finish_reason").item().decode() for result in results]
    assert reasons == ["None"] * (len(results) - 1) + ["length"]
    assert sum(result.as_numpy("num_output_tokens").item() for result in results) == 30
    places = [place for result in results for place in json.loads(result.as_numpy("logprobs").item())]
    assert len(places) == 30
    assert "".join(next(iter(place.values()))["decoded_token"] for place in places) == answer
    chosen = sum(next(iter(place.values()))["logprob"] for place in places)
    assert results[-1].as_numpy("cumulative_logprob").item() == pytest.approx(chosen, abs=1e-3)


def test_vllm_backends_curl(server, answer):
    """Parameters of the request, with a prompt in front of the answer unless it streams."""
    asked = {"text_input": PROMPT, "parameters": {"stream": False, "temperature": 0, "max_tokens": 30}}
    status, body = generate_http(server.http_url, "vllm_model", asked)
    assert (status, body["text_output"]) == (200, PROMPT + answer)
    streamed = stream_http(
        server.http_url, "vllm_model", asked | {"parameters": {**asked["parameters"], "stream": True}}
    )
    assert streamed.text == answer and len(streamed.responses) > 1
    sampled = generate_http(server.http_url, "vllm_model", {"text_input": PROMPT, "exclude_input_in_output": True})[1]
    assert len(sampled["text_output"]) < len(answer)  # 16 tokens, vLLM's default


@pytest.mark.parametrize("stream", [True, False])
def test_several_answers_of_vllm_model(server, offline, stream):
    params = {"temperature": 1.2, "seed": 7, "n": 3}
    expected = [each["text"] for each in offline.generate(PROMPT, {**params, "max_new_tokens": 16})]
    inputs = {"text_input": PROMPT, "stream": stream, "exclude_input_in_output": True}
    inputs |= {"sampling_parameters": json.dumps(params), "return_finish_reason": True}
    got = stream_grpc(server.grpc_url, "vllm_model", inputs)
    assert got.error is None
    assert [got.texts[index] for index in range(3)] == expected
    assert all(len(each["finish_reason"]) == len(each["text_output"]) == 3 for each in got.responses)


GENAI_PERF = {"max_tokens": "30", "min_tokens": "30"}


def test_genai_perf_vllm(server):
    tensors = {
        "text_input": text(PROMPT),
        "exclude_input_in_output": np.array([True]),
        "stream": np.array([True]),
        "sampling_parameters": text(json.dumps(GENAI_PERF)),
    }
    results = send(server, "vllm_model", tensors, ["text_output"])
    assert len(results) > 1 and texts(results)


@pytest.mark.parametrize("stream", [True, False])
def test_tritons_openai_frontend_in_vllms_format(server, offline, answer, stream):
    """The frontend sends all of its own parameters, and wants both counts and one whole string in each response."""
    sampling = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "logprobs": False, "n": 1, "temperature": 0.0}
    sampling |= {"top_p": 1.0, "max_tokens": 30, "stop": ["no such thing"]}
    tensors = {
        "text_input": text(PROMPT),
        "stream": np.array([stream]),
        "exclude_input_in_output": np.array([True]),
        "sampling_parameters": text(json.dumps(sampling)),
        "return_num_input_tokens": np.array([True]),
        "return_num_output_tokens": np.array([True]),
    }
    results = send(server, "vllm_model", tensors)
    assert texts(results) == answer
    prompt_tokens = len(offline.tokenizer.encode(PROMPT))
    assert {result.as_numpy("num_input_tokens").item() for result in results} == {prompt_tokens}
    assert sum(result.as_numpy("num_output_tokens").item() for result in results) == 30


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"stream": True, "exclude_input_in_output": False},
            "When streaming, `exclude_input_in_output` = False is not",
        ),
        ({"image": ["aGk="]}, "image: is not supported"),
        ({"embedding_request": "{}"}, "embedding_request: is not supported"),
        ({"sampling_parameters": '{"lora_name": "x"}'}, "lora_name: is not supported"),
        ({"sampling_parameters": '{"best_of": 2}'}, "best_of: is not supported"),
        ({"sampling_parameters": "{"}, "sampling_parameters: must be"),
    ],
)
def test_what_vllm_model_refuses(server, inputs, message):
    for got in (
        stream_grpc(server.grpc_url, "vllm_model", {"text_input": PROMPT, **inputs}),
        stream_http(server.http_url, "vllm_model", {"text_input": PROMPT, **inputs}),
    ):
        assert message in got.error


# ---- TensorRT-LLM's clients


def row(value, dtype) -> np.ndarray:
    """[1, n]"""
    return np.array([value if isinstance(value, list) else [value]], dtype=dtype)


PERF_METRICS = {"kv_cache_alloc_new_blocks", "kv_cache_reused_blocks", "kv_cache_alloc_total_blocks"}
PERF_METRICS |= {"arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns"}
PERF_METRICS |= {"acceptance_rate", "total_accepted_draft_tokens", "total_draft_tokens"}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("model", ["llm", "ensemble"])
def test_end_to_end_grpc_client(server, offline, answer, model, stream):
    tensors = {
        "text_input": row(PROMPT.encode(), object),
        "max_tokens": row(30, np.int32),
        "stream": row(stream, bool),
        "beam_width": row(1, np.int32),
        "temperature": row(0.0, np.float32),
        "embedding_bias_words": row([], object),
        "embedding_bias_weights": row([], np.float32),
        "return_log_probs": row(True, bool),
        "return_context_logits": row(False, bool),
        "return_generation_logits": row(False, bool),
        "return_perf_metrics": row(True, bool),
        "pad_id": row(0, np.int32),
        "exclude_input_in_output": row(True, bool),
    }
    if model == "ensemble":
        tensors["apply_chat_template"] = row(False, bool)  # else the same words are another prompt
    outputs = ["text_output", "cum_log_probs", "output_log_probs", "context_logits", "generation_logits", "batch_index"]
    results = send(server, model, tensors, [*outputs, *sorted(PERF_METRICS)], request_id="1")
    assert "".join(result.as_numpy("text_output")[0].decode() for result in results) == answer
    indices = [result.as_numpy("batch_index") for result in results]
    assert all(index is None if model == "ensemble" else index.item() == 0 for index in indices)  # none: 0
    assert sum(result.as_numpy("output_log_probs").shape[2] for result in results) == 30
    last = {name: results[-1].as_numpy(name) for name in PERF_METRICS}
    assert {array.shape for array in last.values()} == {(1, 1)}
    times = ["arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns"]
    assert sorted(times, key=lambda name: last[name].item()) == times
    total = len(offline.tokenizer.encode(PROMPT)) + 30
    assert last["kv_cache_alloc_total_blocks"].item() == total
    assert last["kv_cache_alloc_new_blocks"].item() + last["kv_cache_reused_blocks"].item() == total


def token_tensors(offline, **more: np.ndarray) -> dict[str, np.ndarray]:
    prompt = offline.tokenizer.encode(PROMPT)
    return {
        "input_ids": row(prompt, np.int32),
        "input_lengths": row(len(prompt), np.int32),
        "request_output_len": row(30, np.int32),
        "streaming": row(True, bool),
        **more,
    }


def ids_of(results: Iterable[grpc_client.InferResult]) -> list[int]:
    """As TensorRT-LLM's clients read them: of the only beam, if it has any."""
    return [
        token
        for result in results
        if result.as_numpy("sequence_length")[0][0] > 0
        for token in list(result.as_numpy("output_ids")[0][0])
    ]


def test_inflight_batcher_llm_client(server, offline):
    """It requests no outputs by name, and gets ids because it sends ids."""
    sent = {"beam_width": row(1, np.int32), "temperature": row(1.0, np.float32), "end_id": row(-1, np.int32)}
    sent |= {"pad_id": row(50256, np.int32), "runtime_top_k": row(1, np.int32), "runtime_top_p": row(0.0, np.float32)}
    results = send(server, "llm", token_tensors(offline, **sent))
    assert ids_of(results) == offline.generate(PROMPT, GREEDY | {"ignore_eos": True})["output_ids"]
    assert len(results) > 1


def test_inflight_batcher_llm_client_stops_a_request(server, offline):
    """The request to stop has garbage for a prompt, and a parameter of its own."""
    stop = {"input_ids": row(10**9, np.int32), "input_lengths": row(0, np.int32)}
    stop |= {"request_output_len": row(0, np.int32), "stop": row(True, bool)}
    sent = {"request_output_len": row(900, np.int32), "end_id": row(-1, np.int32)}
    has_begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(send, server, "llm", token_tensors(offline, **sent), request_id="7", has_begun=has_begun)
        assert has_begun.wait(20)
        [stopped] = send(server, "llm", stop, parameters={"Streaming": True}, request_id="7")
        assert stopped.as_numpy("output_ids") is None  # how the client knows
        assert 0 < len(ids_of(running.result(20))) < 900


def test_genai_perf_tensorrtllm(server):
    tensors = {"text_input": row(PROMPT.encode(), object), "max_tokens": row(30, np.int32), "stream": row(True, bool)}
    tensors |= {"min_length": row(30, np.int32), "exclude_input_in_output": row(True, bool)}
    results = send(server, "llm", tensors, ["text_output"])
    assert len(results) > 1 and texts(results)


def test_genai_perf_tensorrtllm_engine(server, offline):
    end_id = offline.model_config.eos_token_ids[0]
    tensors = token_tensors(offline, min_length=row(30, np.int32), end_id=row(end_id, np.int32))
    results = send(server, "llm", tensors)
    assert len(ids_of(results)) == 30


@pytest.mark.parametrize("stream", [True, False])
def test_tritons_openai_frontend_in_tensorrt_llms_format(server, offline, answer, stream):
    tensors = {
        "text_input": row(PROMPT.encode(), object),
        "stream": row(stream, bool),
        "max_tokens": row(30, np.int32),
        "stop_words": row([b"no such thing", b"nor this"], object),
        "top_p": row(1.0, np.float32),
        "frequency_penalty": row(0.0, np.float32),
        "presence_penalty": row(0.0, np.float32),
        "seed": row(7, np.uint64),
        "temperature": row(0.0, np.float32),
        "return_num_input_tokens": row(True, bool),
        "return_num_output_tokens": row(True, bool),
    }
    results = send(server, "llm", tensors)
    assert texts(results) == answer
    prompt_tokens = len(offline.tokenizer.encode(PROMPT))
    assert {result.as_numpy("num_input_tokens").item() for result in results} == {prompt_tokens}
    assert sum(result.as_numpy("num_output_tokens").item() for result in results) == 30


def test_tensorrt_llms_other_model(server, answer):
    """The names of its LLM API's model, whose parameters have a prefix."""
    inputs = {
        "text_input": PROMPT,
        "streaming": True,
        "sampling_param_max_tokens": 30,
        "sampling_param_stop": [answer[9:12]],
    }
    inputs |= {"return_finish_reason": True, "return_stop_reason": True, "return_cumulative_logprob": True}
    inputs |= {"sampling_param_return_perf_metrics": True}
    got = stream_http(server.http_url, "llm", inputs)
    assert got.text == answer[: answer.index(answer[9:12])]
    last = got.responses[-1]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", answer[9:12])
    assert last["cumulative_logprob"] < 0
    assert last["kv_cache_hit_rate"] == pytest.approx(
        last["kv_cache_reused_block"] / (last["kv_cache_reused_block"] + last["kv_cache_missed_block"])
    )


@pytest.mark.parametrize("model", ["llm", "vllm_model"])
@pytest.mark.parametrize("n", [1, 2])
def test_the_acceptance_histogram_counts_each_step(server, model, n):
    inputs = {"text_input": PROMPT, "n": n, "temperature": 1.0, "seed": 3, "max_tokens": 40, "ignore_eos": True}
    status, body = generate_http(server.http_url, model, {**inputs, "return_perf_metrics": True})
    assert status == 200, body
    counts = np.array(body["acceptance_histogram"]).reshape(n, 6)  # a tree of depth 5
    assert counts.sum(axis=1).tolist() == np.array(body["num_spec_steps"]).reshape(n).tolist()
    accepted = (counts * np.arange(6)).sum(axis=1)
    assert (accepted > 0).all()
    assert accepted.tolist() == np.array(body["total_accepted_draft_tokens"]).reshape(n).tolist()


# ---- conversations


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize("model", ["llm", "vllm_model"])
def test_a_conversation_is_in_the_template_and_its_next_turn_finds_it_in_the_cache(
    server, offline, gsm8k_questions, model
):
    first, second = (says("user", question) for question in gsm8k_questions[20:22])
    asked = {"chat_template_kwargs": '{"unused": 1}', "return_perf_metrics": True, "return_output_ids": True}
    asked |= {"exclude_input_in_output": True, "return_num_input_tokens": True}

    def ask(messages: list[dict], answer_tokens: int) -> dict:
        params = {"temperature": 0, "max_tokens": answer_tokens, "cache_salt": model}  # each its own cache
        params = {"sampling_parameters": json.dumps(params)} if model == "vllm_model" else params
        status, body = generate_http(server.http_url, model, {**asked, **params, "messages": json.dumps(messages)})
        assert status == 200, body
        return body

    one = ask([first], 40)
    rendered = offline.tokenizer.apply_chat_template([first])
    assert one["text_output"] == offline.generate(rendered, {"temperature": 0, "max_new_tokens": 40})["text"]
    two = ask([first, says("assistant", one["text_output"]), second], 4)
    said = offline.tokenizer.encode(rendered, add_special_tokens=False) + one["output_ids"]
    again = offline.tokenizer.apply_chat_template([first, says("assistant", one["text_output"]), second])
    ids = offline.tokenizer.encode(again, add_special_tokens=False)
    assert two["num_input_tokens"] == len(ids)
    shared = next(i for i, (old, new) in enumerate(zip(said + [-1], ids, strict=False)) if old != new)
    assert shared >= len(said) - 2  # the template ends the answer with an end token, which was cut or was said
    assert shared - 3 <= two["num_cached_tokens"] <= shared  # the last tokens' KV, and the draft's, are not kept


@pytest.mark.parametrize("model", ["llm", "vllm_model"])
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"messages": '[{"role": "user", "content": [{"type": "image_url"}]}]'}, "part of type image_url"),
        ({"messages": "[]"}, "messages: is empty"),
        ({"messages": '[{"role": 1}]'}, "messages: message 0 must be an object"),
    ],
)
def test_conversations_that_are_refused(server, model, inputs, message):
    status, body = generate_http(server.http_url, model, inputs)
    assert status in (400, 501) and message in body["error"]
