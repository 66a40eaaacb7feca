"""tools/bench_decode --ceilings: the networks it predicts are those that engines load, and it counts their steps."""

import json
import sys
from types import SimpleNamespace

import decode_ceilings
import machine_ceilings
import pytest
import torch
from decode_ceilings import Decoding, Run, Share, StepClock
from roofline import StepTime

from specbackend import Engine
from specbackend.models.linear import Linear
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET, DEMOS
from tests.test_tools import load_tool

EAGLE = {
    "speculative_algorithm": "EAGLE",
    "speculative_draft_model_path": str(DEMOS / "llama-gsm8k-eagle"),
}
ALGORITHMS = {
    "plain": {},
    "EAGLE3": {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(DEMO_EAGLE3)},
    "EAGLE": EAGLE,
    "EAGLE + token map": EAGLE | {"speculative_token_map": str(DEMOS / "llama-gsm8k-eagle" / "freq_256.pt")},
    "NEXTN": {"speculative_algorithm": "NEXTN", "model_path": str(DEMOS / "mimo-gsm8k")},
    "STANDALONE": {"speculative_algorithm": "STANDALONE", "speculative_draft_model_path": str(DEMO_TARGET)},
    "NGRAM": {"speculative_algorithm": "NGRAM"},
}


def products_of(model) -> list[tuple[int, int]]:
    """The shapes of all weights that a model multiplies with."""
    return sorted(tuple(product.shape) for product in set(linears_in(model)))


def linears_in(module) -> list[Linear]:
    if isinstance(module, Linear):
        return [module]
    parts = module if isinstance(module, list) else getattr(module, "__dict__", {}).values()
    return [linear for part in parts for linear in linears_in(part)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_networks_are_those_of_the_engine(algorithm):
    engine = Engine(**{"model_path": str(DEMO_TARGET), "dtype": "bfloat16"} | ALGORITHMS[algorithm])
    decoding = Decoding.of(engine.config)
    assert sorted(decoding.target.weights) == products_of(engine.plain.runner.model)
    assert decoding.dtype == torch.bfloat16 and decoding.tree == engine.config.tree
    drafter = getattr(engine.decoder, "drafter", None)
    if not hasattr(drafter, "grower"):
        assert decoding.draft is None
        return
    loaded, first, later = products_of(drafter.grower.model), decoding.draft.first, decoding.draft.later
    assert sorted(first.weights) == loaded
    fusion = [(128, 3 * 128)] if algorithm == "EAGLE3" else []
    assert sorted([*later.weights, *fusion]) == loaded
    tensor = drafter.grower.kv_pool.layer(0)  # [S, 2, H_kv, D]
    layers = drafter.grower.model.num_kv_layers
    assert first.kv_bytes == later.kv_bytes == layers * tensor[0].nbytes


@pytest.mark.parametrize("algorithm", ["plain", "EAGLE3"])
def test_the_clock_counts_decode_steps(algorithm, demo_prompts, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(decode_ceilings, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    engine = Engine(model_path=str(DEMO_TARGET), **ALGORITHMS[algorithm])
    with StepClock(engine) as clock:
        sampling = [{"temperature": 0, "max_new_tokens": length} for length in (1, 9, 24)]
        answers = engine.generate(input_ids=demo_prompts[:3], sampling_params=sampling)
    assert clock.steps == clock.seconds == max(answer["meta_info"]["spec_verify_ct"] for answer in answers)
    engine.generate(input_ids=demo_prompts[:1], sampling_params=sampling[:1])
    assert clock.steps == clock.seconds and "step" not in vars(engine)


def test_means_of_a_run():
    totals = SimpleNamespace(
        requests=4, prompt_tokens=400, tokens=84, verify_steps=40, batch_steps=16, step_seconds=3.2
    )
    assert Run.of(totals) == Run(step_seconds=0.2, batch=2.5, context=110.5, accept_length=2)


def test_a_share():
    share = Share(StepTime(verify=2e-3, draft=1e-3, host=0), reading=1.5e-3, measured=4e-3)
    assert share.reached == 0.75
    assert str(share) == (
        "3.00 ms/step at least (verify 2.00 + draft 1.00), 4.00 measured: 0.75 of the ceiling; "
        "reading the target alone 1.50"
    )


@pytest.fixture
def bench(monkeypatch):
    """Call tools/bench_decode with arguments; measuring takes no time. Returns its exit code."""
    tool = load_tool("bench_decode", monkeypatch)
    for name, value in (("READ_BYTES", 1 << 20), ("ROTATED_BYTES", 1 << 16), ("MIN_SECONDS", 0)):
        monkeypatch.setattr(machine_ceilings, name, value)

    def call(*arguments) -> int:
        monkeypatch.setattr(sys, "argv", ["bench_decode", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            tool.main()
        return done.value.code

    return call


def test_command(bench, tmp_path, capsys):
    sizes = ("--num-prompts", 3, "--batch-size", 2, "--max-new-tokens", 8)
    assert bench("--ceilings", *sizes, "--json", tmp_path / "figures.json") == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    plain, speculative = capsys.readouterr().out.splitlines()[-2:]
    assert plain.startswith("plain ") and speculative.startswith("speculative ")
    shares = figures["shares"]
    assert f"{shares['speculative']['reached']:.2f} of the ceiling" in speculative
    assert shares["plain"]["shortest"]["draft"] == 0 < shares["speculative"]["shortest"]["draft"]
    assert shares["plain"]["accept_length"] == 1 < shares["speculative"]["accept_length"]
    assert all(gemm["rows"] == [1, 2, 4, 8, 16] for gemm in figures["ceilings"]["gemms"])


def test_one_algorithm_only(bench, capsys):
    assert bench("--ceilings", "--all-algorithms") == 2
    assert "--ceilings: is for one algorithm" in capsys.readouterr().err
