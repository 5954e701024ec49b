"""What studies share: points (a configuration to try, and what came of it), the runner that tries them, and a finding.

A study knows nothing of Ray, folders or pages: it asks the runner for outcomes of points, several at once where they do not
depend on each other, and returns one finding. The same point asked for twice, also by another study or after an
interruption, is tried once. Left out: how points are tried (`experiments/points.py`) and how findings look (`findings.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from distill_at_scale.config.load import Config
from distill_at_scale.experiments.point import Outcome, Point
from distill_at_scale.pipeline.report.plot_spec import Plot

BY_RATE: Mapping[str, Any] = {"select.per_class": None, "select.stratum_start": 0.0}  # select.keep alone says how many
STATIC: Mapping[str, Any] = {**BY_RATE, "runtime.rule": "none"}
UNPRUNED: Mapping[str, Any] = {**STATIC, "select.keep": 1.0}
RANDOM: Mapping[str, Any] = {"select.criterion": "random"}


class Runner(Protocol):
    """Tries points; ingest and scores are made once for all points that agree in the keys behind them."""

    def run(self, points: Sequence[Point]) -> list[Outcome]:
        """The outcomes in the order of the points, as many at a time as there is room for.

        Raises UserError, before anything starts, for an override that is not allowed, naming it.
        """

    def shared(self, overrides: Mapping[str, Any]) -> Path:
        """The run folder with finished ingest and score stages (prepared/, scores.parquet, proxies/) of a configuration."""

    def configured(self, point: Point) -> Config:
        """The whole configuration of a point."""


@dataclass(frozen=True)
class Finding:
    """The answer of a study."""

    study: str  # its name in studies.run
    title: str
    answer: str  # one or two sentences with the figures
    paper: str  # what the paper says, and whether this agrees; empty where it says nothing
    rows: Sequence[Mapping[str, Any]]  # the figures, flat, all with the same keys
    plots: Sequence[Plot]
    facts: Mapping[str, Any]  # what other stages read: critical_keep, break_drop, agreement ...
    notes: Sequence[str] = ()  # what limits the answer


@dataclass(frozen=True)
class StudyContext:
    """What a study works with."""

    config: Config  # the base
    runner: Runner
    say: Callable[[str], None]  # one line of progress

    @property
    def overrides(self) -> dict[str, Any]:
        """What every point of a study differs by from the base: short distillations, few networks."""
        section = self.config.studies
        found: dict[str, Any] = {"evaluate.seeds": section.evaluations, "evaluate.bounds": []}
        return found | ({} if section.steps is None else {"distill.steps": section.steps})

    def points(self, overrides: Mapping[str, Any], seeds: int | None = None) -> list[Point]:
        """All repetitions of one configuration."""
        return [Point({**self.overrides, **overrides}, seed) for seed in range(seeds or self.config.studies.seeds)]


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None of one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
