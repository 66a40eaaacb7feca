"""A target that drafts for itself is always right, so every step must accept the whole chain: any KV that is wrong,
late or in the wrong slot shows."""

from math import ceil

import pytest
import torch

from specbackend import Engine
from tests.checkpoints import write_target, write_tokenizer

STEPS, NEW_TOKENS = 4, 30
GREEDY = {"temperature": 0, "max_new_tokens": NEW_TOKENS}
LENGTHS = (1, 2, 3, 4, 5, 6, 11, 24)  # the first ones are shorter than what is read before drafting
PROMPTS = [torch.randint(64, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in LENGTHS]
FEWEST_STEPS = ceil((NEW_TOKENS - 1) / (STEPS + 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    write_target(folder, "qwen3")
    write_tokenizer(folder)
    return folder


def make_engine(folder, speculative_adaptive: bool = False, **params) -> Engine:
    return Engine(
        model_path=str(folder),
        speculative_algorithm="STANDALONE",
        speculative_adaptive=speculative_adaptive,
        speculative_draft_model_path=str(folder),
        speculative_num_steps=STEPS,
        speculative_eagle_topk=1,
        speculative_num_draft_tokens=STEPS + 1,
        **params,
    )


def steps(engine: Engine, prompts: list[list[int]]) -> list[int]:
    answers = engine.generate(input_ids=prompts, sampling_params=GREEDY)
    return [answer["meta_info"]["spec_verify_ct"] for answer in answers]


@pytest.mark.parametrize("batch, chunk", [(1, -1), (8, 7), (8, -1), (3, 2)])
def test_every_draft_is_accepted(folder, batch, chunk):
    engine = make_engine(folder, max_running_requests=batch, chunked_prefill_size=chunk, max_total_tokens=2000)
    assert steps(engine, PROMPTS) == [FEWEST_STEPS] * len(PROMPTS)
    assert steps(engine, PROMPTS) == [FEWEST_STEPS] * len(PROMPTS), "after cached prefixes"


def test_answers_in_the_cache_go_on_as_well(folder):
    """The last tokens of an answer have no draft KV yet when it ends, so they must not be cached."""
    engine = make_engine(folder, max_total_tokens=2500)
    answers = engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)
    # so many new tokens that what is read before drafting does not reach back to the cached ones
    longer = [prompt + answer["output_ids"] + PROMPTS[-1] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    before = engine.stats().cached_tokens
    assert steps(engine, longer) == [FEWEST_STEPS] * len(PROMPTS)
    reused = engine.stats().cached_tokens - before
    assert reused >= sum(len(prompt) + NEW_TOKENS - 2 - STEPS for prompt in PROMPTS)


def test_after_retraction(folder):
    engine = make_engine(folder, context_length=96, max_total_tokens=160)
    assert steps(engine, PROMPTS) == [FEWEST_STEPS] * len(PROMPTS)
