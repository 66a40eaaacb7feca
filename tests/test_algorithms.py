"""Every algorithm on every family of targets says what Hugging Face's generate says, cold, warm and short of slots."""

import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from specbackend import Engine
from tests.checkpoints import FAMILIES, write_head, write_target, write_tokenizer

NEW_TOKENS = 16
HEAD_DIM = 16  # the least that a CPU's own kernels take, which are to be tested here
GREEDY = {"temperature": 0, "max_new_tokens": NEW_TOKENS}
LENGTHS = (1, 2, 5, 9, 16, 30, 31, 60)
PROMPTS = [torch.randint(64, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in LENGTHS]
TREE = {"speculative_num_steps": 3, "speculative_eagle_topk": 2, "speculative_num_draft_tokens": 6}
PAIRS = [
    (algorithm, family)
    for family in FAMILIES
    for algorithm in ("plain", "EAGLE", "EAGLE+map", "EAGLE3", "NGRAM", "STANDALONE")
] + [("NEXTN", "mimo"), ("NEXTN+map", "mimo")]


def head_params(folder: Path, kind: str) -> dict:
    return {"speculative_algorithm": kind, "speculative_draft_model_path": str(folder / kind), **TREE}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Callable[[str], tuple[Path, list[list[int]]]]:
    """By family: a folder with a target and drafts of all kinds; what generate says to each prompt."""
    return cache(lambda family: write_checkpoints(tmp_path_factory.mktemp(family), family))


def write_checkpoints(folder: Path, family: str) -> tuple[Path, list[list[int]]]:
    model = write_target(folder / "target", family, num_hidden_layers=7, head_dim=HEAD_DIM)
    write_tokenizer(folder / "target")
    for kind in ("EAGLE", "EAGLE3"):
        write_head(folder / kind, kind, model.config)
    write_target(folder / "STANDALONE", "llama", seed=1, head_dim=HEAD_DIM)
    torch.save(list(range(40, 8, -1)), folder / "freq_32.pt")
    answers = []
    for prompt in PROMPTS:
        mask = torch.ones(1, len(prompt), dtype=torch.int64)  # else generate hides the tokens that equal the padding
        settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
        output = model.generate(torch.tensor([prompt]), attention_mask=mask, **settings)
        answers.append(output[0, len(prompt) :].tolist())
    return folder, answers


def make_engine(folder: Path, algorithm: str, speculative_adaptive: bool = False, **params) -> Engine:
    kind, _, with_map = algorithm.partition("+")
    if kind == "NGRAM":
        params |= {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 5}
    elif kind != "plain":
        params |= head_params(folder, kind)
    if kind == "NEXTN":
        del params["speculative_draft_model_path"]
    if with_map:
        params["speculative_token_map"] = str(folder / "freq_32.pt")
    return Engine(model_path=str(folder / "target"), speculative_adaptive=speculative_adaptive, **params)


def outputs(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    return [answer["output_ids"] for answer in engine.generate(input_ids=prompts, sampling_params=GREEDY)]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("algorithm, family", PAIRS)
def test_greedy_equals_hf_generate(algorithm, family, batch, checkpoints):
    folder, expected = checkpoints(family)
    prompts, expected = (PROMPTS, expected) if batch > 1 else (PROMPTS[1::2], expected[1::2])
    engine = make_engine(folder, algorithm, max_running_requests=batch, chunked_prefill_size=7, max_total_tokens=2000)
    assert outputs(engine, prompts) == expected
    cold_steps = engine.stats().verify_steps
    assert outputs(engine, prompts) == expected
    assert engine.stats().cached_tokens > 0
    assert engine.stats().verify_steps == 2 * cold_steps, "drafts after a cached prefix differ"
    assert engine.stats().free_slots + engine.stats().evictable_slots == engine.stats().total_slots


@pytest.mark.parametrize("algorithm, family", PAIRS[:6] + PAIRS[-2:])
def test_retraction(algorithm, family, checkpoints):
    folder, expected = checkpoints(family)
    engine = make_engine(folder, algorithm, context_length=96, max_total_tokens=110)
    assert outputs(engine, PROMPTS) == expected


@pytest.mark.parametrize("algorithm, family", PAIRS[1:6] + PAIRS[-2:])
def test_seeded_sampling_is_that_of_plain_decoding(algorithm, family, checkpoints):
    folder, _ = checkpoints(family)
    params = [{"temperature": 1.0, "max_new_tokens": NEW_TOKENS, "seed": seed} for seed in range(len(PROMPTS))]
    plain, drafted = (
        make_engine(folder, name).generate(input_ids=PROMPTS, sampling_params=params) for name in ("plain", algorithm)
    )
    assert [a["output_ids"] for a in plain] == [a["output_ids"] for a in drafted]


@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize("speculative_adaptive", [False, True], ids=["", "adaptive"])
@pytest.mark.parametrize("algorithm, family", [*PAIRS[:6], *PAIRS[-2:]])
def test_an_engine_that_is_let_go_is_freed(algorithm, family, speculative_adaptive, checkpoints):
    """At once: its KV pool is too large to wait for the garbage collector."""
    engine = make_engine(
        checkpoints(family)[0], algorithm, speculative_adaptive=speculative_adaptive and algorithm != "plain"
    )
    outputs(engine, PROMPTS)
    decoder = weakref.ref(engine.decoder)
    del engine
    assert decoder() is None
