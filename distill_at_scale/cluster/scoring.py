"""Scoring on Ray: proxy trials as parallel tasks or on Ray Train, then one Ray Data pass in which an actor pool scores
with all checkpoints; and the ranking of patches, which is a pass of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.train.torch
import torch

from distill_at_scale.cluster import training
from distill_at_scale.cluster.pool import cores, cores_each, device, grouped, reporting, stream, work_of
from distill_at_scale.cluster.session import pack, plain_errors, unpack
from distill_at_scale.config import Config
from distill_at_scale.data.shards import Chunk
from distill_at_scale.distill import Places
from distill_at_scale.execution import Advance, run_trial, score_piece
from distill_at_scale.scoring import patches
from distill_at_scale.scoring.proxy import checkpoint_path
from distill_at_scale.scoring.scorer import Scorer

POLL = 0.5  # seconds between two looks at the finished epochs


def train(config: Config, prepared: Path, checkpoints: Path, advance: Advance) -> None:
    """All trials: side by side as tasks, or one after the other with `score.workers` data-parallel workers each."""
    done = 0

    def look() -> None:
        nonlocal done
        epochs = _finished_epochs(config, checkpoints)
        advance(epochs - done)
        done = epochs

    look()
    trials, epochs = config.score.checkpoints
    todo = [t for t in range(trials) if not checkpoint_path(checkpoints, t, epochs - 1).exists()]
    if todo and config.score.workers > 1:
        places = {"prepared": str(prepared), "checkpoints": str(checkpoints), "trials": todo}
        training.fit("score", _together, config, config.score.workers, places, checkpoints.parent / "train", look)
    elif todo:
        _side_by_side(config, prepared, checkpoints, todo, look)
    look()


def _together(config: Config, arguments: dict[str, Any]) -> None:
    """In one of a group of workers: every trial, its batches shared with the others."""
    for trial in arguments["trials"]:
        folders = Path(arguments["prepared"]), Path(arguments["checkpoints"])
        run_trial(config, *folders, trial, ray.train.torch.get_device(), lambda epochs: None)


def _side_by_side(
    config: Config, prepared: Path, checkpoints: Path, trials: Sequence[int], look: Callable[[], None]
) -> None:
    """As many trials at a time as the cluster holds; cores follow from all of them, so a resumed one ends the same."""
    cpus = cores_each(min(config.score.trials, max(cores(), 1)))
    options = {
        "num_cpus": cpus,
        "num_gpus": config.cluster.gpus_per_worker or None,
        "max_retries": config.cluster.max_failures,
    }
    task = _trial.options(**options)
    running = [task.remote(pack(config), str(prepared), str(checkpoints), t, cpus) for t in trials]
    with plain_errors():
        while running:
            finished, running = ray.wait(running, timeout=POLL)
            ray.get(finished)
            look()


@ray.remote
def _trial(packed: dict[str, Any], prepared: str, checkpoints: str, trial: int, threads: int) -> None:
    settings = unpack(packed)
    torch.set_num_threads(threads)
    run_trial(settings, Path(prepared), Path(checkpoints), trial, device(settings), lambda epochs: None)


def _finished_epochs(config: Config, checkpoints: Path) -> int:
    trials, epochs = config.score.checkpoints
    return sum(checkpoint_path(checkpoints, t, e).exists() for t in range(trials) for e in range(epochs))


def score(
    config: Config, prepared: Path, checkpoints: Path, chunks: Sequence[Chunk], pieces: Path, advance: Advance
) -> None:
    """Score every chunk that has no piece yet; an actor gets several chunks at a time and reads ahead within them."""
    waiting: list[dict[str, Any]] = []
    for chunk in chunks:
        path = score_piece(pieces, chunk)
        if path.exists():
            advance(chunk.rows)
        else:
            waiting.append({**asdict(chunk), "path": str(path)})
    gpus = config.cluster.gpus_per_worker
    arguments = {"packed": pack(config), "prepared": str(prepared), "checkpoints": str(checkpoints)}
    for result in stream(grouped(waiting, config, gpus), ScoringActor, arguments, config, gpus) if waiting else ():
        advance(result["rows"])


class ScoringActor:
    """An actor: every checkpoint of every trial, on one core or a GPU (or a share of one), loaded on the first call."""

    def __init__(self, packed: dict[str, Any], prepared: str, checkpoints: str):
        self.packed, self.prepared, self.checkpoints = packed, Path(prepared), Path(checkpoints)

    @cached_property
    def scorer(self) -> Scorer:
        settings = unpack(self.packed)
        torch.set_num_threads(1)
        return Scorer(settings, self.prepared, self.checkpoints, device(settings))

    @reporting
    def __call__(self, unit: pa.Table) -> pa.Table:
        work = work_of(unit)
        targets = [Path(item.pop("path")) for item in work]
        return pa.table({"rows": [sum(self.scorer.score(list(zip(map(_chunk, work), targets, strict=True))))]})


def rank_patches(config: Config, places: Places, chunks: Sequence[Chunk], advance: Advance) -> None:
    """Rank the patches of every chunk that has no piece yet, as `score` does its work."""
    waiting: list[dict[str, Any]] = []
    for chunk in chunks:
        path = score_piece(patches.pieces_folder(places.networks, config), chunk)
        if path.exists():
            advance(chunk.rows)
        else:
            waiting.append({**asdict(chunk), "path": str(path)})
    gpus = config.cluster.gpus_per_worker
    arguments = {"packed": pack(config), "prepared": str(places.prepared), "networks": str(places.networks)}
    for result in stream(grouped(waiting, config, gpus), RankingActor, arguments, config, gpus) if waiting else ():
        advance(result["rows"])


class RankingActor:
    """An actor with the teacher, loaded on the first call; the same resources as a scoring one."""

    def __init__(self, packed: dict[str, Any], prepared: str, networks: str):
        self.packed, self.prepared, self.networks = packed, Path(prepared), Path(networks)

    @cached_property
    def ranker(self) -> patches.Ranker:
        settings = unpack(self.packed)
        torch.set_num_threads(1)
        return patches.Ranker(settings, self.prepared, self.networks, device(settings))

    @reporting
    def __call__(self, unit: pa.Table) -> pa.Table:
        work = work_of(unit)
        targets = [Path(item.pop("path")) for item in work]
        return pa.table({"rows": [sum(self.ranker.rank(list(zip(map(_chunk, work), targets, strict=True))))]})


def _chunk(fields: dict[str, Any]) -> Chunk:
    return Chunk(**fields)
