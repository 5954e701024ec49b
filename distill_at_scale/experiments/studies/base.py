"""What studies share: points (a configuration to try, and what came of it), the runner that tries them, and a finding.

A study knows nothing of Ray, folders or pages: it asks the runner for outcomes of points, several at once where they do not
depend on each other, and returns one finding. The same point asked for twice, also by another study or after an
interruption, is tried once. Left out: how points are tried (`experiments/points.py`) and how findings look (`findings.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill_at_scale.config.load import Config
from distill_at_scale.experiments.point import Point
from distill_at_scale.experiments.points import PointSet
from distill_at_scale.pipeline.report.plot_spec import Plot

BY_RATE: Mapping[str, Any] = {"select.per_class": None, "select.stratum_start": 0.0}  # select.keep alone says how many
STATIC: Mapping[str, Any] = {**BY_RATE, "runtime.rule": "none"}
UNPRUNED: Mapping[str, Any] = {**STATIC, "select.keep": 1.0}
RANDOM: Mapping[str, Any] = {"select.criterion": "random"}


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
    points: PointSet
    say: Callable[[str], None]  # one line of progress

    @property
    def overrides(self) -> dict[str, Any]:
        """What every point of a study differs by from the base: short distillations, few networks."""
        section = self.config.studies
        found: dict[str, Any] = {"evaluate.seeds": section.evaluations, "evaluate.bounds": []}
        return found | ({} if section.steps is None else {"distill.steps": section.steps})

    def repetitions(self, overrides: Mapping[str, Any], seeds: int | None = None) -> list[Point]:
        """All repetitions of one configuration."""
        return [Point({**self.overrides, **overrides}, seed) for seed in range(seeds or self.config.studies.seeds)]
