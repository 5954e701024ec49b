"""How many samples of each class are kept, and which: a share of each class, a share of all, or shares by spread.

A cut is built once and called class by class, in ascending order of labels. The adaptive one is Neyman's allocation (1934).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distill_at_scale.config.sections import SelectSection
from distill_at_scale.pruning.selection.held_out import HeldOut
from distill_at_scale.pruning.selection.ranking import Ranking
from distill_at_scale.pruning.selection.score_reader import ScoreReader

Array = np.ndarray[Any, Any]
SMALLEST = 1e-9  # of the largest weight: the weight of a class without spread, used once the other classes are full


def quota(share: float, count: int, minimum: int) -> int:
    """How many of `count` are kept: max(minimum, floor(share * count + 0.5)), at most all."""
    return min(count, max(minimum, int(np.floor(share * count + 0.5 + 1e-9))))


def requested(config: SelectSection, count: int) -> int:
    """How many of a class of `count` samples the rate, or the number per class, asks for."""
    return min(config.per_class or quota(config.rate, count, 0), count)


def expected(config: SelectSection, minimum: int, counts: list[int]) -> list[int]:
    """How many of each class a selection will keep: approximate for scope `global`, all if `keep` is `auto`."""
    held = HeldOut(config.held_out, minimum)
    counts = [count - held.number(count) for count in counts]
    if config.keep == "auto" and config.per_class is None:
        return counts
    return [min(count, max(minimum, requested(config, count))) for count in counts]


class Cut:
    """Keeps the same share, or number, of each class. Called with a class: its keys and ranks [n]."""

    def __init__(self, config: SelectSection, minimum: int):
        self.config, self.minimum = config, minimum

    def __call__(self, label: int, keys: Array, ranks: Array) -> tuple[Array, bool]:
        """Returns which samples are kept, bool [n], and whether the minimum overrode the rate."""
        count = len(ranks)
        wanted = requested(self.config, count)
        number = min(count, max(wanted, self.minimum))
        return window(self.config, ranks, number), number > wanted

    def facts(self) -> dict[str, Any]:
        """Additional entries of the manifest's metadata."""
        return {}


class AdaptiveCut(Cut):
    """Distributes the total of `Cut` in proportion to class size times the standard deviation of the scores.

    With several criteria, the spreads of each are divided by their mean over the classes and averaged by weight.
    """

    def __init__(self, config: SelectSection, minimum: int, reader: ScoreReader, ranking: Ranking):
        super().__init__(config, minimum)
        classes = [(label, rows.num_rows, ranking.spread(rows)) for label, rows in reader.classes(ranking.columns)]
        self.labels = [label for label, _, _ in classes]
        counts = np.array([count for _, count, _ in classes], np.int64)
        spreads = np.array([spread for _, _, spread in classes])  # [classes, criteria]
        # the pass over the rows reports scores that are not finite
        spreads = np.where(np.isfinite(spreads), spreads, 0.0)
        if spreads.shape[1] == 1:
            self.spreads = spreads[:, 0]
        else:
            weights, means = np.array(list((ranking.weights or {}).values())), spreads.mean(axis=0)
            self.spreads = (spreads / np.where(means > 0, means, 1.0)) @ weights / weights.sum()
        lowest = np.minimum(minimum, counts)
        budget = sum(max(requested(config, int(n)), int(low)) for n, low in zip(counts, lowest, strict=True))
        shares = counts * self.spreads
        numbers = allocate(budget, shares, lowest, counts)
        self.counts, self.numbers = counts, dict(zip(self.labels, numbers.tolist(), strict=True))
        fair = budget * shares / shares.sum() if shares.sum() > 0 else budget * counts / counts.sum()
        self.raised = {label for label, few in zip(self.labels, np.floor(fair + 0.5) < lowest, strict=True) if few}

    def __call__(self, label: int, keys: Array, ranks: Array) -> tuple[Array, bool]:
        return window(self.config, ranks, self.numbers[label]), label in self.raised

    def facts(self) -> dict[str, Any]:
        """Kept share and spread of each class with samples, by label."""
        rates = [round(self.numbers[c] / int(n), 8) for c, n in zip(self.labels, self.counts, strict=True)]
        names, spreads = list(map(str, self.labels)), [float(f"{s:.6g}") for s in self.spreads]
        return {"rates": dict(zip(names, rates, strict=True)), "spreads": dict(zip(names, spreads, strict=True))}


def allocate(budget: int, weights: Array, lowest: Array, highest: Array) -> Array:
    """Whole numbers int64 [classes] in proportion to weights [classes], within bounds, whose sum is exactly the budget.

    The budget lies between the sums of the bounds. Fractions are rounded by the largest remainder, ties by position.
    """
    weights = np.where(np.isfinite(weights), weights, 0.0)
    weights = np.maximum(weights, SMALLEST * weights.max()) if weights.max() > 0 else highest.astype(np.float64)
    weights = np.where(highest > 0, np.maximum(weights, np.finfo(np.float64).tiny), 1.0)
    low, high = 0.0, float((highest / weights).max())
    for _ in range(200):  # the sum grows with the factor: bisect to the precision of doubles
        middle = (low + high) / 2
        if np.clip(middle * weights, lowest, highest).sum() < budget:
            low = middle
        else:
            high = middle
    shares = np.clip(high * weights, lowest, highest)
    numbers = np.minimum(np.floor(shares + 1e-6).astype(np.int64), highest)
    order = np.argsort(numbers - shares, kind="stable")
    while (missing := budget - int(numbers.sum())) > 0:
        numbers[order[numbers[order] < highest[order]][:missing]] += 1
    return numbers


class GlobalCut(Cut):
    """Keeps a share of all samples, ties by label and id; raises classes that get too few to the minimum.

    Reads the scores once to find the limits, then must be called once per class, in order.
    """

    def __init__(self, config: SelectSection, minimum: int, reader: ScoreReader, ranking: Ranking):
        super().__init__(config, minimum)
        keys, classes = ranking.all_keys(reader)
        total = len(keys)
        number = min(config.per_class * classes, total) if config.per_class else quota(config.rate, total, 1)
        start = _start(config, total, number)
        self.before, self.until = _SmallestKeys(keys, start), _SmallestKeys(keys, start + number)

    def __call__(self, label: int, keys: Array, ranks: Array) -> tuple[Array, bool]:
        kept = self.until.take(keys) & ~self.before.take(keys)
        missing = min(self.minimum, len(keys)) - int(np.count_nonzero(kept))
        if missing > 0:
            spare = np.flatnonzero(~kept)
            kept[spare[np.argsort(ranks[spare])][:missing]] = True
        return kept, missing > 0


class _SmallestKeys:
    """The first `number` rows by (key, position), taken part by part in order of position; reorders `keys`."""

    def __init__(self, keys: Array, number: int):
        self.limit, self.ties = keys.dtype.type(0), 0  # the last key included, and how many rows with that key are
        if number:
            keys.partition(number - 1)
            self.limit = keys[number - 1]
            self.ties = number - int(np.count_nonzero(keys[: number - 1] < self.limit))

    def take(self, keys: Array) -> Array:
        inside, tied = keys < self.limit, np.flatnonzero(keys == self.limit)[: self.ties]
        inside[tied] = True
        self.ties -= len(tied)
        return inside


def build_cut(config: SelectSection, minimum: int, reader: ScoreReader, ranking: Ranking) -> Cut:
    """The cut of select.scope."""
    if config.scope == "class":
        return Cut(config, minimum)
    return (GlobalCut if config.scope == "global" else AdaptiveCut)(config, minimum, reader, ranking)


def window(config: SelectSection, ranks: Array, number: int) -> Array:
    """Which ranks [n] of a class are kept, bool [n]: `number` of them from the first, or from the start of the stratum."""
    start = _start(config, len(ranks), number)
    kept: Array = ranks < start + number
    if start:
        kept &= ranks >= start
    return kept


def _start(config: SelectSection, count: int, number: int) -> int:
    """The first rank that is kept: 0, or the start of the stratum as long as `number` ranks follow."""
    start = int(np.floor(config.stratum_start * count + 0.5)) if config.order == "stratum" else 0
    return min(start, count - number)
