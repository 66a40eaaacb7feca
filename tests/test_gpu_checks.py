"""The stages for a GPU, at sizes for a CPU: what they report, not what they find."""

import sys

import pytest
from gpu_checks import flashinfer_stage
from gpu_checks.flashinfer_stage import Case, Heads

from specbackend.attention.flashinfer import FlashInferPlan
from tests.attention import fake_flashinfer

CASES = [Case(3, 12, 4), Case(2, 9, 5, causal=True)]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer.module())
    monkeypatch.setattr(flashinfer_stage, "ARCHIVE", tmp_path / "none")


def check() -> dict:
    out = {}
    flashinfer_stage.check_flashinfer(out, CASES, Heads(4, 2, 64), device="cpu")
    return out["flashinfer"]


def test_flashinfer_stage_compares_and_times(fake):
    found = check()
    assert found["versions"]["flashinfer"] == "fake"
    assert [(row["batch_size"], row["causal"]) for row in found["cases"]] == [(3, False), (2, True)]
    for row in found["cases"]:
        assert row["flashinfer"]["agrees"] and row["flashinfer"]["us"] > 0
        assert isinstance(row["flashinfer_plan"]["us"], float)
        assert "tree_attention" in row


def test_flashinfer_stage_does_not_time_what_disagrees(fake, monkeypatch):
    real_run = FlashInferPlan.run
    monkeypatch.setattr(FlashInferPlan, "run", lambda *arguments: real_run(*arguments) * 1.5)
    assert [row["flashinfer"].get("us") for row in check()["cases"]] == [None, None]


def test_flashinfer_stage_goes_on_after_an_error(fake, monkeypatch):
    def fail(self, batch, *_rest):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(FlashInferPlan, "run", fail)
    found = check()
    for row in found["cases"]:
        assert "no kernel image" in row["flashinfer"]["error"] and "tree_attention" in row


def test_flashinfer_stage_without_the_package(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert "error" in check()["versions"]
