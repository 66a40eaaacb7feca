"""What `tools/bench_decode --ceilings` adds: how much of what the machine allows a decode step reaches.

The shortest step is that of `roofline` for the run's mean batch, context and accept length, with nothing lost to the
host. The measured step is the engine's: prompts and text are apart.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from machine_ceilings import ROWS, measure
from roofline import Ceilings, Draft, Network, StepTime, Workload, predict

from specbackend.config import EngineConfig, TreeShape
from specbackend.models.draft import read_token_map
from specbackend.models.eagle3 import Eagle3Config
from specbackend.models.model_config import ModelConfig


@dataclass(frozen=True)
class Run:
    """What an engine did over all batches, whose requests leave when they finish: hence means."""

    step_seconds: float
    batch: float  # requests in a step
    context: float  # cached tokens of a request in a step
    accept_length: float  # tokens per request and step, without the one that a prompt yields

    @classmethod
    def of(cls, totals) -> "Run":
        """From bench_decode's totals."""
        return cls(
            step_seconds=totals.step_seconds / totals.batch_steps,
            batch=totals.verify_steps / totals.batch_steps,
            context=(totals.prompt_tokens + totals.tokens / 2) / totals.requests,
            accept_length=(totals.tokens - totals.requests) / totals.verify_steps,
        )


@dataclass(frozen=True)
class Decoding:
    """The part of an engine that its decode steps consist of."""

    target: Network
    draft: Draft | None
    tree: TreeShape | None
    dtype: torch.dtype

    @classmethod
    def of(cls, config: EngineConfig) -> "Decoding":
        """Read from the checkpoints' configs. Raises ConfigError."""
        target = ModelConfig.read(Path(config.model_path))
        name = target.torch_dtype if config.dtype == "auto" else config.dtype
        dtype = getattr(torch, name)
        draft = _draft(config, target, dtype.itemsize)
        return cls(Network.target(target, dtype.itemsize), draft, config.tree, dtype)

    @property
    def networks(self) -> list[Network]:
        return [self.target, *([self.draft.first, self.draft.later] if self.draft else [])]

    def most_rows(self, batch: int) -> int:
        """Of any forward in a step of `batch` requests."""
        tree = self.tree or TreeShape(0, 1, 1)
        return batch * max(tree.num_nodes, tree.topk, tree.num_steps + 1)

    def workload(self, run: Run) -> Workload:
        return Workload(self.target, self.draft, self.tree, run.batch, run.context, run.accept_length)


@dataclass(frozen=True)
class Share:
    """How long a step must take and how long it takes."""

    shortest: StepTime
    reading: float  # seconds to read the target's weights at the measured bandwidth
    measured: float  # seconds of a step

    @classmethod
    def of(cls, decoding: Decoding, run: Run, machine: Ceilings) -> "Share":
        shortest = predict(decoding.workload(run), machine).step
        return cls(shortest, decoding.target.weight_bytes / machine.read_bandwidth, run.step_seconds)

    @property
    def reached(self) -> float:
        """1: as fast as the machine allows."""
        return self.shortest.total / self.measured

    def __str__(self) -> str:
        parts = [f"{name} {1e3 * getattr(self.shortest, name):.2f}" for name in ("verify", "draft")]
        shortest = f"{1e3 * self.shortest.total:.2f} ms/step at least ({' + '.join(parts)})"
        measured = f"{1e3 * self.measured:.2f} measured: {self.reached:.2f} of the ceiling"
        return f"{shortest}, {measured}; reading the target alone {1e3 * self.reading:.2f}"


class StepClock:
    """Stands before an engine's `step` and counts those that decode."""

    def __init__(self, engine):
        self.engine, self.steps, self.seconds = engine, 0, 0.0

    def __enter__(self) -> "StepClock":
        self._step, self.engine.step = self.engine.step, self.step
        return self

    def __exit__(self, *error) -> None:
        del self.engine.step

    def step(self) -> list:
        decoded, start = self.engine.stats().verify_steps, time.perf_counter()
        updates = self._step()
        if self.engine.stats().verify_steps > decoded:
            self.steps += 1
            self.seconds += time.perf_counter() - start
        return updates


class DecodeCeilings:
    """The machine's ceilings for some engines, which share a target's shape, a device and a dtype."""

    def __init__(self, engines: dict[str, dict], batch: int):
        """Measures. engines: their parameters, by name; batch: the most requests in a step."""
        self._decodings = {name: Decoding.of(EngineConfig.from_params(params)) for name, params in engines.items()}
        decodings = list(self._decodings.values())
        most = max(decoding.most_rows(batch) for decoding in decodings)
        rows = tuple(count for count in ROWS if count < 2 * most)  # the last is `most` or more
        weights = {shape for decoding in decodings for network in decoding.networks for shape in network.weights}
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.machine = measure(weights, decodings[0].dtype, device, rows, decodings[0].target.weight_bytes)

    def report(self, totals: dict) -> dict:
        """Print what each engine reached in a run, given bench_decode's totals; the figures, for JSON."""
        machine, shares = self.machine, {}
        print(
            f"ceilings: reads {machine.read_bandwidth / 1e9:.1f} GB/s, multiplies {machine.flops / 1e9:.0f} GFLOP/s, "
            f"{1e6 * machine.kernel_gap:.1f} us from a kernel to the next"
        )
        for name, decoding in self._decodings.items():
            run = Run.of(totals[name])
            share = Share.of(decoding, run, machine)
            print(f"{name:12} {share}")
            shares[name] = asdict(run) | asdict(share) | {"reached": share.reached}
        return {"ceilings": asdict(machine), "shares": shares}


def _draft(config: EngineConfig, target: ModelConfig, itemsize: int) -> Draft | None:
    algorithm = config.speculative_algorithm
    if algorithm in (None, "NGRAM"):
        return None
    if algorithm == "NEXTN":
        return Draft.eagle(target, _num_drafted(config, target), itemsize)
    folder = Path(config.speculative_draft_model_path)
    if algorithm == "EAGLE":
        return Draft.eagle(ModelConfig.read(folder), _num_drafted(config, target), itemsize)
    if algorithm == "EAGLE3":
        head = Eagle3Config.read(folder, target)
        feature_size = len(head.captured_layers) * target.hidden_size
        return Draft.eagle3(head.layer, head.draft_vocab_size, itemsize, feature_size)
    network = Network.target(ModelConfig.read(folder), itemsize)  # STANDALONE
    return Draft(network, network)


def _num_drafted(config: EngineConfig, target: ModelConfig) -> int:
    """Tokens of a draft that has the target's LM head."""
    if config.speculative_token_map is None:
        return target.vocab_size
    return len(read_token_map(Path(config.speculative_token_map), target.vocab_size))
