"""Real engine processes at one sidecar: what `tools/stress_cache` runs."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import setup_env
from radix_stress import HarmedSidecar

from specbackend import Engine
from specbackend.request import Update
from specbackend.sampling_params import SamplingParams
from specbackend.serving.protocol import Message, Rejected, Step, Submit
from specbackend.serving.supervisor import EngineDown, EngineSupervisor, wait_readable
from specbackend.tokenizer import Tokenizer

DEMO = setup_env.ROOT / "tools" / "demo_checkpoints"
MODEL = {
    "model_path": str(DEMO / "llama-gsm8k"),
    "speculative_algorithm": "EAGLE3",
    "speculative_draft_model_path": str(DEMO / "llama-gsm8k-eagle3"),
    "dtype": "float32",
    "context_length": 256,
    "num_threads": 1,
}
POOL = {"max_total_tokens": 600, "max_running_requests": 4}  # of a few requests, so that prefixes come and go
POLICIES = ("write_through", "write_back")  # by engine
ARENA_UNITS = 300  # some forty texts
NUM_TEXTS, NUM_SHARED, NEW_TOKENS, MOST_TOKENS = 60, 4, 12, 200
KINDS = ({"temperature": 0}, {"temperature": 1.0}, {"temperature": 0, "speculative": False}, {"cache_salt": "a"})
IN_FLIGHT = 6  # of each engine
LONGEST_SILENCE_S = 2.0  # of an engine that has work: a step and what it waits for the sidecar
NO_STATS = {"total_slots": 0, "free_slots": 0, "evictable_slots": 0}  # of an engine that has not done a step


@dataclass(frozen=True)
class Task:
    """A question, and the answer that it must get."""

    input_ids: list[int]
    params: SamplingParams
    expected: list[int]


@dataclass
class Open:
    """A question that an engine works at."""

    task: Task
    output_ids: list[int] = field(default_factory=list)


def make_tasks(rng: random.Random) -> list[Task]:
    """Texts that share their starts, and what an engine without speculation or any cache says to them."""
    tokenizer = Tokenizer(MODEL["model_path"])
    lines = (setup_env.ROOT / "tests" / "data" / "gsm8k_test.jsonl").read_text().splitlines()
    texts = [tokenizer.encode(json.loads(line)["question"]) for line in lines[: NUM_TEXTS + NUM_SHARED]]
    starts, ends = texts[:NUM_SHARED], texts[NUM_SHARED:]
    prompts = [(rng.choice(starts) + end)[: rng.randrange(40, MOST_TOKENS)] for end in ends]
    shared = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    params = [{**shared, "seed": seed, **KINDS[seed % len(KINDS)]} for seed in range(len(prompts))]
    oracle = Engine(model_path=MODEL["model_path"], dtype="float32", num_threads=1, disable_radix_cache=True)
    plain = [{name: value for name, value in each.items() if name != "speculative"} for each in params]
    answers = oracle.generate(input_ids=prompts, sampling_params=plain)
    return [
        Task(prompt, SamplingParams.from_dict(each), answer["output_ids"])
        for prompt, each, answer in zip(prompts, params, answers, strict=True)
    ]


class BusyEngine:
    """An engine process that always has questions, and is started again when it is killed."""

    def __init__(self, params: dict, tasks: list[Task], rng: random.Random, counts: Counter[str]):
        self._tasks, self._random, self._counts = tasks, rng, counts
        self._supervisor = EngineSupervisor(params, watchdog_timeout=60)
        self._supervisor.start()
        self._open: dict[str, Open] = {}
        self._numbers = count()
        self._last_sign = time.monotonic()
        self._stats = NO_STATS
        self.longest_silence_s = 0.0

    def fileno(self) -> int | None:
        return self._supervisor.fileno()

    @property
    def is_idle(self) -> bool:
        return not self._open

    @property
    def lost_slots(self) -> float:
        """Of an idle engine."""
        stats = self._stats
        return stats["total_slots"] - stats["free_slots"] - stats["evictable_slots"]

    def submit(self) -> None:
        """As many questions as it should have."""
        while self._supervisor.ready and len(self._open) < IN_FLIGHT:
            task, request_id = self._random.choice(self._tasks), str(next(self._numbers))
            if not self._open:
                self._last_sign = time.monotonic()
            self._open[request_id] = Open(task)
            self._supervisor.send(Submit(request_id, task.input_ids, task.params))

    def receive(self) -> None:
        for event in self._supervisor.receive():
            self._take(event)

    def tend(self) -> None:
        """Notice silence, and start it again if it has ended."""
        now = time.monotonic()
        if self._open:
            self.longest_silence_s = max(self.longest_silence_s, now - self._last_sign)
        for event in self._supervisor.tend(now, busy=bool(self._open)):
            self._take(event)

    def kill(self) -> None:
        if self._supervisor.ready:
            self._counts["engines_killed"] += 1
            self._supervisor._process.kill()

    def close(self) -> None:
        self._supervisor.close()

    def _take(self, event: Message | EngineDown) -> None:
        self._last_sign = time.monotonic()
        match event:
            case EngineDown(reason):
                self._counts["engines_crashed"] += signal.SIGKILL.name not in reason
                self._open.clear()
                self._stats = NO_STATS
            case Rejected():
                self._counts["rejected"] += 1
            case Step(updates, stats):
                self._stats = stats
                for update in updates:
                    self._add(update)

    def _add(self, update: Update) -> None:
        asked = self._open[update.request_id]
        asked.output_ids += update.token_ids
        if update.finished:
            del self._open[update.request_id]
            self._counts["answers"] += 1
            self._counts["wrong_answers"] += asked.output_ids != asked.task.expected
            self._counts["cached_tokens"] += update.cached_tokens
            self._counts["host_cached_tokens"] += update.host_cached_tokens


class CacheStress:
    """Two engines and a sidecar in `folder`, which end at random.

    longest_silence_s: of an engine that has work; more is a problem. On a busy machine it may be none of the engine's.
    """

    def __init__(self, folder: Path, seed: int, longest_silence_s: float = LONGEST_SILENCE_S):
        self._longest_silence_s = longest_silence_s
        self._random, self.counts = random.Random(seed), Counter()
        tasks = make_tasks(self._random)
        self._sidecar = HarmedSidecar(folder / "radix.sock", ARENA_UNITS, self.counts)
        tier = {"enable_hierarchical_cache": True, "radix_cache_socket": str(self._sidecar.path)}
        self._engines = [
            BusyEngine({**MODEL, **POOL, **tier, "hicache_write_policy": policy}, tasks, self._random, self.counts)
            for policy in POLICIES
        ]

    def run(self, seconds: float) -> dict:
        """Returns a summary; `problems` in it is empty if all is well."""
        try:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                self._work(self._random.uniform(0.5, 3.0))
                self._harm()
                self._sidecar.audit()
            self._drain()
            return self._summary()
        finally:
            for engine in self._engines:
                engine.close()
            self._sidecar.close()

    def _harm(self) -> None:
        harm = self._random.choice(("engine", "engine", "sidecar", "pause"))
        if harm == "engine":
            self._random.choice(self._engines).kill()
        elif harm == "sidecar":
            self._sidecar.kill()
        else:
            self._sidecar.stop()
            self._work(0.5)
            self._sidecar.go_on()

    def _work(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for engine in self._engines:
                engine.submit()
            self._listen()

    def _drain(self) -> None:
        while not all(engine.is_idle for engine in self._engines):
            self._listen()

    def _listen(self) -> None:
        alive = {engine.fileno(): engine for engine in self._engines if engine.fileno() is not None}
        for fd in wait_readable(alive, timeout_s=0.05):
            alive[fd].receive()
        for engine in self._engines:
            engine.tend()

    def _summary(self) -> dict:
        lost_slots = sum(engine.lost_slots for engine in self._engines)
        for engine in self._engines:
            engine.close()
        longest_s = max(engine.longest_silence_s for engine in self._engines)
        summary = {**self.counts, "longest_silence_s": round(longest_s, 3), "lost_slots": lost_slots}
        summary["lost_units"] = self._sidecar.lost_units()
        bad = ("wrong_answers", "rejected", "engines_crashed", "lost_slots", "lost_units")
        problems = [f"{name}: {summary[name]}" for name in bad if summary.get(name)]
        problems += [f"leak: {leak}" for leak in self._sidecar.leaks[:3]]
        if longest_s > self._longest_silence_s:
            problems.append(f"an engine with work said nothing for {longest_s:.1f} s")
        return {**summary, "problems": problems}
