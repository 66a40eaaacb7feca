"""The promise, from end to end: what clients get of a tritonserver that speculates is distributed as without."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from audit_report.statistics import beginnings, fit_p, tokens_at, two_sample

from specbackend.serving.client import Answer, Question, RequestFailed, ask_all, read_metrics
from specbackend.serving.tritonserver import TritonServer
from tests.checkpoints import write_head, write_target, write_tokenizer
from tests.chi_square import SIGNIFICANT
from tests.e2e.conftest import make_repository, slots
from tests.e2e.test_tritonserver import wait_until

VOCABULARY, TOKENS, REQUESTS, SHADOW_FRACTION = 8, 3, 20_000, 0.05
PROMPT = [1, 2, 3, 4, 5]
TREE = {"speculative_num_steps": 2, "speculative_eagle_topk": 2, "speculative_num_draft_tokens": 5}


@dataclass(frozen=True)
class TinyServer:
    """Its target is small enough for the probability of every answer to be computed."""

    server: TritonServer
    joint: dict[tuple[int, ...], float]  # of three tokens after PROMPT, by Hugging Face's model


@pytest.fixture(scope="module", params=["EAGLE3"])
def tiny(request, tmp_path_factory) -> Iterator[TinyServer]:
    folder = tmp_path_factory.mktemp("tiny")
    model = write_target(folder / "target", vocab_size=VOCABULARY, num_hidden_layers=7, initializer_range=0.15)
    write_tokenizer(folder / "target", VOCABULARY)
    write_head(folder / "head", request.param, model.config, seed=3)  # of the random heads a lucky one
    repository = make_repository(
        folder / "models",
        model_path=str(folder / "target"),
        speculative_algorithm=request.param,
        speculative_adaptive=False,
        speculative_draft_model_path=str(folder / "head"),
        max_running_requests=256,
        max_queued_requests=REQUESTS,
        shadow_fraction=SHADOW_FRACTION,
        **TREE,
    )
    with TritonServer(repository, log_path=folder / "server.log") as running:
        yield TinyServer(running, exact_joint(model))


@torch.inference_mode()
def exact_joint(model) -> dict[tuple[int, ...], float]:
    joint = {(): 1.0}
    for _ in range(TOKENS):
        logits_BV = model(torch.tensor([[*PROMPT, *begun] for begun in joint])).logits[:, -1].double()
        next_BV = logits_BV.softmax(-1).tolist()
        joint = {
            (*begun, token): p * next_p
            for (begun, p), next_V in zip(joint.items(), next_BV, strict=True)
            for token, next_p in enumerate(next_V)
        }
    return joint


def questions(seeds: Sequence[int], speculative: bool) -> Iterator[Question]:
    fixed = {"max_tokens": TOKENS, "temperature": 1.0, "ignore_eos": True, "speculative": speculative}
    return (Question({"input_ids": PROMPT}, {**fixed, "seed": seed}) for seed in seeds)


def interleaved(first: Iterator[Question], second: Iterator[Question]) -> Iterator[Question]:
    return (question for pair in zip(first, second, strict=True) for question in pair)


def steps(answers: list[Answer]) -> int:
    return sum(answer.responses[-1]["num_spec_steps"] for answer in answers)


def token_ids(answers: list[Answer]) -> list[list[int]]:
    return [answer.responses[-1]["output_ids"] for answer in answers]


def test_joint_distribution_of_three_tokens(tiny):
    """20,000 requests, every other without speculation and none with a seed of the others."""
    asked = interleaved(
        questions(range(0, REQUESTS, 2), speculative=True), questions(range(1, REQUESTS, 2), speculative=False)
    )
    answers = ask_all(tiny.server.grpc_url, "llm", asked, in_flight=512, outputs=["output_ids", "num_spec_steps"])
    drafted, plain = answers[::2], answers[1::2]
    assert steps(plain) == len(plain) * (TOKENS - 1)
    assert steps(drafted) < 0.85 * steps(plain)  # else there was hardly a draft to go wrong with
    sample, plain_sample = token_ids(drafted), token_ids(plain)
    counts, plain_counts = beginnings(sample, TOKENS), beginnings(plain_sample, TOKENS)
    assert set(counts) <= set(product(range(VOCABULARY), repeat=TOKENS))
    comparison = two_sample(counts, plain_counts)
    assert comparison.freedom > 100  # the answers are not all the same few
    assert comparison.p > SIGNIFICANT, comparison.suspects
    for position in range(TOKENS):  # sharper where one token is favoured
        assert two_sample(tokens_at(sample, position), tokens_at(plain_sample, position)).p > SIGNIFICANT
    assert fit_p(counts, tiny.joint) > SIGNIFICANT
    assert fit_p(plain_counts, tiny.joint) > SIGNIFICANT


def test_equal_seeds_give_equal_answers(tiny):
    """What the distributions do not show: each answer is the very one of plain decoding."""
    answers = ask_all(
        tiny.server.grpc_url,
        "llm",
        interleaved(questions(range(500), speculative=True), questions(range(500), speculative=False)),
        in_flight=128,
        outputs=["output_ids"],
    )
    assert token_ids(answers[::2]) == token_ids(answers[1::2])


def test_first_error_of_many_requests_is_raised(tiny):
    wrong = [Question({"input_ids": PROMPT}, {"top_p": 2.0})]
    asked = interleaved(questions(range(20), speculative=True), iter(wrong * 20))
    with pytest.raises(RequestFailed, match="top_p: must be above 0"):
        ask_all(tiny.server.grpc_url, "llm", asked, in_flight=8, outputs=["output_ids"])


def shadow_counts(server: TritonServer) -> list[float]:
    """Of requests, of those that differ, and of tokens; nothing before the first request."""
    metrics = read_metrics(server.metrics_url)
    names = [f"specbackend:shadow_{what}_total{{" for what in ("requests", "different_requests", "tokens")]
    return [value for start in names for name, value in metrics.items() if name.startswith(start)]


def test_shadow_mode_compares_a_share(tiny):
    server = tiny.server
    requests = sum(shadow_counts(server)[:1])
    ask_all(server.grpc_url, "llm", questions(range(1000), speculative=True), outputs=["output_ids"])
    requests += 1000 * SHADOW_FRACTION
    assert wait_until(lambda: sum(shadow_counts(server)[:1]) >= requests and slots(server)["used"] == 0, 20)
    compared, different, tokens = shadow_counts(server)
    assert (different, tokens) == (0, compared * TOKENS)
