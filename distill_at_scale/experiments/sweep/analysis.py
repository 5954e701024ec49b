"""What a sweep's table says: pure functions on its rows.

A row is one trial's accuracy (a fraction) on one set with one kind of network; rows that differ only in the seed are
repetitions of a configuration. Costs are seconds of one distillation: selecting, distilling and, where a selection
needs scores, scoring. Ingest, which all need, counts for none where the table has `score_seconds`, else it is taken for a
part of scoring. Left out: sentences (`experiments/sweep/text.py`), plots (`experiments/sweep/plots.py`) and the page.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy import stats

KEEP = ("select.keep", "select.per_class")
RANKING = ("select.criterion", "select.order", "select.scope", "select.stratum_start")  # no matter to a random draw
SELECTING = ("select.", "runtime.")  # keys that an unpruned run does not have
TRIAL = ("trial", "seed", "control", "set", "network", "mean", "std", "n", "kept", "of", "seconds", "stopped", "error")
PARTS = ("ingest", "score", "shared", "select", "distill", "evaluate")  # whose seconds have columns
NOT_SWEPT = {*TRIAL, *(f"{part}_seconds" for part in PARTS)}
LEVEL = 0.95  # of confidence intervals

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Accuracy:
    """Of one configuration over its distillations, and the networks trained on what each of them made."""

    mean: float
    std: float | None  # over all evaluations; None of a single one
    means: tuple[float, ...]  # one per distillation
    networks: tuple[int, ...]  # evaluated per distillation

    @property
    def n(self) -> int:
        return sum(self.networks)

    @property
    def sample(self) -> tuple[float, float | None, int]:
        """Mean, standard deviation and size of what may be taken for independent: distillations, where there are several."""
        if len(self.means) > 1:
            return statistics.fmean(self.means), statistics.stdev(self.means), len(self.means)
        return self.mean, self.std, self.n


@dataclass(frozen=True)
class Configuration:
    """All repetitions of one configuration on one set with one kind of network."""

    keys: Mapping[str, Any]  # the swept ones
    control: str | None  # unpruned, random
    set: str
    network: str
    accuracy: Accuracy
    kept: int
    of: int
    select_seconds: float  # means over the repetitions
    distill_seconds: float
    scoring_seconds: float  # all of it; 0 where no scores are needed
    sharing: int  # trials of this sweep that stand on the same scores

    @property
    def rate(self) -> float:
        return self.kept / self.of if self.of else math.nan

    @property
    def cost(self) -> float:
        """Seconds, with all of scoring."""
        return self.select_seconds + self.distill_seconds + self.scoring_seconds

    @property
    def shared_cost(self) -> float:
        """Seconds, with an equal part of scoring for every trial that stands on it."""
        return self.select_seconds + self.distill_seconds + self.scoring_seconds / max(1, self.sharing)


@dataclass(frozen=True)
class AccuracyDifference:
    """Of two means, with its confidence interval by Welch (unequal variances)."""

    value: float
    low: float
    high: float
    p: float
    over: str  # what was counted: distillations, networks
    counts: tuple[int, int]

    @property
    def verdict(self) -> str:
        """better, worse, or open where the interval holds 0."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "open"


def swept(rows: Sequence[Row]) -> list[str]:
    """The swept keys, in the order of the table's columns."""
    return list(dict.fromkeys(key for row in rows for key in row if key not in NOT_SWEPT))


def configurations(rows: Sequence[Row], base: Mapping[str, Any] | None = None) -> list[Configuration]:
    """Finished trials by configuration, in the order of the table; `base` gives keys that are not swept."""
    keys, sharing = swept(rows), _sharing(rows, base or {})
    groups: dict[tuple[Any, ...], dict[Any, Row]] = {}
    for row in rows:
        if finished(row):
            own = (*(repr(row.get(key)) for key in keys), control_of(row), row["set"], row["network"])
            groups.setdefault(own, {})[row["trial"]] = row
    return [_configuration(list(group.values()), keys, base or {}, sharing) for group in groups.values()]


def _configuration(rows: Sequence[Row], keys: Sequence[str], base: Mapping[str, Any], sharing: Mapping[float, int],
                   ) -> Configuration:  # fmt: skip
    first = rows[0]
    scored = needs_scores(first, base)
    return Configuration(
        {key: first.get(key) for key in keys},
        control_of(first),
        first["set"],
        first["network"],
        pooled(rows),
        round(statistics.fmean(row["kept"] for row in rows)),
        round(statistics.fmean(row["of"] for row in rows)),
        _mean(rows, "select_seconds"),
        _mean(rows, "distill_seconds"),
        statistics.fmean(scoring(row) for row in rows) if scored else 0.0,
        sharing.get(scoring(first), 1) if scored else 1,
    )


def pooled(rows: Sequence[Row]) -> Accuracy:
    """Mean and standard deviation of all single evaluations, from the mean, std and n of each trial."""
    counts = [max(1, int(row["n"] or 1)) for row in rows]
    total = sum(counts)
    mean = sum(row["mean"] * n for row, n in zip(rows, counts, strict=True)) / total
    squares = sum(
        (n - 1) * (row["std"] or 0) ** 2 + n * (row["mean"] - mean) ** 2 for row, n in zip(rows, counts, strict=True)
    )
    std = math.sqrt(squares / (total - 1)) if total > 1 else None
    return Accuracy(mean, std, tuple(row["mean"] for row in rows), tuple(counts))


def finished(row: Row) -> bool:
    return row.get("error") is None and row.get("stopped") is None and row.get("mean") is not None


def control_of(row: Row) -> str | None:
    """The control that a row is; drawing at random as a swept criterion is the random control too."""
    return row.get("control") or ("random" if row.get("select.criterion") == "random" else None)


def needs_scores(row: Row, base: Mapping[str, Any]) -> bool:
    criterion = row.get("select.criterion") or base.get("select.criterion")
    return control_of(row) is None and criterion != "random" and row["kept"] < row["of"]


def scoring(row: Row) -> float:
    """Seconds of all scoring that a trial stands on."""
    found = row.get("score_seconds")
    return float(row.get("shared_seconds") or 0.0 if found is None else found)


def _sharing(rows: Sequence[Row], base: Mapping[str, Any]) -> dict[float, int]:
    """How many trials stand on the same scores; equal seconds, read from one record, tell which."""
    trials: dict[float, set[Any]] = {}
    for row in rows:
        if row.get("mean") is not None and needs_scores(row, base):
            trials.setdefault(scoring(row), set()).add(row["trial"])
    return {seconds: len(found) for seconds, found in trials.items()}


def _mean(rows: Sequence[Row], key: str) -> float:
    return statistics.fmean(row.get(key) or 0.0 for row in rows)


def distilled(found: Iterable[Configuration], network: str | None = None) -> list[Configuration]:
    """Without the real images, which are no configuration; of one network, where it is named."""
    return [one for one in found if one.set == "distilled" and network in (None, one.network)]


def context(one: Configuration) -> dict[str, Any]:
    """The swept keys that an unpruned run has too."""
    return {key: value for key, value in one.keys.items() if not key.startswith(SELECTING)}


def unpruned_of(one: Configuration, found: Iterable[Configuration], name: str = "distilled") -> Configuration | None:
    """The unpruned control of a configuration; `name` random_real: as many real images."""
    same = [o for o in found if o.control == "unpruned" and o.set == name and o.network == one.network]
    return _closest(same, context(one))


def random_of(one: Configuration, found: Iterable[Configuration]) -> Configuration | None:
    """The random control at a configuration's rate."""
    wanted = {key: value for key, value in one.keys.items() if key not in RANKING}
    same = [o for o in found if o.control == "random" and o.set == "distilled" and o.network == one.network]
    return _closest([o for o in same if o.kept == one.kept], wanted)


def _closest(found: Sequence[Configuration], wanted: Mapping[str, Any]) -> Configuration | None:
    """That with the most keys as wanted; a key that a control leaves open fits."""

    def equal(one: Configuration) -> int:
        return sum(one.keys.get(key) == value for key, value in wanted.items())

    fitting = [one for one in found if all(one.keys.get(key) in (None, value) for key, value in wanted.items())]
    return max(fitting, key=equal, default=None)


def difference(ours: Accuracy, theirs: Accuracy) -> AccuracyDifference | None:
    """Welch's interval of ours - theirs; None where either side has a single evaluation, so that nothing is known of chance."""
    distillations = len(ours.means) > 1 and len(theirs.means) > 1
    (a, s, n), (b, t, m) = (
        (ours.sample, theirs.sample)
        if distillations
        else ((ours.mean, ours.std, ours.n), (theirs.mean, theirs.std, theirs.n))
    )
    if s is None or t is None:
        return None
    low, high, p = welch((a, s, n), (b, t, m))
    return AccuracyDifference(a - b, low, high, p, "distillations" if distillations else "networks", (n, m))


def welch(ours: tuple[float, float, int], theirs: tuple[float, float, int]) -> tuple[float, float, float]:
    """Ends of the confidence interval of a difference of means, and the two-sided p-value, of (mean, std, n) twice."""
    (a, s, n), (b, t, m) = ours, theirs
    u, v = s**2 / n, t**2 / m
    if u + v == 0:
        return a - b, a - b, 1.0 if a == b else 0.0
    freedom = (u + v) ** 2 / (u**2 / (n - 1) + v**2 / (m - 1))
    error = math.sqrt(u + v)
    reach = error * float(stats.t.ppf((1 + LEVEL) / 2, freedom))
    return a - b - reach, a - b + reach, 2 * float(stats.t.sf(abs(a - b) / error, freedom))


def pareto(found: Sequence[Configuration]) -> list[Configuration]:
    """Those that no other beats in accuracy and cost, the cheapest first."""
    front: list[Configuration] = []
    for one in sorted(found, key=lambda one: (one.cost, -one.accuracy.mean)):
        if not front or one.accuracy.mean > front[-1].accuracy.mean:
            front.append(one)
    return front


@dataclass(frozen=True)
class Recommendation:
    """The cheapest configuration within one standard deviation of the best, and what it is compared with."""

    chosen: Configuration
    best: Configuration
    unpruned: Configuration | None
    random: Configuration | None
    over_random: AccuracyDifference | None
    over_unpruned: AccuracyDifference | None
    cheaper_random: Configuration | None = None  # a random selection within the same deviation that costs less

    @property
    def saved(self) -> float | None:
        """Seconds against the unpruned control, all of scoring charged; negative where pruning does not pay."""
        return None if self.unpruned is None else self.unpruned.cost - self.chosen.cost

    @property
    def saved_shared(self) -> float | None:
        """The same with scoring shared by the trials of the sweep."""
        return None if self.unpruned is None else self.unpruned.cost - self.chosen.shared_cost

    @property
    def pays_after(self) -> int | None:
        """Distillations that it takes until scoring has paid; None where a distillation is no faster."""
        one = self.chosen
        if self.unpruned is None or not one.scoring_seconds:
            return None
        each = self.unpruned.cost - one.select_seconds - one.distill_seconds
        return math.ceil(one.scoring_seconds / each) if each > 0 else None


def recommend(found: Sequence[Configuration], shared: bool = False) -> Recommendation | None:
    """Of distilled configurations with one network; `shared` charges each only its part of scoring.

    The random control is compared with, not recommended.
    """
    price = (lambda one: one.shared_cost) if shared else (lambda one: one.cost)
    candidates = [one for one in distilled(found) if one.control != "random"] or distilled(found)
    if not candidates:
        return None
    best = max(candidates, key=lambda one: one.accuracy.mean)
    enough = best.accuracy.mean - (best.accuracy.std or 0.0)
    chosen = min((one for one in candidates if one.accuracy.mean >= enough), key=price)
    drawn = [one for one in distilled(found) if one.control == "random" and one.accuracy.mean >= enough]
    cheaper = min((one for one in drawn if one.cost < price(chosen)), key=lambda one: one.cost, default=None)
    return replace(compare(chosen, found, best), cheaper_random=cheaper)


def compare(one: Configuration, found: Sequence[Configuration], best: Configuration | None = None) -> Recommendation:
    """A configuration beside its controls."""
    unpruned = unpruned_of(one, found) if one.control != "unpruned" else one
    random = random_of(one, found) if one.control is None and one.kept < one.of else None
    over_random = difference(one.accuracy, random.accuracy) if random else None
    over_unpruned = difference(one.accuracy, unpruned.accuracy) if unpruned and unpruned is not one else None
    return Recommendation(one, best or one, unpruned, random, over_random, over_unpruned)
