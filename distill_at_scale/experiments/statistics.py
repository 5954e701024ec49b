"""Mean, standard deviation and Welch's t-test, for sweeps and studies alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

CONFIDENCE = 0.95  # level of all confidence intervals


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
