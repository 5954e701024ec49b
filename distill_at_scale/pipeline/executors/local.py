"""The executor that runs all work in this process, on a GPU if there is one. It never imports Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from distill_at_scale.config.load import Config
from distill_at_scale.core.events import Emit, Event, TimeSpent, discard, measured
from distill_at_scale.data.ingest.chunks import (
    check_chunk,
    finished,
    ingest_chunk,
    is_finished,
    piece_path,
    recipe_of,
)
from distill_at_scale.data.ingest.plan import open_source
from distill_at_scale.data.prepared.format import Chunk
from distill_at_scale.distillation.engine import DistillPaths, make_network
from distill_at_scale.distillation.evaluate import EvaluationJob, Evaluator
from distill_at_scale.distillation.methods.shared import patch_ranking
from distill_at_scale.pipeline.executors.base import Advance, Chunks, Report
from distill_at_scale.pipeline.executors.tasks import run_distillation, run_trial, subset_trials, threads, waiting_units
from distill_at_scale.pipeline.monitoring.observers import Observer
from distill_at_scale.pruning.scoring.scorer import Scorer, score_part_path


class LocalExecutor:
    """Everything in this process, on a GPU if there is one."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.emit: Emit = discard

    def observers(self, config: Config) -> list[Observer]:
        return []

    def ingest(self, config: Config, chunks: Chunks, pieces: Path, advance: Advance, check: bool = False) -> int:
        source, recipe, rejected, spent = open_source(config.data), recipe_of(config), 0, TimeSpent()
        make = check_chunk if check else ingest_chunk
        for split, index, rows in chunks:
            target = piece_path(pieces, split, index)
            if is_finished(target, check):
                used, bad = finished(target, rows, check)
            else:
                with measured("decode", self.emit, spent) as counts:
                    used, bad = make(source, recipe, rows, target, spent)
                    counts |= {"samples": used, "rejected": bad}
            rejected += bad
            advance(used + bad)
        return rejected

    def train_proxies(self, config: Config, prepared: Path, checkpoints: Path, advance: Advance) -> None:
        for trial in range(config.score.trials):
            with measured("train a proxy", self.emit) as counts:
                counts["trial"] = trial
                run_trial(config, prepared, checkpoints, trial, self.device, advance)

    def score(
        self, config: Config, prepared: Path, checkpoints: Path, chunks: Sequence[Chunk], pieces: Path, advance: Advance
    ) -> None:
        waiting = [chunk for chunk in chunks if not score_part_path(pieces, chunk).exists()]
        advance(sum(chunk.rows for chunk in chunks) - sum(chunk.rows for chunk in waiting))
        if not waiting:
            return
        with threads(1):  # as each actor of a cluster does, so that the scores are the same bytes
            spent = TimeSpent()
            scorer = Scorer(config, prepared, checkpoints, self.device, spent)
            self._each(
                "score", scorer.score([(chunk, score_part_path(pieces, chunk)) for chunk in waiting]), advance, spent
            )

    def monte_carlo(self, config: Config, prepared: Path, pieces: Path, advance: Advance) -> None:
        waiting = waiting_units(config, pieces, advance)
        if not waiting:
            return
        with threads(1):  # as each task of a cluster does, so that the utilities are the same bytes
            trials = subset_trials(config, prepared, self.device)
            for unit in waiting:
                with measured("subsets", self.emit) as counts:
                    counts["subsets"] = unit[1]
                    trials.publish(unit, pieces)
                advance(unit[1])

    def make_networks(self, config: Config, places: DistillPaths, names: Sequence[str], advance: Advance) -> None:
        for name in names:
            with measured(f"make {name}", self.emit):
                make_network(config, places, name, self.device)
            advance(1)

    def rank_patches(self, config: Config, places: DistillPaths, chunks: Sequence[Chunk], advance: Advance) -> None:
        pieces = patch_ranking.parts_folder(places.networks, config)
        waiting = [chunk for chunk in chunks if not score_part_path(pieces, chunk).exists()]
        advance(sum(chunk.rows for chunk in chunks) - sum(chunk.rows for chunk in waiting))
        if not waiting:
            return
        with threads(1):  # as each actor of a cluster does
            ranker = patch_ranking.PatchRanker(config, places.prepared, places.networks, self.device)
            self._each(
                "rank",
                ranker.rank([(chunk, score_part_path(pieces, chunk)) for chunk in waiting]),
                advance,
                TimeSpent(),
            )

    def distill(self, config: Config, places: DistillPaths, report: Report) -> None:
        run_distillation(config, places, self.device, report)

    def evaluate(
        self, config: Config, jobs: Sequence[EvaluationJob], folders: tuple[Path, Path, Path], done: Report
    ) -> None:
        evaluator = Evaluator(config, *folders, self.device)
        for job in jobs:
            with measured("evaluate", self.emit) as counts:
                counts |= {"set": job.set, "network": job.network, "networks": 1}
                row = evaluator.run(job)
            done(row)

    def close(self) -> None:
        pass

    def _each(self, name: str, chunks: Iterator[int], advance: Advance, spent: TimeSpent) -> None:
        """Work through chunks, of which each says how many samples it held."""
        began = time.time()
        for samples in chunks:
            self.emit(Event("work", name, began, time.time(), values={"samples": samples, **spent.delta()}))
            advance(samples)
            began = time.time()
