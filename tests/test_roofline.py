"""tools/roofline: figures worked out by hand for Llama 3.1 8B on an H200, and what must rise with what."""

from dataclasses import replace
from itertools import pairwise

import pytest
from roofline import Ceilings, Draft, GemmTimes, Network, Workload, predict
from widening.shape import PRESETS

from specbackend.config import TreeShape

LLAMA = PRESETS["8b"]
MIMO = replace(LLAMA, num_hidden_layers=36, intermediate_size=11008, vocab_size=151680)
H200 = Ceilings(read_bandwidth=4.3e12, flops=600e12, kernel_gap=1.3e-6)
HOST, PLAIN_HOST = 0.53e-3, 0.2e-3
DRAFTS = {
    "EAGLE": Draft.eagle(LLAMA, LLAMA.vocab_size, 2),
    "EAGLE + token map": Draft.eagle(LLAMA, 32768, 2),
    "EAGLE3": Draft.eagle3(LLAMA, 32000, 2, feature_size=3 * 4096),
    "NEXTN": Draft.eagle(MIMO, MIMO.vocab_size, 2),
}
DEFAULT = TreeShape(5, 4, 8)


def workload(algorithm="EAGLE3", tree=DEFAULT, batch=1, context=1024, accept_length=3.5) -> Workload:
    target = Network.target(MIMO if algorithm == "NEXTN" else LLAMA, 2)
    return Workload(target, DRAFTS[algorithm], tree, batch, context, accept_length, HOST, PLAIN_HOST)


def test_bytes_of_a_forward():
    target = Network.target(LLAMA, 2)
    assert target.weight_bytes == pytest.approx(15.01e9, rel=1e-3)
    assert target.kv_bytes == 131072
    assert Network.target(MIMO, 2).weight_bytes == pytest.approx(14.0e9, rel=2e-3)
    later = {name: draft.later.weight_bytes / 1e9 for name, draft in DRAFTS.items()}
    assert later == pytest.approx(
        {"EAGLE": 1.554, "EAGLE + token map": 0.772, "EAGLE3": 0.749, "NEXTN": 1.664}, rel=2e-3
    )
    assert DRAFTS["EAGLE3"].first.weight_bytes == pytest.approx(0.849e9, rel=2e-3)


@pytest.mark.parametrize(
    ("algorithm", "tree", "accept_length", "step_ms", "tokens_per_second"),
    [
        ("EAGLE", DEFAULT, 3.5, 6.38, 549),
        ("EAGLE + token map", DEFAULT, 3.5, 5.47, 640),
        ("EAGLE3", DEFAULT, 3.5, 5.47, 640),
        ("EAGLE3", DEFAULT, 5.0, 5.47, 914),
        ("NEXTN", TreeShape(1, 1, 2), 1.8, 4.66, 386),
    ],
)
def test_steps_of_one_request(algorithm, tree, accept_length, step_ms, tokens_per_second):
    prediction = predict(workload(algorithm, tree, accept_length=accept_length), H200)
    assert 1e3 * prediction.step.total == pytest.approx(step_ms, rel=0.02)
    assert prediction.tokens_per_second == pytest.approx(tokens_per_second, rel=0.02)


def test_parts_of_a_step():
    prediction = predict(workload(), H200)
    found = [1e3 * x for x in (prediction.step.verify, prediction.step.draft, prediction.plain_step.total)]
    assert found == pytest.approx([3.90, 1.04, 4.10], rel=0.02)


@pytest.mark.parametrize(
    ("context", "batch", "tree", "accept_length", "plain", "speculative", "speedup"),
    [
        (1024, 8, TreeShape(3, 1, 4), 2.6, 1854, 3925, 2.12),
        (1024, 32, TreeShape(5, 4, 16), 3.8, 6319, 7646, 1.21),
        (1024, 64, TreeShape(5, 8, 32), 4.2, 10557, 4673, 0.44),
        (8192, 32, DEFAULT, 3.4, 2654, 6187, 2.33),
        (8192, 64, TreeShape(5, 4, 16), 3.8, 3193, 5201, 1.63),
    ],
)
def test_batches(context, batch, tree, accept_length, plain, speculative, speedup):
    prediction = predict(workload("EAGLE3", tree, batch, context, accept_length), H200)
    assert prediction.plain_tokens_per_second == pytest.approx(plain, rel=0.02)
    assert prediction.tokens_per_second == pytest.approx(speculative, rel=0.02)
    assert prediction.speedup == pytest.approx(speedup, rel=0.02)


@pytest.mark.parametrize(
    ("batch", "context", "break_even"), [(1, 1024, 1.33), (32, 1024, 1.88), (64, 8192, 1.69), (128, 1024, 4.28)]
)
def test_break_even(batch, context, break_even):
    prediction = predict(workload("EAGLE3", DEFAULT, batch, context, accept_length=3.4), H200)
    assert prediction.break_even_accept_length == pytest.approx(break_even, rel=0.02)


MEASURED = replace(
    H200,
    gemms=tuple(
        GemmTimes(outputs, inputs, (1, 8, 64, 512), (2e-5, 1.9e-5, 3e-5, 9e-5))  # 1 row slower than 8: noise
        for outputs, inputs in {*workload().target.weights, *DRAFTS["EAGLE3"].first.weights}
    ),
)


@pytest.mark.parametrize("machine", [H200, MEASURED], ids=["rates", "measured"])
@pytest.mark.parametrize("tree", [None, DEFAULT, TreeShape(3, 1, 4)], ids=str)
def test_more_work_takes_no_less(machine, tree):
    times = [predict(workload(tree=tree, batch=batch), machine).step for batch in (1, 2, 3, 7, 8, 9, 40, 64, 200)]
    for less, more in pairwise(times):
        assert less.verify < more.verify and less.draft <= more.draft
    times = [predict(workload(tree=tree, context=context), machine).step for context in (0, 1, 1000, 100_000)]
    for less, more in pairwise(times):
        assert less.verify < more.verify and (tree is None or less.draft < more.draft)


def test_plain_decoding_drafts_nothing_and_verifies_one_row():
    plain = predict(workload(tree=None, accept_length=1), H200)
    assert plain.step == plain.plain_step and plain.step.draft == 0
    assert (plain.speedup, plain.break_even_accept_length) == (1, 1)
    one_node = replace(workload(tree=TreeShape(0, 1, 1), accept_length=1), draft=None, host=PLAIN_HOST)
    assert predict(one_node, H200).step == plain.step


def test_measured_products():
    times = GemmTimes(10, 10, (2, 4, 8), (3.0, 2.0, 6.0))
    assert [times.at(rows) for rows in (1, 2, 3, 4, 5, 8, 16)] == [2, 2, 2, 2, 3, 6, 12]
    machine = Ceilings(read_bandwidth=200, flops=100, kernel_gap=0.5, gemms=(times,))
    assert machine.gemm_seconds(10, 10, 2, rows=8) == 6
    assert machine.gemm_seconds(20, 10, 2, rows=1) == 4.5, "not measured: 400 FLOP take longer than 400 bytes"
    assert machine.gemm_seconds(20, 10, 4, rows=0.1) == 4.5, "not measured: 800 bytes take longer than 40 FLOP"
