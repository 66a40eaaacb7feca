"""vLLM as a peer, in the environment that vllm_environment makes. Settings are LLM's arguments."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import vllm
from prometheus_client import REGISTRY
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models import llama_eagle

from peers.worker import Answers, Contestant, Peer, Prompts, serve

DRAFTS, ACCEPTED = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens"


def load(settings: dict) -> Contestant:
    speculative = settings.get("speculative_config")
    if speculative and speculative["method"] == "eagle":
        speculative["model"] = eagle_head(Path(speculative["model"]))
    llm = LLM(**settings, disable_log_stats=False)

    def greedy(prompts: Prompts, max_new_tokens: int) -> list[list[int]]:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = SamplingParams(temperature=0, max_tokens=max_new_tokens, detokenize=False)
        return [list(output.outputs[0].token_ids) for output in llm.generate(inputs, params, use_tqdm=False)]

    if not speculative:
        return lambda prompts, max_new_tokens: Answers(greedy(prompts, max_new_tokens))
    drafts, accepted = counter(DRAFTS), counter(ACCEPTED)

    def counted(prompts: Prompts, max_new_tokens: int) -> Answers:
        """Counts as vLLM does: steps that draft nothing are none, and what is accepted behind an answer's end is."""
        before = drafts(), accepted()
        output_ids = greedy(prompts, max_new_tokens)
        steps = int(drafts() - before[0])
        return Answers(output_ids, steps, steps + int(accepted() - before[1]))

    return counted


def counter(name: str) -> Callable[[], float]:
    """Of the engine made last. LLM.get_metrics would know no other's: each takes the names over from the one before."""
    collector = REGISTRY._names_to_collectors[name]

    def value() -> float:
        samples = [sample for metric in collector.collect() for sample in metric.samples]
        return sum(sample.value for sample in samples if sample.name.endswith("_total"))

    return value


def eagle_head(folder: Path) -> str:
    """The same head as vLLM wants it: under its authors' name of the architecture, where others write their own.

    `bias` is one of `fc`, which vLLM takes for one of the attention, so that heads with it draft nothing right. The
    place is always the same, for what vLLM compiles it keeps by that.
    """
    config = json.loads((folder / "config.json").read_text())
    if config.get("bias"):
        llama_eagle.ReplicatedLinear = _with_bias
    copy = Path(os.environ["VLLM_CACHE_ROOT"]) / "heads" / folder.resolve().relative_to("/")
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path.resolve())
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"], "bias": False}))
    return str(copy)


def _with_bias(*args, **options) -> ReplicatedLinear:
    return ReplicatedLinear(*args, **options | {"bias": True})


if __name__ == "__main__":
    serve(Peer(vllm.__version__, load))
