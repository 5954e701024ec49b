"""The statistics of a sweep: pure functions on the rows of its table.

A row is the accuracy (a fraction) of one trial on one set with one kind of network; rows that differ only in the seed are
repetitions of one configuration. A cost is the seconds of one distillation: selecting, distilling without the start of
workers, and scoring where a selection needs scores. Ingest, which every trial needs, does not count, except where a table
without `score_seconds` does not separate it from scoring.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distill_at_scale.config.sections import ORDER_KEYS
from distill_at_scale.core.statistics import mean_and_std, welch_interval
from distill_at_scale.experiments.sweep.table import FIXED

KEEP = ("select.keep", "select.per_class")
OF_ORDER = {f"select.{key}" for keys in ORDER_KEYS.values() for key in keys}
RANKING = (
    "select.criterion",
    "select.order",
    "select.scope",
    *sorted(OF_ORDER),
)  # without effect on a random selection
SELECTING = ("select.", "runtime.")  # keys without effect on an unpruned run

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one configuration over its distillations and the networks trained on each."""

    mean: float
    std: float | None  # over all evaluations; None for a single one
    means: tuple[float, ...]  # one per distillation
    networks: tuple[int, ...]  # evaluated per distillation

    @property
    def n(self) -> int:
        return sum(self.networks)


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
    distill_seconds: float  # without start_seconds
    start_seconds: float  # of the workers: the same for any selection
    scoring_seconds: float  # the full cost; 0 where no scores are needed
    sharing: int  # trials of this sweep that use the same scores

    @property
    def rate(self) -> float:
        return self.kept / self.of if self.of else math.nan

    @property
    def cost(self) -> float:
        """Seconds, with the full cost of scoring."""
        return self.select_seconds + self.distill_seconds + self.scoring_seconds

    @property
    def shared_cost(self) -> float:
        """Seconds, with scoring divided by the trials that use the same scores."""
        return self.select_seconds + self.distill_seconds + self.scoring_seconds / max(1, self.sharing)


@dataclass(frozen=True)
class AccuracyDifference:
    """Difference of two means with its confidence interval by Welch (unequal variances)."""

    value: float
    low: float
    high: float
    over: str  # the unit of `counts`: distillations, networks
    counts: tuple[int, int]

    @property
    def verdict(self) -> str:
        """better, worse, or open where the interval contains 0."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "open"


@dataclass(frozen=True)
class Recommendation:
    """The cheapest configuration within one standard deviation of the best, and its controls."""

    chosen: Configuration
    best: Configuration
    unpruned: Configuration | None
    random: Configuration | None
    over_random: AccuracyDifference | None
    over_unpruned: AccuracyDifference | None
    cheaper_random: Configuration | None = None  # a random selection within the same deviation that costs less

    @property
    def saved(self) -> float | None:
        """Seconds saved against the unpruned control, with the full cost of scoring; negative where pruning costs more."""
        return None if self.unpruned is None else self.unpruned.cost - self.chosen.cost

    @property
    def saved_shared(self) -> float | None:
        """The same with scoring shared by the trials of the sweep."""
        return None if self.unpruned is None else self.unpruned.cost - self.chosen.shared_cost

    @property
    def pays_after(self) -> int | None:
        """Distillations until scoring has paid for itself; None where a distillation is not faster than unpruned."""
        if self.unpruned is None or not self.chosen.scoring_seconds:
            return None
        each = self.unpruned.cost - self.chosen.select_seconds - self.chosen.distill_seconds
        return math.ceil(self.chosen.scoring_seconds / each) if each > 0 else None


def swept(rows: Sequence[Row]) -> list[str]:
    """The swept keys, in the order of the table's columns."""
    return list(dict.fromkeys(key for row in rows for key in row if key not in FIXED))


def configurations(rows: Sequence[Row], base: Mapping[str, Any] | None = None) -> list[Configuration]:
    """Finished trials by configuration, in the order of the table; `base` has the keys that are not swept."""
    base, keys = base or {}, swept(rows)
    users: dict[float, set[Any]] = {}  # seconds of scoring, read from one record -> the trials that use those scores
    for row in rows:
        if row.get("mean") is not None and needs_scores(row, base):
            users.setdefault(scoring_seconds(row), set()).add(row["trial"])
    groups: dict[tuple[Any, ...], dict[Any, Row]] = {}
    for row in rows:
        if row.get("error") is None and row.get("stopped") is None and row.get("mean") is not None:
            own = (*(repr(row.get(key)) for key in keys), control_of(row), row["set"], row["network"])
            groups.setdefault(own, {})[row["trial"]] = row
    result = []
    for trials in groups.values():
        group = list(trials.values())
        first = group[0]
        scored = needs_scores(first, base)
        own_keys = {key: first.get(key) for key in keys}
        kept, of = (round(statistics.fmean(row[name] for row in group)) for name in ("kept", "of"))
        columns = ("select_seconds", "distill_seconds", "start_seconds")
        select, distill, start = (statistics.fmean(row.get(name) or 0.0 for row in group) for name in columns)
        scoring = statistics.fmean(scoring_seconds(row) for row in group) if scored else 0.0
        sharing = len(users.get(scoring_seconds(first), [first])) if scored else 1
        result.append(Configuration(own_keys, control_of(first), first["set"], first["network"], pooled(group),
                                    kept, of, select, distill - start, start, scoring, sharing))  # fmt: skip
    return result


def pooled(rows: Sequence[Row]) -> Accuracy:
    """Mean and standard deviation of all single evaluations, from the mean, std and n of each trial."""
    counts = [max(1, int(row["n"] or 1)) for row in rows]
    total = sum(counts)
    mean = sum(row["mean"] * n for row, n in zip(rows, counts, strict=True)) / total
    pairs = zip(rows, counts, strict=True)
    squares = sum((n - 1) * (row["std"] or 0) ** 2 + n * (row["mean"] - mean) ** 2 for row, n in pairs)
    std = math.sqrt(squares / (total - 1)) if total > 1 else None
    return Accuracy(mean, std, tuple(row["mean"] for row in rows), tuple(counts))


def control_of(row: Row) -> str | None:
    """The control that a row belongs to; a swept criterion `random` is the random control too."""
    return row.get("control") or ("random" if row.get("select.criterion") == "random" else None)


def needs_scores(row: Row, base: Mapping[str, Any]) -> bool:
    criterion = row.get("select.criterion") or base.get("select.criterion")
    return control_of(row) is None and criterion != "random" and row["kept"] < row["of"]


def scoring_seconds(row: Row) -> float:
    """Seconds of the scoring that a trial uses."""
    seconds = row.get("score_seconds")
    return float(row.get("shared_seconds") or 0.0 if seconds is None else seconds)


def distilled(candidates: Iterable[Configuration], network: str | None = None) -> list[Configuration]:
    """Without the control random_real, which distils nothing; only those of `network` if it is given."""
    return [one for one in candidates if one.set == "distilled" and network in (None, one.network)]


def context(one: Configuration) -> dict[str, Any]:
    """The swept keys that also affect an unpruned run."""
    return {key: value for key, value in one.keys.items() if not key.startswith(SELECTING)}


def unpruned_of(one: Configuration, others: Iterable[Configuration], name: str = "distilled") -> Configuration | None:
    """The unpruned control of a configuration; with name = random_real the same number of random real images."""
    same = [c for c in others if c.control == "unpruned" and c.set == name and c.network == one.network]
    return _closest(same, context(one))


def random_of(one: Configuration, candidates: Iterable[Configuration]) -> Configuration | None:
    """The random control with the same number of samples as a configuration."""
    wanted = {key: value for key, value in one.keys.items() if key not in RANKING}
    same = [c for c in distilled(candidates, one.network) if c.control == "random" and c.kept == one.kept]
    return _closest(same, wanted)


def _closest(controls: Sequence[Configuration], wanted: Mapping[str, Any]) -> Configuration | None:
    """The control with the most keys as wanted; None where each differs in a key. A key that a control leaves open matches."""
    fitting = [one for one in controls if all(one.keys.get(key) in (None, value) for key, value in wanted.items())]
    return max(fitting, key=lambda one: sum(one.keys.get(k) == v for k, v in wanted.items()), default=None)


def difference(ours: Accuracy, theirs: Accuracy) -> AccuracyDifference | None:
    """Welch's interval of ours - theirs, over distillations if both sides have several, else over networks.

    None where one side has a single evaluation, whose spread is unknown.
    """
    over = "distillations" if min(len(ours.means), len(theirs.means)) > 1 else "networks"
    if over == "distillations":
        (a, s, n), (b, t, m) = ((*mean_and_std(one.means), len(one.means)) for one in (ours, theirs))
    else:
        (a, s, n), (b, t, m) = ((one.mean, one.std, one.n) for one in (ours, theirs))
    interval = welch_interval((a, s, n), (b, t, m))
    return None if interval is None else AccuracyDifference(a - b, *interval, over, (n, m))


def pareto(candidates: Sequence[Configuration]) -> list[Configuration]:
    """The configurations that no other beats in both accuracy and cost, the cheapest first."""
    front: list[Configuration] = []
    for one in sorted(candidates, key=lambda one: (one.cost, -one.accuracy.mean)):
        if not front or one.accuracy.mean > front[-1].accuracy.mean:
            front.append(one)
    return front


def recommend(candidates: Sequence[Configuration], shared: bool = False) -> Recommendation | None:
    """Recommends among distilled configurations with one network; `shared` charges each only its part of scoring.

    The random control is compared with, but never recommended unless there is nothing else.
    """
    price = (lambda one: one.shared_cost) if shared else (lambda one: one.cost)
    allowed = [one for one in distilled(candidates) if one.control != "random"] or distilled(candidates)
    if not allowed:
        return None
    best = max(allowed, key=lambda one: one.accuracy.mean)
    threshold = best.accuracy.mean - (best.accuracy.std or 0.0)
    chosen = min((one for one in allowed if one.accuracy.mean >= threshold), key=price)
    random = [one for one in distilled(candidates) if one.control == "random" and one.accuracy.mean >= threshold]
    cheaper = min((one for one in random if one.cost < price(chosen)), key=lambda one: one.cost, default=None)
    return replace(compare(chosen, candidates, best), cheaper_random=cheaper)


def compare(one: Configuration, others: Sequence[Configuration], best: Configuration | None = None) -> Recommendation:
    """A configuration with its controls."""
    unpruned = unpruned_of(one, others) if one.control != "unpruned" else one
    random = random_of(one, others) if one.control is None and one.kept < one.of else None
    over_random = difference(one.accuracy, random.accuracy) if random else None
    over_unpruned = difference(one.accuracy, unpruned.accuracy) if unpruned and unpruned is not one else None
    return Recommendation(one, best or one, unpruned, random, over_random, over_unpruned)
