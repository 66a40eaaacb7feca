"""How much of what the machine allows do the decode steps reach that the stage `decode` has timed?"""

from dataclasses import asdict, dataclass, replace

from decode_ceilings import Decoding, Run, Share
from machine_ceilings import measure

from gpu_checks.context import Context
from gpu_checks.decode import subjects
from specbackend.config import EngineConfig

ROWS = (1, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Timed:
    """A run of `decode`."""

    name: str
    decoding: Decoding
    run: Run


def check_ceilings(context: Context, out: dict) -> None:
    """Fills out with the ceilings, and for each run with the shortest step, the measured one and what it reaches."""
    timed = _timed(context)
    decodings = [each.decoding for each in timed]
    shapes = {shape for decoding in decodings for network in decoding.networks for shape in network.weights}
    rows = ROWS[:2] if context.rehearsal else ROWS
    machine = measure(shapes, decodings[0].dtype, context.device, rows)
    out["ceilings"] = asdict(machine)
    for each in timed:
        share = Share.of(each.decoding, each.run, machine)
        out[each.name] = asdict(each.run) | asdict(share) | {"reached": share.reached}
        print(f"{each.name:<56} {share}", flush=True)


def _timed(context: Context) -> list[Timed]:
    found = []
    for name, params in subjects(context).items():
        decoding = Decoding.of(EngineConfig.from_params(params | {"dtype": context.dtype}))
        for what, figures in context.results["decode"].get(name, {}).items():
            if what.startswith(("plain", "speculative")):
                of_run = replace(decoding, draft=None, tree=None) if what.startswith("plain") else decoding
                found.append(Timed(f"{name}, {what}", of_run, _run(figures)))
    return found


def _run(figures: dict) -> Run:
    step_seconds, accept_length = figures["ms_per_step"] / 1e3, figures["tokens_per_request_and_step"]
    return Run(step_seconds, figures["batch"], figures["context"], accept_length)
