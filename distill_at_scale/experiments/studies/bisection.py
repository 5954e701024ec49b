"""Finds the smallest keep rate whose accuracy is not below the unpruned one, by bisection in log(rate).

A rate is sufficient if the mean over its distillations reaches the unpruned mean less `tolerance` standard deviations (over
at least three unpruned distillations). Accuracy need not be monotone in the rate: after the bisection the search tries the
largest gap below its result, and it reports both the smallest sufficient rate and the rate above which all tried ones are.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from distill_at_scale.experiments.point import Outcome, Point
from distill_at_scale.experiments.studies.base import UNPRUNED, Repetitions, StudyContext
from distill_at_scale.experiments.studies.comparison import Level, near_chance

CLOSE = 1.05  # rates within this factor count as equal
LEAST_UNPRUNED = 3  # distillations behind the standard deviation
BELOW = 1  # tries of the budget that are reserved for rates below the result of the bisection


@dataclass(frozen=True)
class Rate(Repetitions):
    """One keep rate that was tried."""

    keep: float
    level: Level

    @property
    def sufficient(self) -> bool:
        return self.mean >= self.level.least - 1e-12

    @property
    def confidence(self) -> float:
        return self.level.confidence(self.accuracies)


@dataclass(frozen=True)
class SearchResult:
    """The tried rates, ascending; the last is 1, the unpruned distillations."""

    rates: list[Rate]
    level: Level

    @property
    def smallest(self) -> Rate:
        """The smallest sufficient rate."""
        return next(rate for rate in self.rates if rate.sufficient)

    @property
    def unbroken(self) -> Rate:
        """The smallest rate that is sufficient together with all larger ones that were tried."""
        return [self.rates[-1], *itertools.takewhile(lambda rate: rate.sufficient, reversed(self.rates))][-1]

    @property
    def exceptions(self) -> list[Rate]:
        """Insufficient rates above the smallest sufficient one: accuracy is not monotone, or noise hides it."""
        return [rate for rate in self.rates if not rate.sufficient and rate.keep > self.smallest.keep]

    @property
    def near_chance(self) -> bool:
        """Whether even the unpruned set is near chance, so that any rate seems sufficient."""
        return near_chance(self.level.mean, len(self.rates[-1].kept_per_class))

    def limited(self, minimum: int) -> bool:
        """Whether min_per_class, not the rate, decided how many samples of the smallest sufficient rate were kept."""
        rate = self.smallest
        return min(rate.kept_per_class) <= minimum and rate.kept > rate.keep * rate.of + 0.5


@dataclass
class Search:
    """Tries at most `points` rates from `lowest` to 1, `seeds` distillations each."""

    context: StudyContext
    tolerance: float
    lowest: float
    points: int
    seeds: int

    def run(self) -> SearchResult:
        count = max(LEAST_UNPRUNED, self.seeds)
        unpruned = self.context.repetitions(UNPRUNED, count)
        outcomes = self.context.points.run([*unpruned, *self._points(self.lowest)])
        self.level = Level(Repetitions(outcomes[:count]).accuracies, self.tolerance)
        self.tried = {1.0: Rate(outcomes[:count], 1.0, self.level)}
        self._add(self.lowest, outcomes[count:])
        self._bisect()
        # look below the smallest sufficient rate, in the widest gap on a log scale, while the new rate is sufficient
        while self._left() > 0:
            smallest = min(keep for keep, rate in self.tried.items() if rate.sufficient)
            below = [rate for keep, rate in sorted(self.tried.items()) if keep <= smallest]
            gaps = [(keep, b.keep / a.reached) for a, b in itertools.pairwise(below) if (keep := self._between(a, b))]
            if not gaps or not self._try(max(gaps, key=lambda gap: gap[1])[0]).sufficient:
                break
        return SearchResult([self.tried[keep] for keep in sorted(self.tried)], self.level)

    def _bisect(self) -> None:
        """Between an insufficient rate and a sufficient one above it; if `lowest` suffices, tries one rate half way to 1."""
        low, high = self.tried[self.lowest], self.tried[1.0]
        if low.sufficient:
            middle = self._between(low, high)
            if middle is None or (low := self._try(middle)).sufficient:
                return
        while self._left() > BELOW and (keep := self._between(low, high)):
            rate = self._try(keep)
            low, high = (low, rate) if rate.sufficient else (rate, high)

    def _between(self, low: Rate, high: Rate) -> float | None:
        """The geometric mean, None if it would select the same samples as a neighbour."""
        start = max(low.keep, low.reached)
        close = high.kept - low.kept <= 1 or high.keep / start < CLOSE
        return None if close else float(f"{math.sqrt(start * high.keep):.4g}")

    def _left(self) -> int:
        return self.points - (len(self.tried) - 1)

    def _points(self, keep: float) -> list[Point]:
        return self.context.repetitions({"select.per_class": None, "select.keep": keep}, self.seeds)

    def _try(self, keep: float) -> Rate:
        return self._add(keep, self.context.points.run(self._points(keep)))

    def _add(self, keep: float, outcomes: list[Outcome]) -> Rate:
        rate = self.tried[keep] = Rate(outcomes, keep, self.level)
        self.context.say(
            f"  keep {keep:.4g} ({rate.kept} samples): {rate.mean:.4f}, "
            f"{'sufficient' if rate.sufficient else 'not sufficient'} (at least {self.level.least:.4f})"
        )
        return rate
