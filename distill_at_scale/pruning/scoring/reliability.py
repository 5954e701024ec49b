"""How far measurements that are repeated can be trusted: the formula of Spearman and Brown (1910), and its inverse.

`agreement` is the correlation of two single measurements (trials, halves of subsets); their mean is the more reliable the
more of them there are.
"""

from __future__ import annotations

import math

WANTED = 0.8  # the reliability that advice aims at


def spearman_brown(agreement: float, times: float) -> float:
    """The reliability of the mean of `times` as many parallel measurements, of which two agree (correlate) so well."""
    return times * agreement / (1 + (times - 1) * agreement)


def times_needed(agreement: float, wanted: float = WANTED) -> float:
    """How many times as many measurements reach a reliability; infinite where none agree."""
    if agreement <= 0:
        return math.inf
    return wanted / (1 - wanted) * (1 - agreement) / agreement if agreement < 1 else 0.0
