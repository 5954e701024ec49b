"""How the work of a stage is carried out: the contract of an executor, and the one that uses this process alone.

`Local` never imports Ray. `cluster/executor.py` has the other one, which runs the very same functions on a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from distill_at_scale.config.load import Config
from distill_at_scale.core.events import Emit
from distill_at_scale.data.prepared.format import Chunk
from distill_at_scale.distillation.engine import DistillPaths
from distill_at_scale.distillation.evaluate import EvaluationJob
from distill_at_scale.pipeline.monitoring.observers import Observer

Advance = Callable[[int], None]  # called with the number of units that were finished
Report = Callable[[dict[str, Any]], None]
Chunks = Sequence[tuple[str, int, pa.Table]]  # split, index and rows of a listing


class Executor(Protocol):
    emit: Emit  # is told of every finished piece of work, wait and loss

    def observers(self, config: Config) -> list[Observer]:
        """Who else is to watch a run that works here."""

    def ingest(self, config: Config, chunks: Chunks, pieces: Path, advance: Advance, check: bool = False) -> int:
        """Decode chunks of a listing into pieces; returns how many samples were rejected. Advances by samples.

        With `check` only the lists of rejected samples are kept.
        """

    def train_proxies(self, config: Config, prepared: Path, checkpoints: Path, advance: Advance) -> None:
        """Train every trial. Advances by epochs."""

    def score(
        self, config: Config, prepared: Path, checkpoints: Path, chunks: Sequence[Chunk], pieces: Path, advance: Advance
    ) -> None:
        """Score chunks of the prepared data into pieces. Advances by samples."""

    def monte_carlo(self, config: Config, prepared: Path, pieces: Path, advance: Advance) -> None:
        """Run the random subsets of score.monte_carlo into pieces. Advances by subsets."""

    def make_networks(self, config: Config, places: DistillPaths, names: Sequence[str], advance: Advance) -> None:
        """Make the experts or the teacher that a method needs, side by side. Advances by networks."""

    def rank_patches(self, config: Config, places: DistillPaths, chunks: Sequence[Chunk], advance: Advance) -> None:
        """Rank crops of the kept samples of chunks by the teacher's loss, into pieces. Advances by samples."""

    def distill(self, config: Config, places: DistillPaths, report: Report) -> None:
        """Run the distillation and leave the set in `places.work / "synthetic"`. Reports log lines."""

    def evaluate(
        self, config: Config, jobs: Sequence[EvaluationJob], folders: tuple[Path, Path, Path], done: Report
    ) -> None:
        """Run jobs on (prepared, synthetic, manifest) and report each row."""

    def close(self) -> None:
        """Give back what the executor holds."""
