"""Does the engine say on this device what it says elsewhere? Every kind of draft, with graphs and without."""

from gpu_checks.context import DEMOS, Context, tree_params
from specbackend import Engine

GREEDY = {"temperature": 0, "max_new_tokens": 48}
SAMPLED = [
    {"temperature": 1.0, "max_new_tokens": 32, "seed": 1},
    {"temperature": 0.8, "top_p": 0.9, "max_new_tokens": 32, "seed": 2},
    {"temperature": 1.2, "top_k": 20, "min_p": 0.05, "max_new_tokens": 32, "seed": 3},
    {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "max_new_tokens": 32},
]
LLAMA, MIMO = {"model_path": str(DEMOS / "llama-gsm8k")}, {"model_path": str(DEMOS / "mimo-gsm8k")}
EAGLE3 = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(DEMOS / "llama-gsm8k-eagle3")}
EAGLE = {"speculative_algorithm": "EAGLE", "speculative_draft_model_path": str(DEMOS / "llama-gsm8k-eagle")}
ENGINES = {
    "EAGLE3 5,4,8": LLAMA | EAGLE3 | tree_params((5, 4, 8)),
    "EAGLE3 5,1,6": LLAMA | EAGLE3 | tree_params((5, 1, 6)),
    "EAGLE3 4,8,64": LLAMA | EAGLE3 | tree_params((4, 8, 64)),
    "EAGLE + token map 5,4,8": LLAMA
    | EAGLE
    | tree_params((5, 4, 8))
    | {"speculative_token_map": str(DEMOS / "llama-gsm8k-eagle" / "freq_256.pt")},
    "NEXTN 3,1,4": MIMO | {"speculative_algorithm": "NEXTN"} | tree_params((3, 1, 4)),
    "STANDALONE 3,1,4": LLAMA
    | {"speculative_algorithm": "STANDALONE", "speculative_draft_model_path": LLAMA["model_path"]}
    | tree_params((3, 1, 4)),
    "NGRAM": LLAMA | {"speculative_algorithm": "NGRAM"},
}


WITHOUT_GRAPHS = ("EAGLE3 5,4,8", "NEXTN 3,1,4")  # too


def check_equality(context: Context, out: dict) -> None:
    """Fills out with a row per engine, whose answers should be those of plain decoding in torch, all in float32."""
    prompts = context.prompts[:8]
    reference = _engine(context, LLAMA | {"attention_backend": "torch", "disable_cuda_graph": True})
    greedy, sampled = _answers(reference, prompts)
    hf = _hf_answers(context, prompts)
    out["plain without graphs equals transformers"] = [ours == theirs for ours, theirs in zip(greedy, hf, strict=True)]
    for name, params in ENGINES.items():
        for graphs in (True, False) if name in WITHOUT_GRAPHS else (True,):
            engine = _engine(context, params | {"disable_cuda_graph": not graphs})
            mine, mine_sampled = _answers(engine, prompts)
            out[f"{name}, graphs {'on' if graphs else 'off'}"] = {
                "greedy_equal": sum(a == b for a, b in zip(mine, greedy, strict=True)),
                "sampled_equal": sum(a == b for a, b in zip(mine_sampled, sampled, strict=True)),
                "of": [len(greedy), len(sampled)],
                "decoder": type(engine.decoder).__name__,
                "accept_length": _accept_length(engine),
            }


def _engine(context: Context, params: dict) -> Engine:
    shared = {"dtype": "float32", "device": str(context.device), "max_running_requests": 8, "max_total_tokens": 1 << 14}
    return Engine(**shared | {"cuda_graph_max_bs": 8, "speculative_adaptive": False} | params)


def _answers(engine: Engine, prompts: list[list[int]]) -> tuple[list, list]:
    greedy = engine.generate(input_ids=prompts, sampling_params=GREEDY)
    sampled = engine.generate(input_ids=prompts[: len(SAMPLED)], sampling_params=SAMPLED)
    return [answer["output_ids"] for answer in greedy], [answer["output_ids"] for answer in sampled]


def _accept_length(engine: Engine) -> float:
    stats = engine.stats()
    return stats.completion_tokens / max(stats.verify_steps, 1)


def _hf_answers(context: Context, prompts: list[list[int]]) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(LLAMA["model_path"], dtype=torch.float32).eval().to(context.device)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=context.device)
        output = model.generate(ids, do_sample=False, max_new_tokens=GREEDY["max_new_tokens"])
        answers.append(output[0, len(prompt) :].tolist())
    return answers
