"""A point is one configuration to distil and evaluate; an outcome is its result."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Point:
    """One distillation to evaluate: its differences from the base configuration, and the number of its repetition.

    Repetition k uses the same scores, with distill.seed and select.seed raised by k. The control random_real (networks trained
    on random real images) runs only where `evaluate.control` is among the overrides.
    """

    overrides: Mapping[str, Any] = field(default_factory=dict)  # dotted keys
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """The result of a point."""

    point: Point
    rows: Sequence[Mapping[str, Any]]  # of its evaluation: set, network, seed, top1, top5, seconds
    kept: int
    of: int
    kept_per_class: Sequence[int]
    seconds: Mapping[str, float]  # by stage: select, distill (of it start), evaluate, the shared ingest and score
    folder: Path  # of its run
    stopped: int | None = None  # the step after which a scheduler stopped it; `rows` then has its last evaluation

    def accuracy(self, name: str = "distilled") -> float:
        """Mean top-1 of a set over evaluation networks, as a fraction; NaN if the set was not evaluated."""
        top1 = [row["top1"] for row in self.rows if row["set"] == name]
        return statistics.fmean(top1) if top1 else float("nan")
