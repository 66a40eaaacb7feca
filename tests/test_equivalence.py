"""Greedy output equals Hugging Face generate, token for token, whatever the tree, batch, chunk size and cache state."""

import pytest

from specbackend import Engine
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET, NEW_TOKENS

GREEDY = {"temperature": 0, "max_new_tokens": NEW_TOKENS}
TREES = {"plain": None, "5-4-8": (5, 4, 8), "5-1-6": (5, 1, 6), "3-8-32": (3, 8, 32)}


def make_engine(tree: tuple[int, int, int] | None, **params) -> Engine:
    if tree:
        params |= {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(DEMO_EAGLE3)}
        params |= dict(
            zip(("speculative_num_steps", "speculative_eagle_topk", "speculative_num_draft_tokens"), tree, strict=True)
        )
    return Engine(model_path=str(DEMO_TARGET), speculative_adaptive=False, **params)


@pytest.fixture(params=TREES, ids=str)
def tree(request):
    return TREES[request.param]


def mean_accept_length(answers: list[dict]) -> float:
    tokens = sum(answer["meta_info"]["completion_tokens"] for answer in answers)
    return tokens / sum(answer["meta_info"]["spec_verify_ct"] for answer in answers)


@pytest.mark.parametrize("radix_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("chunk", [7, -1], ids=["chunk7", "unchunked"])
@pytest.mark.parametrize("batch", [1, 16])
def test_greedy_equals_hf_generate(tree, batch, chunk, radix_cache, demo_prompts, expected, request):
    count = len(demo_prompts) if batch > 1 or request.config.getoption("--full") else 8
    engine = make_engine(
        tree,
        max_running_requests=batch,
        chunked_prefill_size=chunk,
        disable_radix_cache=not radix_cache,
        max_total_tokens=1 << 14,  # room for every prompt, so that the second round finds them all
    )
    cold = engine.generate(input_ids=demo_prompts[:count], sampling_params=GREEDY)
    assert [answer["output_ids"] for answer in cold] == expected[:count]
    if radix_cache:
        warm = engine.generate(input_ids=demo_prompts[:count], sampling_params=GREEDY)
        assert [answer["output_ids"] for answer in warm] == expected[:count]
        assert all(a["meta_info"]["cached_tokens"] == len(p) - 1 for a, p in zip(warm, demo_prompts, strict=False))
        assert mean_accept_length(warm) == pytest.approx(mean_accept_length(cold), rel=1e-6)
    stats = engine.stats()
    assert stats.free_slots + stats.evictable_slots == stats.total_slots


def test_cache_shared_by_branching_prompts_keeps_accept_length(demo_prompts):
    """A prompt that leaves a cached one midway must not draft from the other branch's boundary row."""
    tree, prompt, other = (5, 4, 8), demo_prompts[0], demo_prompts[1]
    branched = prompt[: len(prompt) // 2] + other[len(other) // 2 :]
    cold = make_engine(tree).generate(input_ids=branched, sampling_params=GREEDY)
    engine = make_engine(tree)
    engine.generate(input_ids=prompt, sampling_params=GREEDY)
    warm = engine.generate(input_ids=branched, sampling_params=GREEDY)
    assert warm["meta_info"]["cached_tokens"] >= len(prompt) // 2 - 1
    assert warm["output_ids"] == cold["output_ids"]
    assert warm["meta_info"]["spec_verify_ct"] == cold["meta_info"]["spec_verify_ct"]


def test_speculation_off_for_some_requests_of_a_batch(demo_prompts, expected):
    engine = make_engine((5, 4, 8))
    params = [{**GREEDY, "speculative": index % 2 == 0} for index in range(16)]
    answers = engine.generate(input_ids=demo_prompts[:16], sampling_params=params)
    assert [answer["output_ids"] for answer in answers] == expected[:16]
    plain_steps = [answer["meta_info"]["spec_verify_ct"] for answer in answers[1::2]]
    assert plain_steps == [answer["meta_info"]["completion_tokens"] - 1 for answer in answers[1::2]]


def test_small_pool_retracts_and_still_equals(tree, demo_prompts, expected):
    context = 320
    nodes = tree[2] if tree else 1
    engine = make_engine(tree, context_length=context, max_total_tokens=context + nodes + 150)
    answers = engine.generate(input_ids=demo_prompts[:12], sampling_params=GREEDY)
    assert [answer["output_ids"] for answer in answers] == expected[:12]


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_seeded_sampling_does_not_depend_on_speculation_or_batch(temperature, demo_prompts):
    params = [{"temperature": temperature, "max_new_tokens": 32, "seed": seed} for seed in range(16)]
    plain = make_engine(None).generate(input_ids=demo_prompts[:16], sampling_params=params)
    drafted = make_engine((5, 4, 16)).generate(input_ids=demo_prompts[:16], sampling_params=params)
    alone = make_engine((5, 4, 8), max_running_requests=1)
    single = [alone.generate(input_ids=p, sampling_params=s) for p, s in zip(demo_prompts[:16], params, strict=True)]
    assert [a["output_ids"] for a in plain] == [a["output_ids"] for a in drafted] == [a["output_ids"] for a in single]


@pytest.mark.parametrize("shape", [shape for shape in TREES.values() if shape], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_speculation_does_not_change_a_bit(shape, dtype, demo_prompts):
    """On a CPU, of prompts that are computed alike: what a token gets depends neither on siblings nor on the batch."""
    params = {**GREEDY, "logprobs": 2, "ignore_eos": True}
    plain, drafted = (
        make_engine(tree, dtype=dtype, attention_backend="native").generate(
            input_ids=demo_prompts[:12], sampling_params=params
        )
        for tree in (None, shape)
    )
    for one, other in zip(plain, drafted, strict=True):
        assert one["output_ids"] == other["output_ids"]
        assert one["meta_info"]["output_token_logprobs"] == other["meta_info"]["output_token_logprobs"]
