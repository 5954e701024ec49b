"""How reliable repeated measurements are: Spearman and Brown (1910), and the rank correlation of trials within classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np

from distill_at_scale.pruning.selection.score_reader import label_runs

TARGET = 0.8  # the reliability that advice aims at
MAX_SAMPLES = 2000  # per class: the first by id
MAX_CLASSES = 100  # evenly spread; if there are more, between half of this number and all of it are used

Array = np.ndarray[Any, Any]


def spearman_brown(agreement: float, times: float) -> float:
    """The reliability of the mean of `times` as many parallel measurements."""
    return times * agreement / (1 + (times - 1) * agreement)


def times_needed(agreement: float, wanted: float = TARGET) -> float:
    """How many times as many measurements reach the wanted reliability; infinite if the agreement is not positive."""
    if agreement <= 0:
        return math.inf
    return wanted / (1 - wanted) * (1 - agreement) / agreement if agreement < 1 else 0.0


class TrialAgreement:
    """Rank correlation of trials within classes, measured on some samples of some classes.

    `aggregate` turns values [n, some trials, epochs] into scores [n].
    """

    def __init__(self, aggregate: Callable[[Array], Array]):
        self.aggregate, self.stride = aggregate, 1
        self.held: dict[int, list[Array]] = {}

    def add(self, labels: Array, values: Array) -> None:
        """labels [n], sorted over all calls; values float32 [n, trials, epochs]."""
        for label, start, end in label_runs(labels):
            if label % self.stride:
                continue
            parts = self.held.setdefault(label, [])
            if (room := MAX_SAMPLES - sum(map(len, parts))) > 0:
                parts.append(values[start:end][:room].copy())
            while len(self.held) > MAX_CLASSES:
                self.stride *= 2
                self.held = {c: parts for c, parts in self.held.items() if c % self.stride == 0}

    def facts(self) -> dict[str, Any] | None:
        """`trials`: agreement of single trials; `all`: expected of their mean. None for one trial, or nothing to rank."""
        classes = [v for v in map(np.concatenate, self.held.values()) if len(v) > 2 and v.shape[1] > 1]
        single, halves = list[float](), list[float]()
        for values in classes:
            trials = values.shape[1]
            single += _mean_correlation([self.aggregate(values[:, [trial]]) for trial in range(trials)])
            halves += _mean_correlation([self.aggregate(values[:, k : trials // 2 * 2 : 2]) for k in (0, 1)])
        if not single or not halves:
            return None
        half, factor = float(np.mean(halves)), trials / (trials // 2)
        overall = spearman_brown(half, factor) if half > -1 / factor else half
        return {"classes": len(classes), "trials": round(float(np.mean(single)), 6), "all": round(overall, 6)}


def _mean_correlation(scores: list[Array]) -> list[float]:
    """The mean rank correlation over pairs of scores [n]; empty if one of each pair is constant."""
    from scipy.stats import rankdata  # takes a second to import

    ranks = [rank - rank.mean() for rank in map(rankdata, scores)]
    lengths = [float(np.sqrt(rank @ rank)) for rank in ranks]
    pairs = [(a, b) for a, b in combinations(range(len(scores)), 2) if lengths[a] and lengths[b]]
    correlations = [float(ranks[a] @ ranks[b]) / (lengths[a] * lengths[b]) for a, b in pairs]
    return [float(np.mean(correlations))] if correlations else []
