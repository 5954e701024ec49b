"""A point set whose outcomes follow from a formula, so that a study's answer is known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from conftest import tiny_config

from distill_at_scale.config.load import Config, with_overrides
from distill_at_scale.data.prepared.parquet import RowGroupWriter
from distill_at_scale.experiments.point import Outcome, Point
from distill_at_scale.experiments.studies.base import StudyContext
from distill_at_scale.pruning.scoring import score_table
from distill_at_scale.storage.run_dir import RunDir
from distill_at_scale.storage.stage_record import StageInputs

CLASSES, EACH = 4, 250


class FakePointSet:
    """accuracy(config, share kept) of every class; `noise` is the deviation between repetitions, the same for all points."""

    def __init__(
        self,
        folder: Path,
        accuracy: Callable[[Config, float], float | Sequence[float]],
        noise: float = 0.01,
        **keys: Any,
    ):
        self.config = tiny_config(folder, **keys)
        self.accuracy, self.noise, self.folder = accuracy, noise, folder
        self.tried: list[Config] = []

    @property
    def context(self) -> StudyContext:
        return StudyContext(self.config, self, lambda line: None)

    def configured(self, point: Point) -> Config:
        return with_overrides(self.config, point.overrides)

    def shared(self, overrides: Mapping[str, Any]) -> Path:
        """A run folder with scores of criterion loss, low is useful."""
        if not (self.folder / "scores.parquet").exists():
            run, schema = (
                RunDir(self.folder),
                pa.schema(
                    [("sample_id", pa.string()), ("label", pa.int32()), ("loss", pa.float32()), ("score", pa.float32())]
                ),
            )
            run.create()
            with RowGroupWriter(run / "scores.parquet", schema, score_table.KEY, 8) as out:
                out.append(pa.table({"sample_id": ["a"], "label": [0], "loss": [1.0], "score": [1.0]}, schema))
                out.facts = {"useful": {"loss": "low"}}
            run.complete("score", StageInputs({}, {}), [run / "scores.parquet"], 0.0)
        return self.folder

    def run(self, points: Sequence[Point]) -> list[Outcome]:
        return [self._outcome(point) for point in points]

    def _outcome(self, point: Point) -> Outcome:
        config = self.configured(point)
        self.tried.append(config)
        each = min(EACH, max(config.min_per_class, int(config.select.rate * EACH + 0.5)))
        result = self.accuracy(config, each / EACH)
        per_class = [result] * CLASSES if isinstance(result, float | int) else list(result)
        shift = self.noise * (-1, 0, 1)[point.seed % 3]
        rows = [
            {"set": "distilled", "network": "convnet", "seed": seed, "top1": sum(per_class) / CLASSES + shift,
             "top5": 1.0, "per_class": [value + shift for value in per_class], "seconds": 0.1}
            for seed in range(config.evaluate.seeds)
        ]  # fmt: skip
        return Outcome(point, rows, each * CLASSES, EACH * CLASSES, [each] * CLASSES, {"distill": 1.0}, self.folder)
