"""Statistics, wording and series that studies share.

A repetition is one distillation; its accuracy is the mean over its evaluation networks.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import spearmanr, t

from distill_at_scale.config.load import Config
from distill_at_scale.core.atomic_files import set_aside
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.statistics import CONFIDENCE, mean_and_std, welch
from distill_at_scale.experiments.point import Outcome
from distill_at_scale.experiments.studies.base import Repetitions, StudyContext
from distill_at_scale.pipeline.report.plot_spec import Kind, Role, Series
from distill_at_scale.pipeline.report.text import NBSP, count, points
from distill_at_scale.pruning.scoring import score_table

SIGNIFICANT = 0.05
NEAR_CHANCE = 2.0, 0.1  # an accuracy below both: times chance, share of the way from chance to 1


@dataclass(frozen=True)
class Difference:
    """Difference of two means with the half width of its 95 % t-interval (None for a single repetition)."""

    mean: float
    half: float | None
    paired: bool

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.half is not None and abs(self.mean) > self.half + 1e-9

    @property
    def sign(self) -> int:
        """1 if clearly higher, -1 if clearly lower, else 0."""
        return 0 if not self.clear else 1 if self.mean > 0 else -1


@dataclass(frozen=True)
class Level:
    """The lowest accuracy that counts as good as unpruned: the unpruned mean less tolerance x standard deviation."""

    accuracies: Sequence[float]  # of the unpruned distillations
    tolerance: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float:
        """Over distillations."""
        return mean_and_std(self.accuracies)[1] or 0.0

    @property
    def least(self) -> float:
        return self.mean - self.tolerance * self.std

    def confidence(self, accuracies: Sequence[float]) -> float:
        """P(the true mean is not below the unpruned one by more than the tolerance), by Welch's t-test.

        The tolerance counts as known. 0 or 1 without any spread.
        """
        margin = statistics.fmean(accuracies) - self.least
        error, freedom = _welch(accuracies, self.accuracies)
        return float(t.cdf(margin / error, freedom)) if error > 0 else float(margin >= 0)


def near_chance(mean: float, classes: int) -> bool:
    """Whether an accuracy is so close to chance that any set seems as good as any other."""
    chance, (times, way) = 1 / classes, NEAR_CHANCE
    return mean < min(times * chance, chance + way * (1 - chance))


def difference(ours: Sequence[float], theirs: Sequence[float], paired: bool = True, together: int = 1) -> Difference:
    """ours - theirs; paired by repetition if `paired` and both have the same number, else Welch's.

    `together` is the number of differences whose intervals hold simultaneously (Bonferroni).
    """
    paired = paired and len(ours) == len(theirs)
    mean = statistics.fmean(ours) - statistics.fmean(theirs)
    if min(len(ours), len(theirs)) < 2:
        return Difference(mean, None, paired)
    if paired:
        gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
        error, freedom = statistics.stdev(gaps) / math.sqrt(len(gaps)), float(len(gaps) - 1)
    else:
        error, freedom = _welch(ours, theirs)
    return Difference(mean, float(t.ppf(1 - (1 - CONFIDENCE) / 2 / together, freedom)) * error, paired)


def _welch(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    return welch(*((statistics.variance(v) / len(v), len(v)) for v in (ours, theirs) if len(v) > 1))


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Spearman's correlation and its two-sided p-value; (0, 1) where one side is constant."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return 0.0, 1.0
    result = spearmanr(x, y)
    return float(result.statistic), float(result.pvalue)


def criterion_of(context: StudyContext) -> tuple[str, str]:
    """The name of the configured criterion, and its useful end: low or high."""
    name = criterion_name(context.config)
    if not isinstance(context.config.criterion, str):
        return name, "low"
    return name, score_table.facts(context.points.shared({}) / "scores.parquet")["useful"].get(name, "low")


def criterion_name(config: Config) -> str:
    """The column of the configured criterion, or the weighted sum of several."""
    if isinstance(config.criterion, str):
        return config.criterion.rpartition(":")[2]
    return " + ".join(f"{weight:g} {name}" for name, weight in config.criterion.items())


def class_names(context: StudyContext, count: int) -> list[str]:
    """The class names of the shared data; numbers where it does not have `count` classes."""
    path = context.points.shared({}) / "prepared" / "dataset.json"
    names = json.loads(path.read_text(encoding="utf-8"))["class_names"] if path.exists() else []
    return names if len(names) == count else [str(label) for label in range(count)]


def per_class(outcome: Outcome) -> list[float]:
    """Top-1 by class, mean over the evaluation networks; NaN for a class without test samples.

    Raises UserError where the evaluation has no figures per class (written by an old version).
    """
    rows = [row for row in outcome.rows if row["set"] == "distilled"]
    if any("per_class" not in row for row in rows):
        record = Path(outcome.folder, "stages", "evaluate.json")
        raise UserError(f"{outcome.folder}/evaluation.json has no accuracy per class. Its record: {set_aside(record)}")
    columns = zip(*(row["per_class"] for row in rows), strict=True)
    return [statistics.fmean(c) if None not in c else math.nan for c in columns]


def accuracy_series(
    name: str, x: Sequence[float] | Sequence[str], groups: Sequence[Repetitions],
    kind: Kind = "line", role: Role = "ours",
) -> Series:  # fmt: skip
    """A series of a plot: mean and standard deviation of the accuracies of each group."""
    figures = [mean_and_std(group.accuracies) for group in groups]
    return Series(name, x, [mean for mean, _ in figures], [std for _, std in figures], kind, role)


def sample_size(distillations: int, evaluations: int) -> str:
    """The number of runs behind a figure."""
    return f"n = {count(distillations, 'distillation')} × {count(evaluations, 'evaluation')}"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation in per cent."""
    mean, std = mean_and_std(values)
    return f"{100 * mean:.1f}" + ("" if std is None else f" ± {100 * std:.1f}") + f"{NBSP}%"


def in_points(gap: Difference) -> str:
    """A difference in percentage points with its interval."""
    return points(gap.mean) + ("" if gap.half is None else f" ± {100 * gap.half:.1f}") + " points"
