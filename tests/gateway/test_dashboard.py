"""What the dashboard's routes answer."""

import re
import sys
from collections.abc import Iterator
from urllib.parse import quote

import httpx
import pytest
from fastapi.testclient import TestClient

from specbackend.gateway import dashboard, triton
from specbackend.gateway.app import create_app
from specbackend.gateway.settings import GatewaySettings
from specbackend.serving import metrics
from tests.conftest import DEMO_TARGET
from tests.gateway.fake_upstream import FakeUpstream
from tests.test_tools import load_tool

SERIES = {
    'sglang:num_running_reqs{model="llm",version="1"}': 3.0,
    'vllm:spec_decode_num_accepted_tokens_per_pos_total{model="llm",version="1",position="0"}': 8.0,
    'vllm:spec_decode_num_accepted_tokens_per_pos_total{model="llm",version="1",position="1"}': 5.0,
    'sglang:num_running_reqs{model="o\\"ther",version="1"}': 1.0,
    'vllm:num_requests_running{model="llm",version="1"}': 3.0,  # nothing the page shows
    'nv_inference_count{model="preprocessing",version="1"}': 9.0,
}


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream().running() as running:
        yield running


@pytest.fixture
def page(upstream) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{upstream.url}/dashboard") as client:
        yield client


@pytest.mark.parametrize("name", ["", *sorted(dashboard.FILES)])
def test_files_come_with_a_policy_that_allows_no_inline_script(page, name):
    response = page.get(f"/{name}")
    policy = response.headers["content-security-policy"]
    assert response.status_code == 200
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy


def test_the_page_brings_all_that_it_needs(page):
    """Its files import each other and nothing else, and no script or style is inline."""
    html = page.get("/").text
    named = set(re.findall(r'(?:src|href)="([^"]+)"', html))
    for name in dashboard.FILES:
        if name.endswith(".js"):
            named |= {path.removeprefix("./") for path in re.findall(r'from "([^"]+)"', page.get(f"/{name}").text)}
    assert named == dashboard.FILES - {"index.html"}
    assert not re.search(r"<script>|<style|\son\w+=|\sstyle=", html)


def test_names_outside_the_folder_are_not_found(page):
    for name in ("absent.js", quote("../dashboard.py", safe=""), "..%2fdashboard.py", "/etc/passwd"):
        assert page.get(f"/{name}").status_code == 404


def test_without_a_slash_it_leads_to_the_page(upstream):
    """Relatively, so that it works behind a proxy with a prefix of its own."""
    response = httpx.get(f"{upstream.url}/dashboard")
    assert response.status_code == 307 and response.headers["location"] == "dashboard/"


def test_numbers_by_model():
    assert dashboard.by_model(SERIES) == {
        "llm": {"running": 3.0, "accepted_by_position": {"0": 8.0, "1": 5.0}},
        'o\\"ther': {"running": 1.0},
    }


def test_all_that_is_shown_is_exported():
    """Under the names and labels of the metrics' own table."""
    exported = {}
    for family in metrics.FAMILIES:
        parts = ("_sum", "_count") if family.kind == "HISTOGRAM" else ("",)
        exported |= {family.name + part: family.label for part in parts}
    for family in dashboard.FAMILIES.values():
        assert exported[family.name] == family.by


def test_stats(page):
    assert page.get("/api/stats").json()["models"]["llm"]["running"] == 3


def test_the_gateways_own_model_is_the_first(page, upstream):
    others = [f'sglang:num_running_reqs{{model="{name}",version="1"}} 1' for name in ("vllm_model", "a")]
    upstream.metrics = "\n".join([others[0], upstream.metrics, others[1]])
    assert list(page.get("/api/stats").json()["models"]) == ["llm", "vllm_model", "a"]


def test_stats_of_a_server_that_exports_nothing_say_how_to_switch_it_on(page, upstream):
    upstream.metrics = 'nv_inference_count{model="llm",version="1"} 4\n'
    stats = page.get("/api/stats").json()
    assert stats["state"] == "off" and "REPORT_CUSTOM_METRICS" in stats["problem"]


def test_stats_of_a_server_that_is_down():
    stats = dashboard.read_stats("127.0.0.1:1", "llm")
    assert stats["state"] == "down" and "127.0.0.1:1" in stats["problem"] and "refused" in stats["problem"]


def test_radix_tree(page, upstream):
    upstream.tree = {"engines": [{"pid": 7, "nodes": []}]}
    assert page.get("/api/radix_tree").json() == upstream.tree
    assert upstream.actions == ["tree"]


def test_engines_are_not_asked_for_their_trees(page, upstream):
    upstream.tree = {"engines": [{"pid": 7, "nodes": []}, {"pid": 8, "error": "the engine does not answer"}]}
    assert page.get("/api/engines").json() == upstream.tree
    assert upstream.actions == ["engines"]


def test_radix_tree_of_a_server_without_the_model(page):
    assert "unknown model" in page.get("/api/radix_tree").json()["problem"]


def test_radix_tree_of_a_server_that_is_down():
    with TestClient(create_app(GatewaySettings(str(DEMO_TARGET), grpc_url="127.0.0.1:1"))) as client:
        assert "radix_cache" in client.get("/dashboard/api/radix_tree").json()["problem"]


def test_the_page_waits_for_engines_as_long_as_they_may_take():
    scripts = {name: (dashboard.STATIC / name).read_text() for name in dashboard.FILES if name.endswith(".js")}
    limits = re.findall(r'read\("api/(?:radix_tree|engines)", (\w+)\)', "".join(scripts.values()))
    assert limits == ["ENGINES_TIMEOUT"] * 2
    [milliseconds] = re.findall(r"ENGINES_TIMEOUT = (\d+)", "".join(scripts.values()))
    assert int(milliseconds) > 1000 * triton.ANSWER_TIMEOUT_S


def test_the_gateway_shows_the_page_to_all_and_numbers_to_those_with_a_key():
    settings = GatewaySettings(tokenizer=str(DEMO_TARGET), metrics_url="127.0.0.1:1", api_key=("secret",))
    client = TestClient(create_app(settings))
    assert client.get("/dashboard/").status_code == client.get("/dashboard/app.js").status_code == 200
    assert client.get("/dashboard/api/stats").status_code == 401
    assert client.get("/dashboard/api/radix_tree").status_code == 401
    known = client.get("/dashboard/api/stats", headers={"Authorization": "Bearer secret"})
    assert known.json()["state"] == "down"


def test_the_tool_prints_where_the_page_is(monkeypatch, capsys):
    tool = load_tool("dashboard", monkeypatch)
    served = []
    monkeypatch.setattr("uvicorn.Server.run", lambda server: served.append(server.config))
    flags = ["--tokenizer", str(DEMO_TARGET), "--port", "9123"]
    monkeypatch.setattr(sys, "argv", ["dashboard", *flags, "--api-key", "secret"])
    assert tool.main() == 1  # it has not started
    assert capsys.readouterr().out == "http://127.0.0.1:9123/dashboard/\n"
    client = TestClient(served[0].app)
    assert client.get("/dashboard/").status_code == 200
    assert client.get("/v1/models").status_code == 401
    monkeypatch.setattr(sys, "argv", ["dashboard", *flags, "--api-key", ""])
    with pytest.raises(SystemExit):
        tool.main()
    assert "api_key" in capsys.readouterr().err
