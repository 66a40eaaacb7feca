"""How fast is decoding, and where does a step's time go? On the widened checkpoints, with real accept lengths."""

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gpu_checks.context import Context, tree_params
from specbackend import Engine
from specbackend.request import Request
from specbackend.sampling_params import SamplingParams

GREEDY = {"temperature": 0}
KINDS = [("plain", {"speculative": False}), ("speculative", {})]
# The widened vocabulary has 127 thousand tokens that are no good and likely enough to be drawn, unless min_p forbids.
SAMPLED = [
    ("speculative, temperature 0.8", {"temperature": 0.8}),
    ("speculative, temperature 0.8, min_p 0.05", {"temperature": 0.8, "min_p": 0.05}),
    ("plain, temperature 0.8, min_p 0.05", {"temperature": 0.8, "min_p": 0.05, "speculative": False}),
]
NEW_TOKENS = 160
MOST_PROMPT_TOKENS = 700  # the demo model was trained on 1024 positions


def subjects(context: Context) -> dict[str, dict]:
    """The engines to measure, by name: the page's algorithms, each with its own default tree."""
    llama = {"model_path": str(context.checkpoint("llama-gsm8k"))}
    eagle3 = llama | {"speculative_algorithm": "EAGLE3"}
    eagle3["speculative_draft_model_path"] = str(context.checkpoint("llama-gsm8k-eagle3"))
    eagle = llama | {"speculative_algorithm": "EAGLE"}
    eagle["speculative_draft_model_path"] = str(context.checkpoint("llama-gsm8k-eagle"))
    maps = sorted(context.checkpoint("llama-gsm8k-eagle").glob("freq_*.pt"), key=lambda path: path.stat().st_size)
    mimo = {"model_path": str(context.checkpoint("mimo-gsm8k")), "speculative_algorithm": "NEXTN"}
    return {
        "EAGLE3 5,4,8": eagle3 | tree_params((5, 4, 8)),
        "EAGLE 5,4,8": eagle | tree_params((5, 4, 8)),
        "EAGLE + token map 5,4,8": eagle | tree_params((5, 4, 8)) | {"speculative_token_map": str(maps[-1])},
        "EAGLE3 5,4,16": eagle3 | tree_params((5, 4, 16)),
        "EAGLE3 3,1,4": eagle3 | tree_params((3, 1, 4)),
        "NEXTN 1,1,2": mimo | tree_params((1, 1, 2)),
    }


def check_decode(context: Context, out: dict) -> None:
    """Fills out with a dict per engine and batch size; the first engine also tells how plain decoding does."""
    batches = (1, 2) if context.rehearsal else (1, 8, 32)
    for index, (name, params) in enumerate(subjects(context).items()):
        if context.seconds_left() < 40 and not context.rehearsal:
            out[name] = {"skipped": "no time left"}
            continue
        start = time.monotonic()
        found = out[name] = {}
        engine = engine_of(context, params, max(batches))
        found["load_seconds"] = time.monotonic() - start
        for batch in batches if index == 0 else batches[:2]:
            runs = KINDS if index == 0 else KINDS[1:]
            runs = runs + SAMPLED if index == 0 and batch == 1 else runs
            for kind, sampling in runs:
                found[f"{kind}, batch {batch}"] = decode(engine, context.prompts[:batch], sampling)
        if index == 0:
            with each_step_read_at_once(engine):
                for batch, (kind, sampling) in itertools.product(batches, KINDS):
                    found[f"{kind}, batch {batch}, read at once"] = decode(engine, context.prompts[:batch], sampling)
            found["plain, batch 1, context 700"] = decode(engine, [_long_prompt(context)], {"speculative": False})
            found["speculative, batch 1, context 700"] = decode(engine, [_long_prompt(context)], {})
            found["profile"] = profile(engine, context.prompts[:1])
        del engine
        context.empty_cache()


def engine_of(context: Context, params: dict, most: int) -> Engine:
    shared = {"dtype": context.dtype, "device": str(context.device), "max_running_requests": most}
    shared["speculative_adaptive"] = False
    return Engine(**shared | {"context_length": 1000, "disable_radix_cache": True, "cuda_graph_max_bs": most} | params)


@contextmanager
def each_step_read_at_once(engine: Engine) -> Iterator[None]:
    """To see what it gains to begin the next step first."""
    engine.scheduler.goes_on = lambda batch: False
    try:
        yield
    finally:
        del engine.scheduler.goes_on


def _long_prompt(context: Context) -> list[int]:
    return list(itertools.chain(*context.prompts))[:MOST_PROMPT_TOKENS]


def decode(engine: Engine, prompts: list[list[int]], sampling: dict, new_tokens: int = NEW_TOKENS) -> dict:
    """Decode until the first request has ended, so that the batch stays what it is. Prefill is timed apart."""
    params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": new_tokens, "seed": 1} | sampling
    for number, prompt in enumerate(prompts):
        engine.submit(Request(f"decode-{number}", prompt, SamplingParams.from_dict(params)))
    start = time.perf_counter()
    while engine.scheduler.waiting or engine.scheduler.prefilling:
        engine.step()
    for _ in range(3):  # the first steps after a change of shape are slower
        engine.step()
    prefilled = time.perf_counter()
    tokens, steps, finished = Counter(), 0, False
    while not finished:
        updates = engine.step()
        steps += 1
        for update in updates:
            tokens[update.request_id] += len(update.token_ids)
        finished = any(update.finished for update in updates)
    seconds = time.perf_counter() - prefilled
    engine.drop_requests()
    total = sum(tokens.values())
    return {
        "tok_per_s": total / seconds,
        "ms_per_step": 1e3 * seconds / steps,
        "tokens_per_request_and_step": total / steps / len(prompts),
        "prefill_ms": 1e3 * (prefilled - start),
        "batch": len(prompts),
        "context": (sum(map(len, prompts)) + total / 2) / len(prompts),  # cached tokens of a request, on average
        "steps": steps,
    }


def profile(engine: Engine, prompts: list[list[int]]) -> dict:
    """Device time of one step by kernel, plain and speculative, in microseconds."""
    if engine.device.type != "cuda":
        return {}
    return {kind: _profile(engine, prompts, kind == "speculative") for kind in ("plain", "speculative")}


def _profile(engine: Engine, prompts: list[list[int]], speculative: bool, steps: int = 10) -> dict:
    params = SamplingParams.from_dict(
        {"temperature": 0, "ignore_eos": True, "max_new_tokens": 200, "speculative": speculative}
    )
    engine.submit(Request("profile", prompts[0], params))
    for _ in range(4):
        engine.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        start = time.perf_counter()
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    engine.drop_requests()
    kernels = sorted(recorded.key_averages(), key=lambda each: -each.self_device_time_total)
    return {
        "wall_us_per_step": 1e6 * wall / steps,
        "device_us_per_step": sum(each.self_device_time_total for each in kernels) / steps,
        "kernels_per_step": sum(each.count for each in kernels) / steps,
        "largest": {each.key[:90]: [each.self_device_time_total / steps, each.count / steps] for each in kernels[:30]},
    }


def check_agreement(context: Context, out: dict) -> None:
    """Do plain and speculative decoding of the wide model agree in bfloat16, greedy? How near are the ties if not?"""
    engine = engine_of(context, subjects(context)["EAGLE3 5,4,8"], most=8)
    prompts = context.prompts[:8]
    answers = {}
    for kind in ("plain", "speculative"):
        sampling = GREEDY | {"max_new_tokens": 128, "speculative": kind == "speculative"}
        answers[kind] = [a["output_ids"] for a in engine.generate(input_ids=prompts, sampling_params=sampling)]
    pairs = list(zip(prompts, *answers.values(), strict=True))
    out["equal"], out["of"] = sum(a == b for _, a, b in pairs), len(pairs)
    out["first_differences"] = [_difference(engine, *pair) for pair in pairs if pair[1] != pair[2]]


def _difference(engine: Engine, prompt: list[int], one: list[int], other: list[int]) -> dict:
    """Where two answers part, and by how much the one token was likelier there than the other."""
    place = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    sampling = GREEDY | {"max_new_tokens": 1, "speculative": False}
    asked = {"return_logprob": True, "top_logprobs_num": 5}
    answer = engine.generate(input_ids=prompt + one[:place], sampling_params=sampling, **asked)
    logprobs = {token: logprob for logprob, token, _ in answer["meta_info"]["output_top_logprobs"][0]}
    gap = abs(logprobs[one[place]] - logprobs[other[place]]) if {one[place], other[place]} <= set(logprobs) else None
    return {"place": place, "logprob_gap": gap}
