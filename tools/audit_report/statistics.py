"""Do two samples of answers come from one distribution? Pure: counts in, p-values out."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, floor, lgamma, log

import torch

FEWEST_EXPECTED = 5  # per cell and sample, for Pearson's approximation to hold; rarer outcomes are pooled
JOINT_TOKENS = 3
NUM_SUSPECTS = 3
ENDED = -1  # stands for the token of an answer that is over


@dataclass(frozen=True)
class Suspect:
    """An outcome and its share of either sample."""

    outcome: Hashable
    first: float
    second: float
    deviations: float  # the difference over its standard deviation


@dataclass(frozen=True)
class TwoSample:
    """A test of two samples: small p, hardly one distribution."""

    p: float
    freedom: int
    distance: float  # total variation between the two empirical distributions
    noise: float  # the distance to expect of two such samples of one distribution
    suspects: list[Suspect]  # what differs most, pooled or not


def two_sample(first: Counter, second: Counter) -> TwoSample:
    """Pearson's test of homogeneity."""
    n, m = first.total(), second.total()
    cells = pooled_cells(first, second)
    statistic = sum((a * (m / n) ** 0.5 - b * (n / m) ** 0.5) ** 2 / (a + b) for a, b in cells)
    outcomes = first.keys() | second.keys()
    deviation = {outcome: _deviation(first[outcome] + second[outcome], n, m) for outcome in outcomes}
    suspects = [
        Suspect(outcome, first[outcome] / n, second[outcome] / m, (first[outcome] / n - second[outcome] / m) / spread)
        for outcome, spread in deviation.items()
        if spread
    ]
    return TwoSample(
        p=chi_square_tail(statistic, len(cells) - 1),
        freedom=len(cells) - 1,
        distance=sum(abs(first[outcome] / n - second[outcome] / m) for outcome in outcomes) / 2,
        noise=sum(_mean_difference(first[outcome] + second[outcome], n, m) for outcome in outcomes) / 2,
        suspects=sorted(suspects, key=lambda suspect: -abs(suspect.deviations))[:NUM_SUSPECTS],
    )


def pooled_cells(first: Counter, second: Counter) -> list[tuple[int, int]]:
    """Counts of either sample per cell. Which outcomes are pooled depends on both counts' sum only."""
    n, m = first.total(), second.total()
    enough = FEWEST_EXPECTED * (n + m) / min(n, m)
    return _pool([(first[o], second[o]) for o in first.keys() | second.keys()], enough, size=sum)


def fit_p(counts: Counter, probability: Mapping[Hashable, float]) -> float:
    """Pearson's test of a sample against the distribution that it should have."""
    total = counts.total()
    if counts.keys() - probability.keys():
        return 0.0  # what cannot happen has happened
    pairs = [(counts[outcome], total * p) for outcome, p in probability.items()]
    cells = _pool(pairs, FEWEST_EXPECTED, size=lambda cell: cell[1])
    return chi_square_tail(sum((seen - expected) ** 2 / expected for seen, expected in cells), len(cells) - 1)


def chi_square_tail(statistic: float, freedom: int) -> float:
    """How likely chi-square is to be at least so large."""
    if freedom == 0:
        return 1.0
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(*half).item()


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted so that each may be compared with the error rate of all together (Holm 1979)."""
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        floor = max(floor, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = floor
    return adjusted


def tokens_at(answers: Sequence[Sequence[int]], position: int) -> Counter:
    return Counter(answer[position] if position < len(answer) else ENDED for answer in answers)


def beginnings(answers: Sequence[Sequence[int]], length: int = JOINT_TOKENS) -> Counter:
    return Counter(tuple(answer[:length]) for answer in answers)


def _pool(cells: list[tuple], enough: float, size) -> list[tuple]:
    """Put the cells that are too small together, with the smallest of the others if they are too small even so."""
    cells = sorted(cells, key=size, reverse=True)
    kept = [cell for cell in cells if size(cell) >= enough]
    rest = cells[len(kept) :]
    if not rest:
        return kept
    pool = tuple(map(sum, zip(*rest, strict=True)))
    if kept and size(pool) < enough:
        pool = tuple(map(sum, zip(pool, kept.pop(), strict=True)))
    return [*kept, pool]


def _deviation(count: int, n: int, m: int) -> float:
    """Of the difference between the shares of an outcome that both samples together had `count` times."""
    share = count / (n + m)
    return (share * (1 - share) * (1 / n + 1 / m)) ** 0.5


def _mean_difference(count: int, n: int, m: int) -> float:
    """What to expect of that difference's size.

    The mean deviation of a binomial, as De Moivre has it, scaled for draws that are not put back.
    """
    q = n / (n + m)
    v = floor(count * q) + 1
    log_choose = lgamma(count + 1) - lgamma(v + 1) - lgamma(count - v + 1)
    deviation = 2 * v * exp(log_choose + v * log(q) + (count - v + 1) * log(1 - q))
    return deviation * ((n + m - count) / (n + m - 1)) ** 0.5 * (1 / n + 1 / m)
