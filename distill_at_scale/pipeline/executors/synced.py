"""An executor whose workers may be on other machines, for a run folder on object storage.

Before the work, what the driver published is stored; meanwhile and afterwards, what the workers left is fetched, so that the
driver finds it where it looks. What workers fetch and store is in `cluster/worker_run_dir.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from distill_at_scale.config.load import Config
from distill_at_scale.data.prepared.format import Chunk
from distill_at_scale.distillation.engine import DistillPaths
from distill_at_scale.distillation.evaluate import EvaluationJob
from distill_at_scale.pipeline.executors.base import Advance, Chunks, Executor, Report
from distill_at_scale.pipeline.monitoring.observers import Observer
from distill_at_scale.storage.working_copy import WorkingCopy


class SyncedExecutor:
    """Wraps an executor; all methods are those of its contract."""

    def __init__(self, executor: Executor, copy: WorkingCopy):
        self.executor, self.copy = executor, copy
        self.emit = executor.emit

    def observers(self, config: Config) -> list[Observer]:
        return self.executor.observers(config)

    def ingest(self, config: Config, chunks: Chunks, pieces: Path, advance: Advance, check: bool = False) -> int:
        with self._exchanged(pieces):
            return self.executor.ingest(config, chunks, pieces, advance, check)

    def train_proxies(self, config: Config, prepared: Path, checkpoints: Path, advance: Advance) -> None:
        with self._exchanged(checkpoints):
            self.executor.train_proxies(config, prepared, checkpoints, advance)

    def score(
        self, config: Config, prepared: Path, checkpoints: Path, chunks: Sequence[Chunk], pieces: Path, advance: Advance
    ) -> None:
        with self._exchanged(pieces):
            self.executor.score(config, prepared, checkpoints, chunks, pieces, advance)

    def monte_carlo(self, config: Config, prepared: Path, pieces: Path, advance: Advance) -> None:
        with self._exchanged(pieces):
            self.executor.monte_carlo(config, prepared, pieces, advance)

    def make_networks(self, config: Config, places: DistillPaths, names: Sequence[str], advance: Advance) -> None:
        with self._exchanged(places.networks):
            self.executor.make_networks(config, places, names, advance)

    def rank_patches(self, config: Config, places: DistillPaths, chunks: Sequence[Chunk], advance: Advance) -> None:
        with self._exchanged(places.networks):
            self.executor.rank_patches(config, places, chunks, advance)

    def distill(self, config: Config, places: DistillPaths, report: Report) -> None:
        with self._exchanged(places.log, places.state, places.work / "synthetic"):  # workers here go on from the state
            self.executor.distill(config, places, report)

    def evaluate(
        self, config: Config, jobs: Sequence[EvaluationJob], folders: tuple[Path, Path, Path], done: Report
    ) -> None:
        self.executor.evaluate(config, jobs, folders, done)

    def close(self) -> None:
        self.executor.close()

    def _exchanged(self, *paths: Path) -> AbstractContextManager[None]:
        return self.copy.exchanged(*(path.relative_to(self.copy.path).as_posix() for path in paths))
