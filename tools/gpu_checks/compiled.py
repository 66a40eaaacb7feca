"""Does torch.compile make decode steps faster, and what does it cost at load?"""

import time

from gpu_checks.context import Context
from gpu_checks.decode import decode, engine_of, subjects

SUBJECT = "EAGLE 5,4,8"


def check_compiled(context: Context, out: dict) -> None:
    """Fills out with a dict for the engine as it is and one for it compiled."""
    batches = (1, 2) if context.rehearsal else (1, 8)
    for name, compile_ in (("eager", False), ("compiled", True)):
        found = out[name] = {}
        start = time.monotonic()
        engine = engine_of(context, subjects(context)[SUBJECT] | {"enable_torch_compile": compile_}, max(batches))
        found["load_seconds"] = time.monotonic() - start
        for batch in batches:
            for kind, sampling in (("plain", {"speculative": False}), ("speculative", {})):
                found[f"{kind}, batch {batch}"] = decode(engine, context.prompts[:batch], sampling)
        del engine
        context.empty_cache()
