"""tools/machine_ceilings at tiny sizes: every figure is there, and says what it should."""

import machine_ceilings
import pytest
import torch
from machine_ceilings import best_seconds, gemm_times, kernel_gap, measure, read_bandwidth

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(machine_ceilings, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(machine_ceilings, "ROTATED_BYTES", 1 << 18)
    monkeypatch.setattr(machine_ceilings, "MIN_SECONDS", 1e-3)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what a test adds."""
    clock = type("Clock", (), {"now": 0.0})()
    monkeypatch.setattr(machine_ceilings.time, "perf_counter", lambda: clock.now)
    return clock


def test_the_shortest_run_counts_and_the_first_does_not(clock):
    durations = iter([1.0, 7.0, 5.0, 6.0])

    def work() -> None:
        clock.now += next(durations)

    assert best_seconds(work, CPU) == 5


def test_weights_take_turns(clock, monkeypatch):
    """A second for each product, and the result is one product's time."""
    used = []

    def product_of(weight_ED):
        def product(x_TD):
            used.append((weight_ED.data_ptr(), len(x_TD)))
            clock.now += 1

        return product

    monkeypatch.setattr(machine_ceilings, "linear", product_of)
    times = gemm_times(16, 64, torch.float32, CPU, (2, 5), rotated=9000)  # 4096 bytes each
    assert (times.outputs, times.inputs, times.rows, times.seconds) == (16, 64, (2, 5), (1, 1))
    assert len(set(used[:3])) == 3 and used[:3] == used[3:6] and {rows for _, rows in used} == {2, 5}


def test_a_bandwidth_is_bytes_over_seconds(monkeypatch):
    monkeypatch.setattr(machine_ceilings, "best_seconds", lambda work, device: 0.5)
    assert read_bandwidth(CPU, 1 << 20) == 2 << 20
    assert kernel_gap(CPU) == 0.5 / 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measure(dtype):
    shapes = [(96, 32), (32, 96), (32, 96)]
    machine = measure(shapes, dtype, CPU, rows=(1, 4), working_set=1 << 14)
    assert [(gemm.outputs, gemm.inputs) for gemm in machine.gemms] == [(32, 96), (96, 32)]
    assert all(gemm.rows == (1, 4) and min(gemm.seconds) > 0 for gemm in machine.gemms)
    assert machine.flops == max(
        2 * 96 * 32 * T / s for g in machine.gemms for T, s in zip((1, 4), g.seconds, strict=True)
    )
    assert machine.read_bandwidth > 1e8 and 1e-8 < machine.kernel_gap < 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measure_on_a_gpu():
    machine = measure([(4096, 4096)], torch.bfloat16, torch.device("cuda"), rows=(1, 64))
    assert machine.read_bandwidth > 1e11 and 1e-7 < machine.kernel_gap < 1e-4 and machine.flops > 1e11
