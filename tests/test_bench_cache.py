"""tools/bench_cache with a few conversations and the real tritonserver."""

import json
import sys
from importlib.util import find_spec

import pytest

from tests.test_tools import load_tool

TINY = ("--conversations", 6, "--system-tokens", 70, "--max-new-tokens", 4, "--num-threads", 1)
POOL = ("--context-length", 512, "--max-total-tokens", 520)  # of two or three conversations


@pytest.mark.skipif(find_spec("pytriton") is None, reason="needs the tritonserver wheel")
def test_every_tier_finds_more(monkeypatch, tmp_path):
    module = load_tool("bench_cache", monkeypatch)
    figures = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["bench_cache", *map(str, (*TINY, *POOL, "--json", figures))])
    assert module.main() == 0
    rows = json.loads(figures.read_text())["rows"]
    rates = {(row["cache"], row["turn"]): row["hit_rate"] for row in rows}
    assert len(rates) == 10 and all(row["equal"] == row["requests"] == 6 for row in rows)
    assert rates["no cache", 1] == rates["no cache", 2] == 0
    assert 0 < rates["pool", 1] < rates["restarted", 1]
    for name in ("pool, sidecar", "restarted", "two servers"):
        assert rates["pool", 2] < rates[name, 2]
    assert all(row["first_token"]["p50_ms"] > 0 for row in rows)
