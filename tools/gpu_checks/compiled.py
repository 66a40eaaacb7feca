"""Does torch.compile make decode steps faster, and what does it cost at load?

Batch 1 comes first: its rows are few enough for the project's own products, while more are products that Inductor
chooses by timing dozens of candidates, which may take longer than the stage has.
"""

import time

from gpu_checks.context import Context
from gpu_checks.decode import decode, engine_of, subjects

SUBJECT = "EAGLE 5,4,8"


def check_compiled(context: Context, out: dict) -> None:
    """For either batch size, fills out with a dict for the engine as it is and one for it compiled."""
    for batch in (1, 2) if context.rehearsal else (1, 8):
        for name, compile_ in (("eager", False), ("compiled", True)):
            found = out[f"{name}, batch {batch}"] = {}
            start = time.monotonic()
            engine = engine_of(context, subjects(context)[SUBJECT] | {"enable_torch_compile": compile_}, batch)
            found["load_seconds"] = time.monotonic() - start
            for kind, sampling in (("plain", {"speculative": False}), ("speculative", {})):
                found[kind] = decode(engine, context.prompts[:batch], sampling)
            del engine
            context.empty_cache()
