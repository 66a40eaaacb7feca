"""The tests' tests: against values from tables, and on simulated samples with and without a bias."""

from collections import Counter

import pytest
import torch
from audit_report.statistics import (
    ENDED,
    beginnings,
    chi_square_tail,
    fit_p,
    holm,
    pooled_cells,
    tokens_at,
    two_sample,
)

CELLS = 12


def draw(generator: torch.Generator, count: int, bias: float = 0.0) -> Counter:
    """Draws from a skewed distribution; `bias` is moved from its third outcome to its fourth."""
    weight_C = 0.75 ** torch.arange(CELLS, dtype=torch.float64)
    probability_C = weight_C / weight_C.sum()
    probability_C[2] -= bias
    probability_C[3] += bias
    return Counter(torch.multinomial(probability_C, count, replacement=True, generator=generator).tolist())


@pytest.mark.parametrize(
    ("statistic", "freedom", "p"), [(3.841459, 1, 0.05), (5.991465, 2, 0.05), (23.209251, 10, 0.01), (5.0, 0, 1.0)]
)
def test_tail_of_chi_square_as_in_tables(statistic, freedom, p):
    assert chi_square_tail(statistic, freedom) == pytest.approx(p, rel=1e-5)


def test_two_by_two_table_by_hand():
    """30 of 100 against 45 of 120: chi-square is N (ad - bc)^2 over the product of the margins."""
    result = two_sample(Counter(a=30, b=70), Counter(a=45, b=75))
    expected = 220 * (30 * 75 - 70 * 45) ** 2 / (75 * 145 * 100 * 120)
    assert result.freedom == 1
    assert result.p == pytest.approx(chi_square_tail(expected, 1))
    assert result.distance == pytest.approx(0.075)
    worst = result.suspects[0]
    assert (worst.first, worst.second) == (0.3, 0.375)
    assert worst.deviations**2 == pytest.approx(expected)


def test_samples_of_different_sizes_need_not_have_equal_counts():
    assert two_sample(Counter(a=100, b=300), Counter(a=1000, b=3000)).p == pytest.approx(1)


def test_rare_outcomes_are_pooled_and_nothing_is_lost():
    first, second = Counter(a=500, b=480, c=4, d=6, e=1), Counter(a=510, b=470, c=3, f=8)
    cells = pooled_cells(first, second)
    assert sorted(cells) == [(11, 11), (480, 470), (500, 510)]
    few = pooled_cells(Counter(a=500, b=480, c=1), Counter(a=510, b=470, d=1))
    assert sorted(few) == [(481, 471), (500, 510)]


def test_one_outcome_only_says_nothing():
    assert two_sample(Counter(a=50), Counter(a=70)).p == 1
    assert two_sample(Counter(a=1), Counter(b=1)).p == 1


def test_p_values_of_one_distribution_are_uniform():
    generator = torch.Generator().manual_seed(0)
    results = [two_sample(draw(generator, 2000), draw(generator, 3000)) for _ in range(600)]
    p_values = [result.p for result in results]
    for alpha in (0.01, 0.1, 0.5):
        share = sum(p < alpha for p in p_values) / 600
        assert abs(share - alpha) < 4 * (alpha * (1 - alpha) / 600) ** 0.5
    distances = torch.tensor([result.distance for result in results])
    assert distances.mean().item() == pytest.approx(results[0].noise, rel=0.05)


def test_distance_to_expect_where_no_outcome_comes_twice():
    """Each of the 20 is in one sample or the other: they differ as far as can be, whatever the distribution."""
    result = two_sample(Counter(range(10)), Counter(range(10, 20)))
    assert result.distance == pytest.approx(1)
    assert result.noise == pytest.approx(1)


def test_one_percent_of_bias_is_seen():
    generator = torch.Generator().manual_seed(1)
    results = [two_sample(draw(generator, 40_000), draw(generator, 40_000, bias=0.01)) for _ in range(20)]
    assert sum(result.p < 0.01 for result in results) >= 18
    seen = Counter(suspect.outcome for result in results for suspect in result.suspects[:1])
    assert seen[2] + seen[3] >= 18


def test_fit_to_a_known_distribution():
    generator = torch.Generator().manual_seed(2)
    weights = 0.75 ** torch.arange(CELLS, dtype=torch.float64)
    probability = dict(enumerate((weights / weights.sum()).tolist()))
    p_values = [fit_p(draw(generator, 2000), probability) for _ in range(300)]
    assert 0.02 < sum(p < 0.05 for p in p_values) / 300 < 0.09
    assert fit_p(draw(generator, 20_000, bias=0.01), probability) < 0.01
    assert fit_p(Counter({0: 100, CELLS: 1}), probability) == 0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_answers_that_end_early_are_an_outcome_of_their_own():
    answers = [[1, 2, 3, 4], [1, 2], [1]]
    assert tokens_at(answers, 1) == {2: 2, ENDED: 1}
    assert beginnings(answers) == {(1, 2, 3): 1, (1, 2): 1, (1,): 1}
