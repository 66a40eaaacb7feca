"""What do kernels gain that start before the one in front has ended, and do they still say the same, to the bit?"""

import os
import subprocess
import sys
from collections.abc import Callable

import torch

from gpu_checks.context import Context
from gpu_checks.decode import GREEDY, decode, engine_of, subjects
from specbackend.cuda_graphs import graph_recorder
from specbackend.kernels import dependent_launch, linear_small_m
from specbackend.kernels.linear_small_m import make_split
from specbackend.kernels.rms_norm import rms_norm
from specbackend.kernels.silu_mul import silu_mul

SUBJECT = "EAGLE3 5,4,8"
LINES = (128, 1024, 2048)  # of a program's weight, to prefetch; others than PREFETCHED_LINES
TRY_SECONDS = 60


def try_elsewhere(out: dict) -> None:
    """Try it in a process of its own: what hangs or breaks the device there would take all later stages with it."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", "from gpu_checks import dependent_launch as d; d.try_out('cuda', 4096, 200)"]
    try:
        child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TRY_SECONDS)
        problem = child.stderr[-2000:] if child.returncode else None
    except subprocess.TimeoutExpired:
        problem = f"not done after {TRY_SECONDS} s"
    out["dependent_launch"] = problem or "works"


def try_out(device: str, hidden_size: int, times: int) -> None:
    """Some layers without attention in a graph, a copy to the device in front. Raises if they say two things."""
    replays = {}
    for enabled in (False, True):
        dependent_launch.enabled = enabled
        replays[enabled] = _layers(torch.device(device), hidden_size)
    for seed in range(times):
        one, other = replays[False](seed), replays[True](seed)
        assert torch.equal(one, other), f"{(one != other).sum()} of {one.numel()} differ at seed {seed}"


def _layers(device: torch.device, D: int, T: int = 8, count: int = 8) -> Callable[[int], torch.Tensor]:
    """What computes their output [T, D] for the input of a seed."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    g = torch.Generator(device).manual_seed(0)
    up, down = (torch.randn(count, E, D, generator=g, device=device, dtype=dtype) / D**0.5 for E in (2 * D, D))
    norm_D = torch.ones(D, device=device, dtype=dtype)
    on_host_TD = torch.empty(T, D, dtype=dtype, pin_memory=device.type == "cuda")
    x_TD, y_TD = (torch.zeros(T, D, device=device, dtype=dtype) for _ in range(2))

    def compute() -> None:
        x_TD.copy_(on_host_TD, non_blocking=True)
        residual_TD = x_TD
        for up_ED, down_ED in zip(up, down, strict=True):
            both_TE = linear_small_m.linear_small_m(rms_norm(residual_TD, norm_D, 1e-5), up_ED)
            split = make_split(D, 32, 2)
            residual_TD = linear_small_m.linear_small_m(silu_mul(both_TE), down_ED, None, residual_TD, split=split)
        y_TD.copy_(residual_TD)

    record = graph_recorder(device)
    replay = record(compute) if record else compute

    def run(seed: int) -> torch.Tensor:
        on_host_TD.copy_(torch.randn(T, D, generator=torch.Generator().manual_seed(seed)))
        replay()
        return y_TD.clone().cpu()  # waits

    return run


def check_dependent_launch(context: Context, out: dict) -> None:
    """Fills out with a dict for either kind of launch, whether answers are equal, and a dict per prefetched size."""
    if context.results.get("probe", {}).get("dependent_launch") != "works":
        out["skipped"] = "it does not work here"
        return
    answers, default = {}, linear_small_m.PREFETCHED_LINES
    try:
        for name, enabled in (("one by one", False), ("early", True)):
            dependent_launch.enabled = enabled
            out[name], answers[name] = _measure(context, (1, 2) if context.rehearsal else (1, 8))
        out["equal"] = [a == b for a, b in zip(*answers.values(), strict=True)]
        for lines in LINES:
            linear_small_m.PREFETCHED_LINES = lines
            out[f"{lines} lines"], _ = _measure(context, (1,))
    finally:
        dependent_launch.enabled, linear_small_m.PREFETCHED_LINES = False, default


def _measure(context: Context, batches: tuple[int, ...]) -> tuple[dict, list[list[int]]]:
    """Of a fresh engine: its speed at each batch, and what it says to as many prompts as the largest."""
    engine, found, answers = engine_of(context, subjects(context)[SUBJECT], max(batches)), {}, []
    for kind, sampling in (("plain", {"speculative": False}), ("speculative", {})):
        for batch in batches:
            found[f"{kind}, batch {batch}"] = decode(engine, context.prompts[:batch], sampling)
        params = GREEDY | sampling | {"max_new_tokens": 16 if context.rehearsal else 128}
        answers += engine.generate(input_ids=context.prompts[: max(batches)], sampling_params=params)
    del engine
    context.empty_cache()
    return found, [answer["output_ids"] for answer in answers]
