"""SGLang's own routes in front of the real tritonserver."""

import itertools
import json

import httpx
import pytest

from tests.gateway.conftest import MODEL

IDS = [list(range(40, 60)), list(range(70, 80))]
PARAMS = {"max_new_tokens": 20, "temperature": 0}


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, timeout=60) as http:
        yield http


def events(response: httpx.Response) -> list[dict]:
    assert response.status_code == 200, response.text
    *lines, last = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert last == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("form", ["one", "list", "n"])
def test_generate_is_the_engines(http, offline, form):
    params = {**PARAMS, **({"n": 2, "temperature": 0.9, "seed": 3} if form == "n" else {})}
    asked = {"input_ids": IDS if form == "list" else IDS[0], "sampling_params": params}
    expected = offline.generate(input_ids=asked["input_ids"], sampling_params=params)
    whole = http.post("/generate", json=asked).json()
    stream = events(http.post("/generate", json={**asked, "stream": True}))
    rows = zip(*([whole], [expected]) if form == "one" else (whole, expected), strict=True)
    for index, (mine, theirs) in enumerate(rows):
        mine_streamed = [each for each in stream if each.get("index", 0) == index]
        assert mine["text"] == mine_streamed[-1]["text"] == theirs["text"]
        assert mine["output_ids"] == mine_streamed[-1]["output_ids"] == theirs["output_ids"]
        assert len(mine_streamed) > 1
        assert all(b["text"].startswith(a["text"]) for a, b in itertools.pairwise(mine_streamed))
        meta, meta_of_stream, meta_of_engine = mine["meta_info"], mine_streamed[-1]["meta_info"], theirs["meta_info"]
        for name in ("prompt_tokens", "completion_tokens"):
            assert meta[name] == meta_of_stream[name] == meta_of_engine[name]
        assert meta["spec_verify_ct"] == meta_of_engine["spec_verify_ct"]
        assert meta["spec_accept_length"] == pytest.approx(meta_of_engine["accept_length"])
        assert meta["finish_reason"]["type"] == meta_of_engine["finish_reason"]
        assert meta["cached_tokens"] >= 0 and meta["id"]


def test_text_and_each_prompts_own_parameters(http, offline):
    texts, rows = ["How many", "Tom has"], [PARAMS, {"max_new_tokens": 5, "temperature": 0.8, "seed": 4}]
    answers = http.post("/generate", json={"text": texts, "sampling_params": rows, "rid": ["a", "b"]}).json()
    expected = [offline.generate(text, row)["text"] for text, row in zip(texts, rows, strict=True)]
    assert [answer["text"] for answer in answers] == expected
    assert [answer["meta_info"]["id"] for answer in answers] == ["a", "b"]


def test_logprobs_are_the_engines(http, offline):
    asked = {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 0, "return_text_in_logprobs": True}
    answer = http.post("/generate", json={"input_ids": IDS[0], "sampling_params": PARAMS, **asked}).json()
    expected = offline.generate(input_ids=IDS[0], sampling_params=PARAMS, **asked)["meta_info"]
    for name in ("output_token_logprobs", "input_token_logprobs", "output_top_logprobs", "input_top_logprobs"):
        mine, theirs = answer["meta_info"][name], expected[name]
        assert len(mine) == len(theirs)
        for one, other in zip(_triples(mine), _triples(theirs), strict=True):
            assert one[1] == other[1]
            assert one[0] == (other[0] and pytest.approx(other[0]))
            assert one[2] == other[2] or one[0] is None


def _triples(entries: list) -> list:
    return [
        triple for entry in entries if entry for triple in (entry if isinstance(entry[0], list | tuple) else [entry])
    ]


@pytest.mark.parametrize(
    "body, param",
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"text": "a", "frobnicate": 1}, "frobnicate"),
        ({"text": "a", "sampling_params": {"frobnicate": 1}}, "frobnicate"),
        ({"text": "a", "sampling_params": {"top_p": 3}}, "top_p"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
        ({"text": "a", "stream": True, "sampling_params": {"regex": "("}}, "regex"),
        ({"input_ids": [1 << 40]}, "input_ids"),
        ({"input_ids": [100000]}, "input_ids"),
        ({"text": "a", "lora_path": "x"}, "lora_path"),
    ],
)
def test_refusals(http, body, param):
    response = http.post("/generate", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_what_sglang_says_of_the_server(http):
    info = http.get("/get_model_info").json()
    for name in ("model_info", "server_info"):  # their newer names
        assert http.get(f"/{name}").json().keys() == http.get(f"/get_{name}").json().keys()
    http.post("/generate", json={"input_ids": IDS[0], "sampling_params": PARAMS})
    [state] = http.get("/server_info").json()["internal_states"]
    assert 1 <= state["avg_spec_accept_length"] <= 6 and state["last_gen_throughput"] > 0
    assert info["is_generation"] is True and info["tokenizer_path"]
    assert http.get("/get_server_info").json()["served_model_name"] == MODEL
    assert http.get("/health_generate").status_code == 200
    assert http.post("/flush_cache").status_code == 200
