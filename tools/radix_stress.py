"""Fake engines at one sidecar: what `tools/stress_radix` runs. `python tools/radix_stress.py` is one such engine."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from specbackend.radix.arena import UNIT_BYTES
from specbackend.radix.client import RadixClient, ask
from specbackend.radix.keys import Layout
from specbackend.radix.process import SidecarProcess
from specbackend.radix.protocol import Audit, Flush, GetStats

LAYOUTS = (  # by engine: two of one model, one of another
    Layout(b"one", bytes_per_token=UNIT_BYTES // 4 + 1, block_tokens=4, successor=True),
    Layout(b"one", bytes_per_token=UNIT_BYTES // 4 + 1, block_tokens=4, successor=True),
    Layout(b"two", bytes_per_token=1000, block_tokens=8, successor=False),
)
ARENA_UNITS = 200  # less than what is asked for, so that blocks are evicted all the time
POISON_SHARE = 0.02  # of rounds in which an engine damages the memory
PAUSE_S = 0.001  # after a round: most of them find the sidecar gone, and take no time
REPORT_S = 0.1
SETTLE_S = 10.0


def payload(key: bytes, num_bytes: int) -> np.ndarray:
    """The bytes that belong under a key, uint8 [num_bytes]."""
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(key, "little")))
    return generator.integers(0, 256, num_bytes, np.uint8)


class FakeEngine:
    """Stores and reads blocks of random texts that share their starts. Killed by a signal, at any point."""

    def __init__(self, path: Path, number: int, seed: int):
        self._client = RadixClient(path, LAYOUTS[number])
        self._layout = LAYOUTS[number]
        self._random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.longest_s = 0.0

    def round(self) -> None:
        keys = self._text_keys()
        action = self._random.choice((self.read, self.read, self.store, self.hold, self.prefetch))
        start = time.monotonic()
        action(keys)
        self.longest_s = max(self.longest_s, time.monotonic() - start)
        self.counts[action.__name__] += 1
        if self._random.random() < POISON_SHARE:
            self._poison()

    def store(self, keys: list[bytes]) -> None:
        size = self._layout.block_bytes
        future = self._client.store(keys, lambda places: np.stack([payload(keys[place], size) for place in places]))
        if future is not None and self._random.random() < 0.5:
            self.counts["blocks_written"] += future.result()

    def read(self, keys: list[bytes]) -> None:
        if lease := self._client.lookup(keys):
            out = np.zeros((lease.num_blocks, self._layout.block_bytes), np.uint8)
            sound = self._client.read(lease, out)
            right = [np.array_equal(row, payload(key, len(row))) for key, row in zip(keys, out[:sound], strict=False)]
            self.counts["blocks_read"] += sound
            self.counts["blocks_poisoned"] += sound < lease.num_blocks
            self.counts["blocks_wrong"] += right.count(False)

    def hold(self, keys: list[bytes]) -> None:
        """What is leased must not change, however much the others need room."""
        if lease := self._client.lookup(keys):
            time.sleep(self._random.random() * 0.02)
            self._client.release(lease)

    def prefetch(self, keys: list[bytes]) -> None:
        self._client.prefetch(keys)

    def _text_keys(self) -> list[bytes]:
        choices = self._random.choices(range(3), k=self._random.randrange(2, 8))
        tokens = [choice for choice in choices for _ in range(self._layout.block_tokens)]
        return self._layout.keys(tokens, self._random.choice((None, "salt")))

    def _poison(self) -> None:
        """Flip a bit behind the sidecar's back."""
        if arena := self._client._reader.arena:
            unit, block = self._random.randrange(arena.num_units), np.empty(UNIT_BYTES, np.uint8)
            arena.read([unit], block)
            block[self._random.randrange(1000)] ^= 1 << self._random.randrange(8)
            arena.write([unit], block)


def run_engine(path: Path, number: int, seed: int) -> None:
    """Work until a signal comes, and print now and then what was done since the last time."""
    logging.basicConfig(level=logging.ERROR)  # that there is no sidecar is no news here
    engine, reported = FakeEngine(path, number, seed), time.monotonic()
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    while not stopped:
        engine.round()
        time.sleep(PAUSE_S)
        if time.monotonic() - reported > REPORT_S:
            print(json.dumps({**engine.counts, "longest_s": engine.longest_s}), flush=True)
            engine.counts.clear()
            reported = time.monotonic()
    engine._client.close()


@dataclass
class Worker:
    """A process that is a fake engine, and the file that it reports to."""

    process: subprocess.Popen
    report: Path


class HarmedSidecar:
    """A sidecar that is killed, or stopped for a while, and has to account for its memory whenever it can."""

    def __init__(self, path: Path, num_units: int, counts: Counter[str]):
        """counts: how often which happened is added there."""
        self.path, self._counts = path, counts
        self._process = SidecarProcess(path, ["--size", str(num_units * UNIT_BYTES)])
        self._process.wait_ready(SETTLE_S)
        self.leaks: list[str] = []

    def kill(self) -> None:
        self._counts["sidecars_killed"] += 1
        self._process.send_signal(signal.SIGKILL)

    def stop(self) -> None:
        """It hangs, until `go_on`."""
        self._counts["sidecars_stopped"] += 1
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def audit(self) -> None:
        with suppress(ConnectionError):  # it may be the one that was killed
            self.leaks += ask(self.path, Audit())["leaks"]
            self._counts["audits"] += 1

    def lost_units(self) -> int:
        """What is neither free nor anybody's, once all engines are gone. Forgets all blocks."""
        self._process.wait_ready(SETTLE_S)
        deadline = time.monotonic() + SETTLE_S
        while ask(self.path, GetStats())["holders"] > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        self.audit()
        ask(self.path, Flush())
        stats = ask(self.path, GetStats())
        return stats["units"] - stats["free_units"]

    def close(self) -> None:
        self._process.close()


class Stress:
    """Runs fake engines and a sidecar in `folder` and ends them at random."""

    def __init__(self, folder: Path, seed: int):
        self._folder, self._random = folder, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self._sidecar = HarmedSidecar(folder / "radix.sock", ARENA_UNITS, self.counts)
        self._workers: list[Worker] = []
        self._reports: list[Path] = []

    def run(self, seconds: float) -> dict:
        """Returns a summary; `problems` in it is empty if all is well."""
        try:
            self._workers = [self._start(number) for number in range(len(LAYOUTS))]
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                time.sleep(self._random.uniform(0.1, 0.6))
                [harm] = self._random.choices((self._kill_engine, self._sidecar.kill, self._stop_sidecar), (10, 1, 1))
                harm()
                self._sidecar.audit()
            return self._finish()
        finally:
            for worker in self._workers:
                worker.process.kill()
            self._sidecar.close()

    def _start(self, number: int) -> Worker:
        report = self._folder / f"report_{len(self._reports)}"
        self._reports.append(report)
        command = [sys.executable, __file__, str(self._sidecar.path), str(number), str(self._random.randrange(1 << 30))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with open(report, "w") as file:
            return Worker(subprocess.Popen(command, stdout=file, env=environment), report)

    def _kill_engine(self) -> None:
        self.counts["engines_killed"] += 1
        number = self._random.randrange(len(self._workers))
        self._end(number, signal.SIGKILL)
        self._workers[number] = self._start(number)

    def _end(self, number: int, signal_number: int) -> None:
        process = self._workers[number].process
        self.counts["engines_crashed"] += process.poll() is not None
        process.send_signal(signal_number)
        process.wait()

    def _stop_sidecar(self) -> None:
        self._sidecar.stop()
        time.sleep(0.5)
        self._sidecar.go_on()

    def _finish(self) -> dict:
        for number in range(len(self._workers)):
            self._end(number, signal.SIGTERM)
        lost_units = self._sidecar.lost_units()
        reports = [json.loads(line) for path in self._reports for line in path.read_text().split("\n")[:-1]]
        longest_s = max((report.pop("longest_s") for report in reports), default=0.0)
        for report in reports:
            self.counts.update(report)
        summary = {**self.counts, "longest_call_s": round(longest_s, 3), "lost_units": lost_units}
        return {**summary, "problems": self._problems(summary)}

    def _problems(self, summary: dict) -> list[str]:
        bad = ("engines_crashed", "blocks_wrong", "lost_units")
        problems = [f"{name}: {summary[name]}" for name in bad if summary[name]]
        problems += [f"leak: {leak}" for leak in self._sidecar.leaks[:3]]
        if summary["longest_call_s"] > 2:
            problems.append(f"a call took {summary['longest_call_s']} s")
        return problems


if __name__ == "__main__":
    run_engine(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
