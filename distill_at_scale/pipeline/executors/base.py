"""How the work of a stage is carried out: the contract of an executor, and the one that uses this process alone.

`Local` never imports Ray. `cluster/executor.py` has the other one, which runs the very same functions on a cluster.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch

from distill_at_scale.config.load import Config
from distill_at_scale.core.collectives import workers_here
from distill_at_scale.core.events import Event, Note, Spent, ignore, measured
from distill_at_scale.data.ingest.chunks import (
    check_chunk,
    finished,
    ingest_chunk,
    is_finished,
    piece_path,
    recipe_of,
)
from distill_at_scale.data.ingest.plan import open_source
from distill_at_scale.data.prepared.dataset import Prepared
from distill_at_scale.data.prepared.format import Chunk
from distill_at_scale.distillation.dc_subset import distiller
from distill_at_scale.distillation.engine import Distillation, Places, make_network
from distill_at_scale.distillation.evaluate import Evaluator, Job
from distill_at_scale.distillation.methods.shared import patch_ranking
from distill_at_scale.pipeline.monitoring.observers import Observer
from distill_at_scale.pruning.proxies import train as proxy
from distill_at_scale.pruning.scoring import monte_carlo
from distill_at_scale.pruning.scoring.scorer import Scorer

Advance = Callable[[int], None]  # called with the number of units that were finished
Report = Callable[[dict[str, Any]], None]
Chunks = Sequence[tuple[str, int, pa.Table]]  # split, index and rows of a listing


class Executor(Protocol):
    note: Note  # is told of every finished piece of work, wait and loss

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

    def make_networks(self, config: Config, places: Places, names: Sequence[str], advance: Advance) -> None:
        """Make the experts or the teacher that a method needs, side by side. Advances by networks."""

    def rank_patches(self, config: Config, places: Places, chunks: Sequence[Chunk], advance: Advance) -> None:
        """Rank crops of the kept samples of chunks by the teacher's loss, into pieces. Advances by samples."""

    def distill(self, config: Config, places: Places, report: Report) -> None:
        """Run the distillation and leave the set in `places.work / "synthetic"`. Reports log lines."""

    def evaluate(self, config: Config, jobs: Sequence[Job], folders: tuple[Path, Path, Path], done: Report) -> None:
        """Run jobs on (prepared, synthetic, manifest) and report each row."""

    def close(self) -> None:
        """Give back what the executor holds."""


class Local:
    """Everything in this process, on a GPU if there is one."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.note: Note = ignore

    def observers(self, config: Config) -> list[Observer]:
        return []

    def ingest(self, config: Config, chunks: Chunks, pieces: Path, advance: Advance, check: bool = False) -> int:
        source, recipe, rejected, spent = open_source(config.data), recipe_of(config), 0, Spent()
        make = check_chunk if check else ingest_chunk
        for split, index, rows in chunks:
            target = piece_path(pieces, split, index)
            if is_finished(target, check):
                used, bad = finished(target, rows, check)
            else:
                with measured("decode", self.note, spent) as counts:
                    used, bad = make(source, recipe, rows, target, spent)
                    counts |= {"samples": used, "rejected": bad}
            rejected += bad
            advance(used + bad)
        return rejected

    def train_proxies(self, config: Config, prepared: Path, checkpoints: Path, advance: Advance) -> None:
        for trial in range(config.score.trials):
            with measured("train a proxy", self.note) as counts:
                counts["trial"] = trial
                run_trial(config, prepared, checkpoints, trial, self.device, advance)

    def score(
        self, config: Config, prepared: Path, checkpoints: Path, chunks: Sequence[Chunk], pieces: Path, advance: Advance
    ) -> None:
        waiting = [chunk for chunk in chunks if not score_piece(pieces, chunk).exists()]
        advance(sum(chunk.rows for chunk in chunks) - sum(chunk.rows for chunk in waiting))
        if not waiting:
            return
        with threads(1):  # as each actor of a cluster does, so that the scores are the same bytes
            spent = Spent()
            scorer = Scorer(config, prepared, checkpoints, self.device, spent)
            self._each(
                "score", scorer.score([(chunk, score_piece(pieces, chunk)) for chunk in waiting]), advance, spent
            )

    def monte_carlo(self, config: Config, prepared: Path, pieces: Path, advance: Advance) -> None:
        waiting = waiting_units(config, pieces, advance)
        if not waiting:
            return
        with threads(1):  # as each task of a cluster does, so that the utilities are the same bytes
            trials = subset_trials(config, prepared, self.device)
            for unit in waiting:
                with measured("subsets", self.note) as counts:
                    counts["subsets"] = unit[1]
                    trials.publish(unit, pieces)
                advance(unit[1])

    def make_networks(self, config: Config, places: Places, names: Sequence[str], advance: Advance) -> None:
        for name in names:
            with measured(f"make {name}", self.note):
                make_network(config, places, name, self.device)
            advance(1)

    def rank_patches(self, config: Config, places: Places, chunks: Sequence[Chunk], advance: Advance) -> None:
        pieces = patch_ranking.pieces_folder(places.networks, config)
        waiting = [chunk for chunk in chunks if not score_piece(pieces, chunk).exists()]
        advance(sum(chunk.rows for chunk in chunks) - sum(chunk.rows for chunk in waiting))
        if not waiting:
            return
        with threads(1):  # as each actor of a cluster does
            ranker = patch_ranking.Ranker(config, places.prepared, places.networks, self.device)
            self._each(
                "rank", ranker.rank([(chunk, score_piece(pieces, chunk)) for chunk in waiting]), advance, Spent()
            )

    def distill(self, config: Config, places: Places, report: Report) -> None:
        run_distillation(config, places, self.device, report)

    def evaluate(self, config: Config, jobs: Sequence[Job], folders: tuple[Path, Path, Path], done: Report) -> None:
        evaluator = Evaluator(config, *folders, self.device)
        for job in jobs:
            with measured("evaluate", self.note) as counts:
                counts |= {"set": job.set, "network": job.network, "networks": 1}
                row = evaluator.run(job)
            done(row)

    def close(self) -> None:
        pass

    def _each(self, name: str, chunks: Iterator[int], advance: Advance, spent: Spent) -> None:
        """Work through chunks, of which each says how many samples it held."""
        began = time.time()
        for samples in chunks:
            self.note(Event("work", name, began, time.time(), values={"samples": samples, **spent.news()}))
            advance(samples)
            began = time.time()


def score_piece(pieces: Path, chunk: Chunk) -> Path:
    return pieces / f"chunk-{chunk.index:06d}.parquet"


def waiting_units(config: Config, pieces: Path, advance: Advance) -> list[monte_carlo.Unit]:
    """The units of random subsets that are still to be run; advances by the subsets of all others."""
    units = monte_carlo.units(config.score.monte_carlo)
    waiting = [unit for unit in units if not monte_carlo.piece(pieces, unit).exists()]
    advance(sum(unit[1] for unit in units) - sum(unit[1] for unit in waiting))
    return waiting


def subset_trials(config: Config, prepared: Path, device: torch.device) -> monte_carlo.Trials:
    """What runs random subsets in a process; DC is handed in where they are distilled."""
    return monte_carlo.Trials(config, prepared, device, distiller(config, Prepared(prepared), device))


def run_trial(
    config: Config, prepared: Path, checkpoints: Path, trial: int, device: torch.device, advance: Advance
) -> None:
    """Train one proxy, together with the other workers of a process group, if there is one."""
    workers = workers_here(device)
    proxy.Trial(Prepared(prepared), config.score, trial, config.run.seed, checkpoints, device, workers).run(advance)


def run_distillation(config: Config, places: Places, device: torch.device, report: Report) -> None:
    """One worker's part of the distillation; rank 0 leaves the result."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        synthetic = Distillation(config, places, workers_here(device), device, report).run()
    if synthetic is not None:
        synthetic.save(places.work / "synthetic")


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
