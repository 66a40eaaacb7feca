"""What do kernels gain that start before the one in front has ended, and do they still say the same, to the bit?"""

from gpu_checks.context import Context
from gpu_checks.decode import GREEDY, decode, engine_of, subjects
from specbackend.kernels import dependent_launch, linear_small_m

SUBJECT = "EAGLE3 5,4,8"
LINES = (64, 256, 1024, 2048)  # of a program's weight, to prefetch; others than PREFETCHED_LINES


def check_dependent_launch(context: Context, out: dict) -> None:
    """Fills out with a dict for either kind of launch, whether answers are equal, and a dict per prefetched size."""
    answers = {}
    try:
        for name, enabled in (("early", True), ("one by one", False)):
            dependent_launch.enabled = enabled
            out[name], answers[name] = _measure(context, (1, 2) if context.rehearsal else (1, 8))
            out["equal"] = [a == b for a, b in zip(answers["early"], answers[name], strict=True)]
    finally:
        dependent_launch.enabled = True
    default = linear_small_m.PREFETCHED_LINES
    try:
        for lines in LINES:
            linear_small_m.PREFETCHED_LINES = lines
            out[f"{lines} lines"], _ = _measure(context, (1,))
    finally:
        linear_small_m.PREFETCHED_LINES = default


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
