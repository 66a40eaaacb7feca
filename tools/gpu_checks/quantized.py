"""Weights in 8 bits: how much faster are they, and how far from the exact ones is what they say?"""

import statistics
import time
from dataclasses import dataclass

from gpu_checks.context import Context
from gpu_checks.decode import GREEDY, decode, engine_of, subjects
from specbackend import Engine
from specbackend.errors import ConfigError

SUBJECT = "EAGLE3 5,4,8"
NUM_PROMPTS, NEW_TOKENS = 8, 128


@dataclass(frozen=True)
class Said:
    """What an engine answers, and what it thinks of each token of given answers."""

    answers: list[list[int]]
    logprobs: list[float]
    best: list[int]  # what it would have said in the token's place

    @classmethod
    def of(cls, engine: Engine, prompts: list[list[int]], given: list[list[int]] | None) -> "Said":
        """given: None for the engine's own answers."""
        params = GREEDY | {"max_new_tokens": NEW_TOKENS, "speculative": False}
        answers = [each["output_ids"] for each in engine.generate(input_ids=prompts, sampling_params=params)]
        asked = {"return_logprob": True, "top_logprobs_num": 1, "logprob_start_len": 0}
        logprobs, best = [], []
        for prompt, answer in zip(prompts, given or answers, strict=True):
            params = GREEDY | {"max_new_tokens": 1}
            about = engine.generate(input_ids=prompt + answer, sampling_params=params, **asked)["meta_info"]
            logprobs += [logprob for logprob, *_ in about["input_token_logprobs"][len(prompt) :]]
            best += [token for ((_, token, _),) in about["input_top_logprobs"][len(prompt) :]]
        return cls(answers, logprobs, best)

    def compare(self, exact: "Said") -> dict:
        apart = [abs(a - b) for a, b in zip(self.logprobs, exact.logprobs, strict=True)]
        return {
            "equal_answers": [a == b for a, b in zip(self.answers, exact.answers, strict=True)],
            "share_of_equal_tokens": statistics.mean(a == b for a, b in zip(self.best, exact.best, strict=True)),
            "mean_abs_logprob_difference": statistics.mean(apart),
        }


def check_quantized(context: Context, out: dict) -> None:
    """Fills out with a dict for the weights as they are and for each kind of 8 bits."""
    prompts, batches = context.prompts[:NUM_PROMPTS], (1, 2) if context.rehearsal else (1, 8, 32)
    exact = None
    for name in (None, "int8wo", "fp8wo"):
        start, found = time.monotonic(), {}
        out[name or context.dtype] = found
        try:
            engine = engine_of(context, subjects(context)[SUBJECT] | {"quantization": name}, max(batches))
        except ConfigError as error:
            found["refused"] = str(error)
            continue
        found["load_seconds"] = time.monotonic() - start
        for batch in batches:
            for kind, sampling in (("plain", {"speculative": False}), ("speculative", {})):
                found[f"{kind}, batch {batch}"] = decode(engine, context.prompts[:batch], sampling)
        said = Said.of(engine, prompts, exact.answers if exact else None)
        exact = exact or said
        found |= said.compare(exact)
        del engine
        context.empty_cache()
