"""Stages whose work is done elsewhere."""

import os
import subprocess
import sys
import time
from dataclasses import asdict

import torch

from gpu_checks.context import ROOT, Context
from gpu_checks.decode import GREEDY, engine_of, subjects

BUNDLE = ROOT / "build" / "gpu_bundle"
MAX_TOKENS = 128


def check_kernels(context: Context, out: dict) -> None:
    """Every kernel against its reference, and its time against what the memory allows."""
    import kernel_bench

    out["compile_seconds"] = _compile_at_once(context)
    ceilings = kernel_bench.measure_ceilings()
    out |= {"ceilings": asdict(ceilings), "rows": []}
    for variant in kernel_bench.all_variants([]):
        if context.rehearsal and len(out["rows"]) == 2:
            return
        out["rows"].append(asdict(kernel_bench.bench_variant(*variant, ceilings)))


def _compile_at_once(context: Context) -> float:
    """Fill the compiler's cache, a process for each file of kernels."""
    if context.device.type != "cuda":
        return 0.0
    from compile_kernels import kernel_names

    start, (major, minor) = time.monotonic(), torch.cuda.get_device_capability(context.device)
    code = (
        "import sys, compile_kernels as c\n"
        f"for module in c.load_kernels(sys.argv[1:]): c.compile_launches(module, {10 * major + minor})"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [subprocess.Popen([sys.executable, "-c", code, name], env=env) for name in kernel_names()]
    failed = [name for name, process in zip(kernel_names(), processes, strict=True) if process.wait()]
    if failed:
        print(f"not compiled in advance: {', '.join(failed)}", flush=True)
    return time.monotonic() - start


def check_flashinfer(context: Context, out: dict) -> None:
    """FlashInfer's attention and ours, beside each other."""
    from gpu_checks.flashinfer_stage import check_flashinfer

    check_flashinfer(out)


def check_server(context: Context, out: dict) -> None:
    """A real tritonserver on the GPU, beside the engine without a server."""
    from gpu_checks.server_stage import ServedCase, check_server
    from specbackend.tokenizer import Tokenizer

    params = subjects(context)["EAGLE3 5,4,8"]
    tokenizer = Tokenizer(params["model_path"])
    prompts = [tokenizer.decode(prompt, skip_special_tokens=False) for prompt in context.prompts]
    engine = engine_of(context, params, most=32)
    sampling = GREEDY | {"max_new_tokens": MAX_TOKENS}
    answers = engine.generate(prompt=prompts[:8], sampling_params=sampling)
    params = engine.config.to_params()
    del engine
    context.empty_cache()
    case = ServedCase(params, prompts, [answer["output_ids"] for answer in answers], MAX_TOKENS)
    check_server(case, BUNDLE, context.out, out, context.seconds_left() - 10)
