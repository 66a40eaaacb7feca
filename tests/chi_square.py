"""Do draws follow a distribution? One test for all questions of losslessness."""

import torch

SIGNIFICANT = 1e-3  # seeds are fixed, so a test that passes once passes always


def chi_square_p(outcome_D: torch.Tensor, probability_C: torch.Tensor) -> float:
    """How likely draws (cell indices [D]) at least this far from the expected counts are. Pearson's test."""
    expected_C = probability_C.double() * len(outcome_D)
    assert expected_C.min() >= 5, f"a cell expects {expected_C.min():.1f} draws, too few for the test"
    counts_C = torch.bincount(outcome_D, minlength=len(expected_C)).double()
    statistic = ((counts_C - expected_C) ** 2 / expected_C).sum()
    freedom = torch.tensor(len(expected_C) - 1.0, dtype=torch.float64)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()
