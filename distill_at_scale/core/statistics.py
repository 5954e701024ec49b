"""Mean, standard deviation, and t-intervals of means and of differences (Welch), for runs, sweeps and studies alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

CONFIDENCE = 0.95  # level of all confidence intervals

Sample = tuple[float, float | None, int]  # mean, standard deviation, size


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def summary(values: Sequence[float]) -> dict[str, Any]:
    """mean, std and n, the columns that all tables of figures share."""
    mean, std = mean_and_std(values)
    return {"mean": mean, "std": std, "n": len(values)}


def welch(*samples: tuple[float, int]) -> tuple[float, float]:
    """Standard error of a difference of means, and its degrees of freedom (Welch-Satterthwaite).

    A sample is its variance divided by its size, and its size (at least 2). Returns (0, 1) without any variance.
    """
    total = sum(variance for variance, _ in samples)
    if total <= 0:
        return 0.0, 1.0
    return math.sqrt(total), total**2 / sum(variance**2 / (size - 1) for variance, size in samples)


def mean_interval(mean: float, std: float | None, n: int) -> tuple[float, float] | None:
    """The confidence interval of a mean over n values by Student's t; None for a single value."""
    from scipy.stats import t  # takes a second to import

    if std is None:
        return None
    reach = std / math.sqrt(n) * float(t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return mean - reach, mean + reach


def welch_interval(ours: Sample, theirs: Sample) -> tuple[float, float] | None:
    """The confidence interval of mean(ours) - mean(theirs) by Welch's t-test; None if a side has fewer than two values.

    A sample is its mean, its standard deviation (None for one value) and its size.
    """
    from scipy.stats import t  # takes a second to import

    (a, s, n), (b, u, m) = ours, theirs
    if s is None or u is None:
        return None
    error, freedom = welch((s**2 / n, n), (u**2 / m, m))
    reach = error * float(t.ppf((1 + CONFIDENCE) / 2, freedom))
    return a - b - reach, a - b + reach
