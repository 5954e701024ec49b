"""How far measurements that are repeated can be trusted: the formula of Spearman and Brown (1910), and its inverse.

`agreement` is the correlation of two single measurements (trials, halves of subsets); their mean is the more reliable the
more of them there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from scipy.stats import rankdata

TARGET = 0.8  # the reliability that advice aims at


def spearman_brown(agreement: float, times: float) -> float:
    """The reliability of the mean of `times` as many parallel measurements, of which two agree (correlate) so well."""
    return times * agreement / (1 + (times - 1) * agreement)


def times_needed(agreement: float, wanted: float = TARGET) -> float:
    """How many times as many measurements reach a reliability; infinite where none agree."""
    if agreement <= 0:
        return math.inf
    return wanted / (1 - wanted) * (1 - agreement) / agreement if agreement < 1 else 0.0


Array = np.ndarray[Any, Any]


MAX_SAMPLES = 2000  # of a class, its first by id


MAX_CLASSES = 100  # between half and all of so many, evenly spread, where there are more


class TrialAgreement:
    """Takes the values of samples, sorted by label, and holds those of the classes that it looks at."""

    def __init__(self, aggregate: Callable[[Array], Array]):
        """`aggregate` makes scores [n] of values [n, some trials, epochs]."""
        self.aggregate, self.every = aggregate, 1
        self.held: dict[int, list[Array]] = {}

    def add(self, labels: Array, values: Array) -> None:
        """labels [n], values float32 [n, trials, epochs]."""
        starts = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
        for start, end in pairwise(starts):
            if start < end and labels[start] % self.every == 0:
                self._hold(int(labels[start]), values[start:end])

    def _hold(self, label: int, values: Array) -> None:
        parts = self.held.setdefault(label, [])
        room = MAX_SAMPLES - sum(map(len, parts))
        if room > 0:
            parts.append(values[:room].copy())
        while len(self.held) > MAX_CLASSES:
            self.every *= 2
            self.held = {label: parts for label, parts in self.held.items() if label % self.every == 0}

    def facts(self) -> dict[str, Any] | None:
        """`trials`: between single trials; `all`: expected of all; None where there is one trial, or no class to rank."""
        found = [np.concatenate(parts) for parts in self.held.values()]
        found = [values for values in found if len(values) > 2 and values.shape[1] > 1]
        single = [r for values in found for r in self._single(values)]
        halves = [r for values in found for r in self._halves(values)]
        if not single or not halves:
            return None
        trials, half = found[0].shape[1], float(np.mean(halves))
        factor = trials / (trials // 2)
        whole = spearman_brown(half, factor) if half > -1 / factor else half
        return {"classes": len(found), "trials": round(float(np.mean(single)), 6), "all": round(whole, 6)}

    def _single(self, values: Array) -> list[float]:
        """The mean over pairs of trials, or nothing where no pair can be ranked."""
        return _mean([self.aggregate(values[:, [trial]]) for trial in range(values.shape[1])])

    def _halves(self, values: Array) -> list[float]:
        each = values.shape[1] // 2
        return _mean([self.aggregate(values[:, first : 2 * each : 2]) for first in (0, 1)])


def _mean(scores: list[Array]) -> list[float]:
    """Mean rank correlation over pairs of scores [n]; empty where one of each pair has a single value."""
    ranks = [rankdata(score) for score in scores]
    ranks = [rank - rank.mean() for rank in ranks]
    lengths = [float(np.sqrt(rank @ rank)) for rank in ranks]
    pairs = [(a, b) for a, b in combinations(range(len(scores)), 2) if lengths[a] and lengths[b]]
    found = [float(ranks[a] @ ranks[b]) / (lengths[a] * lengths[b]) for a, b in pairs]
    return [float(np.mean(found))] if found else []
