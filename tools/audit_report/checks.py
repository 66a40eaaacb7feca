"""The three questions of an audit. Each asks the subject everything twice: with speculation and without."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any

from audit_report.statistics import JOINT_TOKENS, TwoSample, beginnings, holm, tokens_at, two_sample
from audit_report.subjects import Answer, AuditError, Prompt, Subject

CONTEXT = 4  # tokens shown before and after a difference

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """All prompts answered one way."""

    tokens: int
    steps: int
    seconds: float
    accept_lengths: list[float]  # of the answers that took a step

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def accept_length(self) -> float:
        return self.tokens / max(self.steps, 1)


@dataclass(frozen=True)
class Difference:
    """Where the two answers to a prompt part, and the token ids around."""

    prompt: int
    position: int
    before: list[int]
    speculative: list[int]
    plain: list[int]


@dataclass(frozen=True)
class Equality:
    name: str
    prompts: int
    speculative: Run
    plain: Run
    differences: list[Difference]

    @property
    def passed(self) -> bool:
        return not self.differences


@dataclass(frozen=True)
class Test:
    """One of the two-sample tests."""

    prompt: int
    what: str
    result: TwoSample
    adjusted_p: float  # by Holm, over all tests of the audit


@dataclass(frozen=True)
class Distributions:
    prompts: int
    draws: int  # per prompt and sample
    alpha: float  # how likely an exact server is to fail one test or more
    tests: list[Test]

    @property
    def differences(self) -> list[Test]:
        return [test for test in self.tests if test.adjusted_p < self.alpha]

    @property
    def passed(self) -> bool:
        return not self.differences


@dataclass
class Audit:
    """What was asked of whom, and what came of it."""

    facts: dict[str, str]
    equalities: list[Equality] = field(default_factory=list)
    distributions: Distributions | None = None

    @property
    def checks(self) -> dict[str, Equality | Distributions]:
        checks = {equality.name: equality for equality in self.equalities}
        return checks | ({"distributions": self.distributions} if self.distributions else {})

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks.values())

    def figures(self) -> dict:
        """For JSON."""
        checks = {name: {"passed": check.passed, **asdict(check)} for name, check in self.checks.items()}
        return {"passed": self.passed, "facts": self.facts, **checks}


def compare_answers(name: str, subject: Subject, prompts: Sequence[Prompt], params: Sequence[Params]) -> Equality:
    subject.answer(prompts, [{**each, "max_new_tokens": 1, "min_new_tokens": 0} for each in params])
    drafted, speculative = _run(subject, prompts, params, speculative=True)
    plain_answers, plain = _run(subject, prompts, params, speculative=False)
    check_that_drafts_counted(speculative.steps, plain.steps)
    pairs = zip(drafted, plain_answers, strict=True)
    found = [first_difference(number, a.output_ids, b.output_ids) for number, (a, b) in enumerate(pairs)]
    return Equality(name, len(prompts), speculative, plain, [difference for difference in found if difference])


def check_that_drafts_counted(speculative_steps: int, plain_steps: int) -> None:
    """Else both sides did the same, and their equality says nothing."""
    if speculative_steps >= plain_steps:
        steps = f"{speculative_steps} steps with speculation, {plain_steps} without"
        raise AuditError(f"{steps}: this one does not speculate, or no draft was ever right")


def first_difference(prompt: int, speculative: list[int], plain: list[int]) -> Difference | None:
    pairs = enumerate(zip_longest(speculative, plain))  # an answer that ends early differs where it ends
    position = next((position for position, (a, b) in pairs if a != b), None)
    if position is None:
        return None
    before, after = max(0, position - CONTEXT), position + CONTEXT
    return Difference(prompt, position, plain[before:position], speculative[position:after], plain[position:after])


def compare_distributions(
    subject: Subject, prompts: Sequence[Prompt], params: Params, draws: int, num_tokens: int, seed: int, alpha: float
) -> Distributions:
    """Test the tokens at each position, and the first three together.

    No seed comes twice: with the same seeds in both samples the answers would be equal and say nothing about others.
    """
    params = {**params, "max_new_tokens": num_tokens}
    found, steps = [], [0, 0]
    for number, prompt in enumerate(prompts):
        seeds = range(seed + 2 * draws * number, seed + 2 * draws * (number + 1))
        answers = [_drawn(subject, prompt, params, seeds[start::2], speculative=not start) for start in (0, 1)]
        steps = [step + sum(answer.num_steps for answer in each) for step, each in zip(steps, answers, strict=True)]
        samples = [[answer.output_ids for answer in each] for each in answers]
        found += [(number, what, two_sample(*counts)) for what, counts in _counted(samples, num_tokens)]
    check_that_drafts_counted(*steps)
    adjusted = holm([result.p for _, _, result in found])
    return Distributions(len(prompts), draws, alpha, [Test(*test, p) for test, p in zip(found, adjusted, strict=True)])


def _counted(samples: list[list[list[int]]], num_tokens: int):
    """What is compared, and the counts of both samples."""
    for position in range(num_tokens):
        yield f"token {position}", [tokens_at(sample, position) for sample in samples]
    if num_tokens >= JOINT_TOKENS:
        yield f"first {JOINT_TOKENS} jointly", [beginnings(sample) for sample in samples]


def _drawn(subject: Subject, prompt: Prompt, params: Params, seeds: Sequence[int], speculative: bool) -> list[Answer]:
    asked = [{**params, "seed": seed, "speculative": speculative} for seed in seeds]
    return subject.answer([prompt] * len(asked), asked)


def _run(
    subject: Subject, prompts: Sequence[Prompt], params: Sequence[Params], speculative: bool
) -> tuple[list[Answer], Run]:
    start = time.perf_counter()
    answers = subject.answer(prompts, [{**each, "speculative": speculative} for each in params])
    seconds = time.perf_counter() - start
    tokens, steps = (sum(counts) for counts in zip(*((len(a.output_ids), a.num_steps) for a in answers), strict=True))
    lengths = [len(answer.output_ids) / answer.num_steps for answer in answers if answer.num_steps]
    return answers, Run(tokens, steps, seconds, lengths)
