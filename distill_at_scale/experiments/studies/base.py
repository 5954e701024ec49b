"""What all studies share: the context in which they run points, and the finding that they return.

A study knows nothing of Ray, folders or pages. It asks for outcomes of points, several at once where they are independent. A
point that several studies need, or that an earlier command finished, runs once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill_at_scale.config.load import Config
from distill_at_scale.core.statistics import summary
from distill_at_scale.experiments.point import Outcome, Point
from distill_at_scale.experiments.points import PointSet
from distill_at_scale.pipeline.report.plot_spec import Plot

BY_RATE: Mapping[str, Any] = {"select.per_class": None, "select.stratum_start": 0.0}  # only select.keep sets the number
STATIC: Mapping[str, Any] = {**BY_RATE, "runtime.rule": "none", "select.refresh": None}
UNPRUNED: Mapping[str, Any] = {**STATIC, "select.keep": 1.0}
RANDOM: Mapping[str, Any] = {"select.criterion": "random", "select.refresh": None}


@dataclass(frozen=True)
class Finding:
    """The result of a study."""

    study: str  # its name in studies.run
    title: str
    answer: str  # one or two sentences with the figures
    paper: str  # the paper's claim, and whether this agrees; empty if it makes none
    rows: Sequence[Mapping[str, Any]]  # the figures, flat, all with the same keys
    plots: Sequence[Plot]
    facts: Mapping[str, Any]  # values that other stages read: critical_keep, break_drop, agreement ...
    notes: Sequence[str] = ()  # limits of the answer


@dataclass(frozen=True)
class Repetitions:
    """The outcomes of all repetitions of one configuration, at least one."""

    outcomes: Sequence[Outcome]

    @property
    def accuracies(self) -> list[float]:
        return [outcome.accuracy() for outcome in self.outcomes]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def kept(self) -> int:
        return self.outcomes[0].kept

    @property
    def of(self) -> int:
        return self.outcomes[0].of

    @property
    def kept_per_class(self) -> Sequence[int]:
        return self.outcomes[0].kept_per_class

    @property
    def reached(self) -> float:
        """The share that was kept, which min_per_class may have raised above the keep rate."""
        return self.kept / self.of

    @property
    def figures(self) -> dict[str, Any]:
        """The columns kept, mean, std and n of a finding's rows."""
        return {"kept": self.kept, **summary(self.accuracies)}


@dataclass(frozen=True)
class StudyContext:
    """The input of a study."""

    config: Config  # the base configuration
    points: PointSet
    say: Callable[[str], None]  # prints one line of progress

    @property
    def overrides(self) -> dict[str, Any]:
        """How all points of studies differ from the base configuration: short distillations, few networks."""
        section = self.config.studies
        overrides: dict[str, Any] = {"evaluate.seeds": section.evaluations, "evaluate.bounds": []}
        return overrides | ({} if section.steps is None else {"distill.steps": section.steps})

    def repetitions(self, overrides: Mapping[str, Any], seeds: int | None = None) -> list[Point]:
        """All repetitions of one configuration."""
        return [Point({**self.overrides, **overrides}, seed) for seed in range(seeds or self.config.studies.seeds)]

    def run(self, configurations: Iterable[Mapping[str, Any]]) -> list[Repetitions]:
        """Run several configurations, given by their overrides, together."""
        groups = [self.repetitions(overrides) for overrides in configurations]
        outcomes = iter(self.points.run([point for group in groups for point in group]))
        return [Repetitions([next(outcomes) for _ in group]) for group in groups]
