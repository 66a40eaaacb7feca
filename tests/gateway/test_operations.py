"""Clients that leave, limits, health, and a tritonserver that is not there."""

import asyncio
import json
import threading
from collections import Counter

import httpx
import pytest

from specbackend.gateway.errors import ApiError
from specbackend.gateway.triton import Question, TritonServer
from tests.gateway.conftest import MODEL, num_aborted, num_running, running, wait_until

MAX_TOKENS, ANSWERS = 3000, 3
REFUSALS, REFUSED_AT_A_TIME = 4800, 48
SAMPLING = {"n": ANSWERS, "temperature": 0, "ignore_eos": True, "speculative": False}  # some seconds
BODIES = {
    "/v1/chat/completions": {
        **{"model": MODEL, "messages": [{"role": "user", "content": "Go on."}]},
        **{"max_tokens": MAX_TOKENS, **SAMPLING},
    },
    "/v1/completions": {
        **{"model": MODEL, "prompt": ["Go on", "And on", "On"]},
        **{"max_tokens": MAX_TOKENS, **SAMPLING, "n": 1},
    },
    "/generate": {"text": "Go on", "sampling_params": {"max_new_tokens": MAX_TOKENS, **SAMPLING}},
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", BODIES)
def test_the_work_of_a_client_that_leaves_ends(url, settings, path, stream):
    before = num_aborted(settings.metrics_url)

    async def run() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            leaving = asyncio.ensure_future(read_on(http, path, {**BODIES[path], "stream": stream}))
            assert await asyncio.to_thread(wait_until, lambda: num_running(settings.metrics_url) == ANSWERS)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)

    asyncio.run(run())
    assert wait_until(lambda: num_running(settings.metrics_url) == 0)
    assert wait_until(lambda: num_aborted(settings.metrics_url) - before == ANSWERS), "went on to the end"


async def read_on(http: httpx.AsyncClient, path: str, body: dict) -> None:
    async with http.stream("POST", path, json=body) as response:
        async for _ in response.aiter_bytes():
            pass


def test_abort_request(url, settings):
    body = {"text": "Go on", "rid": "mine", "sampling_params": {**BODIES["/generate"]["sampling_params"], "n": 1}}
    answers = []
    asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/generate", json=body, timeout=60)))
    asking.start()
    assert wait_until(lambda: num_running(settings.metrics_url) > 0)
    httpx.post(f"{url}/abort_request", json={"rid": "mine"})
    asking.join()
    assert answers[0].json()["meta_info"]["finish_reason"] == {"type": "abort"}


def test_limits(settings):
    with running(settings, max_body_size=2000, max_open_requests=1, api_key=("key",)) as url:
        keys = {"Authorization": "Bearer key"}
        small, large = {"text": "a", "sampling_params": {"max_new_tokens": 1}}, {"text": "a" * 5_000_000}
        assert httpx.post(f"{url}/generate", json=large).status_code == 401, "read before the key"
        assert httpx.post(f"{url}/generate", json=large, headers=keys).status_code == 413
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/metrics").status_code == 401
        with httpx.stream("POST", f"{url}/generate", json=BODIES["/generate"] | {"stream": True}, headers=keys):
            response = httpx.post(f"{url}/generate", json=small, headers=keys)
            assert (response.status_code, response.headers["Retry-After"]) == (429, "1")
            assert response.json()["error"]["type"] == "rate_limit_error"
            for path, body in (("/abort_request", {"rid": "nobody"}), ("/flush_cache", {})):
                assert httpx.post(f"{url}{path}", json=body, headers=keys).status_code == 200
        assert wait_until(lambda: httpx.post(f"{url}/generate", json=small, headers=keys).status_code == 200)


def test_a_server_survives_what_it_refuses(settings):
    """Before 2.68 tritonserver dies of streams that it ends with gRPC's error codes: of one in some thousands."""

    async def run() -> Counter[int]:
        triton, statuses = TritonServer(settings.grpc_url, settings.model), Counter()

        async def ask() -> None:
            for _ in range(REFUSALS // REFUSED_AT_A_TIME):
                with pytest.raises(ApiError) as refusal:
                    await anext(triton.generate(Question([1], sampling={"temperature": -1})))
                statuses[refusal.value.status] += 1

        await asyncio.gather(*(ask() for _ in range(REFUSED_AT_A_TIME)))
        await triton.close()
        return statuses

    assert asyncio.run(run()) == {400: REFUSALS}


def test_health_and_metrics(url):
    assert httpx.get(f"{url}/health").status_code == 200
    assert "nv_inference_request_success" in httpx.get(f"{url}/metrics").text


def test_the_dashboards_engines(url):
    [engine] = httpx.get(f"{url}/dashboard/api/engines").json()["engines"]
    [same] = httpx.get(f"{url}/dashboard/api/radix_tree").json()["engines"]
    assert engine["pid"] == same["pid"] and engine["nodes"] == []


def test_without_a_tritonserver(settings):
    nowhere = {"grpc_url": "127.0.0.1:9", "metrics_url": "127.0.0.1:9"}
    with running(settings, **nowhere) as url:
        assert httpx.get(f"{url}/health").status_code == 503
        assert httpx.get(f"{url}/metrics").status_code == 503
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["max_model_len"] is None
        assert httpx.get(f"{url}/server_info").status_code == 503
        for stream in (False, True):
            response = httpx.post(f"{url}/generate", json={"text": "a", "stream": stream}, timeout=60)
            assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
            assert response.json()["error"]["type"] == "server_error"


def test_cors(settings):
    page = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    with running(settings, cors_allow_origin=("http://page",), api_key=("key",)) as url:
        response = httpx.options(f"{url}/v1/chat/completions", headers=page)
        assert response.headers["access-control-allow-origin"] == "http://page"
        assert "access-control-allow-origin" in httpx.get(f"{url}/health", headers={"Origin": "http://page"}).headers
        assert "access-control-allow-origin" not in httpx.get(f"{url}/health", headers={"Origin": "http://x"}).headers


def test_no_clients_text_is_logged(url, caplog, capfd, monkeypatch):
    """Not by a bug, either, whose message may quote it."""
    secret = "the butler did it"

    def fail(*args):
        raise ValueError(secret)

    with monkeypatch.context() as bug:
        bug.setattr("specbackend.gateway.app.Generate", fail)
        response = httpx.post(f"{url}/generate", json={"text": secret})
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert "ValueError in" in caplog.text
    httpx.post(f"{url}/v1/chat/completions", json={"model": MODEL, "messages": [{"role": secret, "content": secret}]})
    httpx.post(f"{url}/generate", json={"text": secret, secret: 1})
    httpx.post(f"{url}/generate", content=json.dumps({"text": secret})[:-1])
    shown = capfd.readouterr()
    assert "butler" not in caplog.text + shown.out + shown.err
    assert "/generate" in caplog.text, "looked at nothing"
