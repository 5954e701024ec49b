"""How many of every class are kept, and which: the same share of each, a share of all, or shares by spread.

A cut is made once, then asked class by class, labels ascending. The adaptive one is Neyman's allocation (1934): with the
budget of the cut by class, a class gets samples in proportion to its size times the standard deviation of its scores, at
least the minimum and at most all of it. Left out: the ranks (`ranking.py`) and the pass over the rows (`pruning/selection/select.py`).
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from distill_at_scale.config.sections import SelectSection
from distill_at_scale.pruning.selection.ranking import Ranking
from distill_at_scale.pruning.selection.score_reader import ScoreReader

Array = np.ndarray[Any, Any]
LEAST = 1e-9  # of the largest weight: what a class without any spread still gets, once the others are full


class Cut(Protocol):
    """Where the kept samples of a class end."""

    def __call__(self, label: int, keys: Array, ranks: Array) -> tuple[Array, bool]:
        """Keys and ranks of a class [n] -> kept, bool [n], and whether the minimum overrode the rate."""

    def facts(self) -> dict[str, Any]:
        """What the manifest says of it beside the counts."""


def build_cut(config: SelectSection, minimum: int, samples: ScoreReader, ranking: Ranking) -> Cut:
    if config.scope == "class":
        return ClassCut(config, minimum)
    return (GlobalCut if config.scope == "global" else AdaptiveCut)(config, minimum, samples, ranking)


def quota(share: float, count: int, minimum: int) -> int:
    """How many of `count` are kept: max(minimum, floor(share * count + 0.5)), at most all."""
    return min(count, max(minimum, int(np.floor(share * count + 0.5 + 1e-9))))


def requested(config: SelectSection, count: int) -> int:
    """How many of a class of `count` the rate, or the number per class, asks for."""
    return min(config.per_class or quota(config.rate, count, 0), count)


class ClassCut:
    """Keeps the same share, or number, of every class."""

    def __init__(self, config: SelectSection, minimum: int):
        self.config, self.minimum = config, minimum

    def __call__(self, label: int, keys: Array, ranks: Array) -> tuple[Array, bool]:
        count = len(ranks)
        wanted = requested(self.config, count)
        number = min(count, max(wanted, self.minimum))
        return _window(self.config, ranks, number), number > wanted

    def facts(self) -> dict[str, Any]:
        return {}


class AdaptiveCut:
    """Keeps more of the classes whose scores spread, with the budget of `ClassCut`.

    Looks at the spread of every class first (one pass over the scores alone). Of weighted criteria each one's spreads are
    divided by their mean over the classes and added up by weight.
    """

    def __init__(self, config: SelectSection, minimum: int, samples: ScoreReader, ranking: Ranking):
        self.config, found = config, {}
        for label, rows in samples.classes(ranking.columns):
            found[label] = rows.num_rows, ranking.spread(label, rows)
        counts = np.array([count for count, _ in found.values()], np.int64)
        self.spreads = _joined(np.array([spread for _, spread in found.values()]), ranking)
        lowest = np.minimum(minimum, counts)
        budget = sum(max(requested(config, int(n)), int(low)) for n, low in zip(counts, lowest, strict=True))
        weights = counts * self.spreads
        numbers = allocate(budget, weights, lowest, counts)
        self.labels, self.counts = list(found), counts
        self.numbers = dict(zip(found, numbers.tolist(), strict=True))
        fair = budget * weights / weights.sum() if weights.sum() > 0 else budget * counts / counts.sum()
        self.raised = {label for label, few in zip(found, np.floor(fair + 0.5) < lowest, strict=True) if few}

    def __call__(self, label: int, keys: Array, ranks: Array) -> tuple[Array, bool]:
        return _window(self.config, ranks, self.numbers[label]), label in self.raised

    def facts(self) -> dict[str, Any]:
        """Kept share and spread of every class that has samples, by label."""
        rates = [round(self.numbers[c] / int(n), 8) for c, n in zip(self.labels, self.counts, strict=True)]
        spreads = [float(f"{s:.6g}") for s in self.spreads]
        return {"rates": dict(zip(map(str, self.labels), rates, strict=True)),
                "spreads": dict(zip(map(str, self.labels), spreads, strict=True))}  # fmt: skip


def allocate(budget: int, weights: Array, lowest: Array, highest: Array) -> Array:
    """Whole numbers int64 [classes] in proportion to weights [classes], within bounds, that add up to the budget exactly.

    The budget lies between the sums of the bounds. Fractions are rounded by the largest remainder, ties by place.
    """
    weights = np.where(np.isfinite(weights), weights, 0.0)
    weights = np.maximum(weights, LEAST * weights.max()) if weights.max() > 0 else highest.astype(np.float64)
    weights = np.where(highest > 0, np.maximum(weights, np.finfo(np.float64).tiny), 1.0)
    low, high = 0.0, float((highest / weights).max())
    for _ in range(200):  # the sum grows with the factor: halve until the doubles are used up
        middle = (low + high) / 2
        if np.clip(middle * weights, lowest, highest).sum() < budget:
            low = middle
        else:
            high = middle
    shares = np.clip(high * weights, lowest, highest)
    numbers = np.minimum(np.floor(shares + 1e-6).astype(np.int64), highest)
    order = np.argsort(numbers - shares, kind="stable")
    while (missing := budget - int(numbers.sum())) > 0:
        room = order[numbers[order] < highest[order]][:missing]
        numbers[room] += 1
    return numbers


class GlobalCut:
    """Keeps a share of all samples, ties by label and id; a class that gets too few is raised to the minimum.

    Looks at all keys first (one pass over the scores alone), then takes the classes in order, each once.
    """

    def __init__(self, config: SelectSection, minimum: int, samples: ScoreReader, ranking: Ranking):
        self.minimum = minimum
        keys, classes = ranking.all_keys(samples)
        total = len(keys)
        number = min(config.per_class * classes, total) if config.per_class else quota(config.rate, total, 1)
        start = _start(config, total, number)
        self.before, self.until = _First(keys, start), _First(keys, start + number)

    def __call__(self, label: int, keys: Array, ranks: Array) -> tuple[Array, bool]:
        kept = self.until.take(keys) & ~self.before.take(keys)
        missing = min(self.minimum, len(keys)) - int(np.count_nonzero(kept))
        if missing > 0:
            spare = np.flatnonzero(~kept)
            kept[spare[np.argsort(ranks[spare])][:missing]] = True
        return kept, missing > 0

    def facts(self) -> dict[str, Any]:
        return {}


class _First:
    """The first `number` of all rows in the order of (key, position), taken part by part in order of position."""

    def __init__(self, keys: Array, number: int):
        """Reorders `keys`."""
        self.limit, self.ties = keys.dtype.type(0), 0  # the last key that is in, and how many of that key are
        if number:
            keys.partition(number - 1)
            self.limit = keys[number - 1]
            self.ties = number - int(np.count_nonzero(keys[: number - 1] < self.limit))

    def take(self, keys: Array) -> Array:
        inside = keys < self.limit
        tied = np.flatnonzero(keys == self.limit)[: self.ties]
        inside[tied] = True
        self.ties -= len(tied)
        return inside


def _joined(spreads: Array, ranking: Ranking) -> Array:
    """Spreads [classes, criteria] -> [classes]; what is not finite (the pass over the rows says where) counts as none."""
    spreads = np.where(np.isfinite(spreads), spreads, 0.0)
    weights = np.array(list(ranking.facts().get("weights", {"": 1.0}).values()))
    if len(weights) == 1:
        return spreads[:, 0]
    means = spreads.mean(axis=0)
    return (spreads / np.where(means > 0, means, 1.0)) @ weights / weights.sum()


def _window(config: SelectSection, ranks: Array, number: int) -> Array:
    """The ranks [n] of a class that are kept, bool [n]: so many from the first, or from where the stratum starts."""
    start = _start(config, len(ranks), number)
    kept: Array = ranks < start + number
    if start:
        kept &= ranks >= start
    return kept


def _start(config: SelectSection, count: int, number: int) -> int:
    """The first place that is kept: 0, or where the stratum starts, as long as `number` follow."""
    start = int(np.floor(config.stratum_start * count + 0.5)) if config.order == "stratum" else 0
    return min(start, count - number)
