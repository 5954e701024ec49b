"""Means over sample_size, compared: t-intervals of differences, rank correlation, and what a study needs of its points.

A repetition is one distillation; the accuracy of a repetition is the mean over its evaluation networks. Left out: how points
are chosen (the studies) and tried (the runner).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import spearmanr, t

from distill_at_scale.core.errors import UserError
from distill_at_scale.experiments.point import Outcome
from distill_at_scale.experiments.statistics import mean_and_std
from distill_at_scale.experiments.studies.base import StudyContext
from distill_at_scale.pipeline.report.text import NBSP, count, points
from distill_at_scale.pruning.scoring import score_table

CERTAIN = 0.95  # of intervals
SIGNIFICANT = 0.05
NEAR_CHANCE = 2.0, 0.1  # times chance, and of the way from it to 1: an accuracy below both


@dataclass(frozen=True)
class Difference:
    """Of two means, with the half width of its 95 % t-interval (None where one repetition each says nothing)."""

    mean: float
    half: float | None
    paired: bool

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.half is not None and abs(self.mean) > self.half + 1e-9


@dataclass(frozen=True)
class Level:
    """The accuracy down to which a set counts as good as the unpruned ones: their mean less tolerance x deviation."""

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
        """P(the true mean is not below the unpruned one by more than the tolerance), by Welch's t; the tolerance counts as
        known. Without any scatter 0 or 1.
        """
        margin = statistics.fmean(accuracies) - self.least
        error, freedom = _welch(accuracies, self.accuracies)
        return float(t.cdf(margin / error, freedom)) if error > 0 else float(margin >= 0)


def near_chance(mean: float, classes: int) -> bool:
    """Whether an accuracy says little, so that everything seems as good as everything else."""
    chance, (times, way) = 1 / classes, NEAR_CHANCE
    return mean < min(times * chance, chance + way * (1 - chance))


def accuracies(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.accuracy() for outcome in outcomes]


def difference(ours: Sequence[float], theirs: Sequence[float], paired: bool = True, together: int = 1) -> Difference:
    """ours - theirs; paired by repetition where both have as many and `paired`, else Welch's.

    `together`: so many differences whose intervals shall hold at once (Bonferroni).
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
    return Difference(mean, float(t.ppf(1 - (1 - CERTAIN) / 2 / together, freedom)) * error, paired)


def _welch(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Standard error of the difference of means, and its degrees of freedom."""
    parts = [(statistics.variance(v) / len(v), len(v) - 1) for v in (ours, theirs) if len(v) > 1]
    total = sum(part for part, _ in parts)
    if total <= 0:
        return 0.0, 1.0
    return math.sqrt(total), total**2 / sum(part**2 / freedom for part, freedom in parts)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Spearman's correlation and its two-sided p-value; (0, 1) where one side does not vary."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return 0.0, 1.0
    found = spearmanr(x, y)
    return float(found.statistic), float(found.pvalue)


def criterion_of(context: StudyContext) -> tuple[str, str]:
    """What the criterion of the configuration is called, and which end of it is useful: low or high."""
    chosen = context.config.criterion
    if not isinstance(chosen, str):
        return " + ".join(f"{weight:g} {name}" for name, weight in chosen.items()), "low"
    column = chosen.rpartition(":")[2]
    useful = score_table.facts(context.points.shared({}) / "scores.parquet")["useful"]
    return column, useful.get(column, "low")


def class_names(context: StudyContext, count: int) -> list[str]:
    """Of the shared data; numbers where it has other classes than `count`."""
    path = context.points.shared({}) / "prepared" / "dataset.json"
    names = json.loads(path.read_text())["class_names"] if path.exists() else []
    return names if len(names) == count else [str(label) for label in range(count)]


def per_class(outcome: Outcome) -> list[float]:
    """Top-1 by class, mean over the evaluation networks; NaN of a class without test samples.

    Raises UserError where the evaluation is from before these figures were kept.
    """
    rows = [row for row in outcome.rows if row["set"] == "distilled"]
    if any("per_class" not in row for row in rows):
        raise UserError(
            f"{outcome.folder}/evaluation.json has no accuracy per class; remove {outcome.folder}/stages/evaluate.json"
        )
    columns = zip(*(row["per_class"] for row in rows), strict=True)
    return [statistics.fmean(c) if None not in c else math.nan for c in columns]


def sample_size(distillations: int, evaluations: int) -> str:
    """How many runs are behind a figure."""
    return f"n = {count(distillations, 'distillation')} × {count(evaluations, 'evaluation')}"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation in percent."""
    mean, std = mean_and_std(values)
    return f"{100 * mean:.1f}" + ("" if std is None else f" ± {100 * std:.1f}") + f"{NBSP}%"


def in_points(found: Difference) -> str:
    """A difference in percentage points with its interval."""
    return points(found.mean) + ("" if found.half is None else f" ± {100 * found.half:.1f}") + " points"
