"""Scoring on Ray: proxy trials as parallel tasks or on Ray Train, then one Ray Data pass in which an actor pool scores
with all checkpoints; and the ranking of patches, which is a pass of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.train.torch
import torch

from distill_at_scale.cluster import train_group
from distill_at_scale.cluster.actor_pool import (
    Tell,
    cores,
    cores_each,
    device,
    grouped,
    reporting,
    stream,
    waited_for,
    work_of,
)
from distill_at_scale.cluster.session import pack
from distill_at_scale.cluster.worker_run_dir import WorkerRunDir
from distill_at_scale.config.load import Config
from distill_at_scale.core.events import Emit, Event, TimeSpent, measured
from distill_at_scale.data.prepared.format import Chunk
from distill_at_scale.distillation.engine import DistillPaths
from distill_at_scale.distillation.methods.shared import patch_ranking
from distill_at_scale.pipeline.executors.base import Advance
from distill_at_scale.pipeline.executors.tasks import run_trial
from distill_at_scale.pruning.proxies.train import checkpoint_path, finished_epochs
from distill_at_scale.pruning.scoring.scorer import Scorer, ScoringUnit, score_part_path

Work = Callable[[Sequence[ScoringUnit]], Iterator[int]]
POLL = 0.5  # seconds between two looks at the finished epochs


def train(config: Config, prepared: Path, checkpoints: Path, advance: Advance, tell: Tell = Tell()) -> None:
    """All trials: side by side as tasks, or one after the other with `score.workers` data-parallel workers each."""
    done = 0

    def look() -> None:
        nonlocal done
        epochs = finished_epochs(config.score, checkpoints)
        advance(epochs - done)
        done = epochs

    look()
    trials, epochs = config.score.checkpoint_counts
    todo = [t for t in range(trials) if not checkpoint_path(checkpoints, t, epochs - 1).exists()]
    if todo and config.score.workers > 1:
        places = {"prepared": str(prepared), "checkpoints": str(checkpoints), "trials": todo}
        with measured("train proxies together", tell.emit) as counts:
            counts["workers"] = config.score.workers
            group = config, config.score.workers, places, checkpoints.parent / "train", look
            attempt = partial(train_group.fit, "score", _together, *group)
            train_group.getting_on(attempt, lambda: finished_epochs(config.score, checkpoints), tell.say)
    elif todo:
        _side_by_side(config, prepared, checkpoints, todo, look, tell.emit)
    look()


def _together(space: WorkerRunDir, arguments: dict[str, Any]) -> None:
    """In one of a group of workers: every trial, its batches shared with the others."""
    prepared, checkpoints = space(arguments["prepared"]), space(arguments["checkpoints"])
    space.need("ingest")
    space.fetch(checkpoints)
    first = ray.train.get_context().get_world_rank() == 0  # the one that publishes
    with space.keeping(checkpoints) if first else nullcontext():
        for trial in arguments["trials"]:
            run_trial(space.config, prepared, checkpoints, trial, ray.train.torch.get_device(), lambda epochs: None)


def _side_by_side(
    config: Config, prepared: Path, checkpoints: Path, trials: Sequence[int], look: Callable[[], None], emit: Emit
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
    with waited_for("training of proxies", config):
        while running:
            finished, running = ray.wait(running, timeout=POLL)
            for event in ray.get(finished):
                emit(event)
            look()


@ray.remote
def _trial(packed: dict[str, Any], prepared: str, checkpoints: str, trial: int, threads: int) -> Event:
    space, events = WorkerRunDir(packed), list[Event]()
    torch.set_num_threads(threads)
    folder = space(checkpoints)
    own = checkpoint_path(folder, trial, 0).parent
    space.need("ingest")
    space.fetch(own)
    with space.keeping(own), measured("train a proxy", events.append) as counts:
        counts["trial"] = trial
        run_trial(space.config, space(prepared), folder, trial, device(space.config), lambda epochs: None)
    return events[0]


def score(
    config: Config, chunks: Sequence[Chunk], folders: tuple[Path, Path, Path], advance: Advance, tell: Tell
) -> None:
    """Score every chunk that has no piece yet; the folders are those of the prepared data, the checkpoints and the pieces."""
    prepared, checkpoints, pieces = folders
    arguments = {"prepared": str(prepared), "checkpoints": str(checkpoints)}
    _over_chunks(config, chunks, pieces, ScoringActor, arguments, advance, tell)


def rank_patches(config: Config, places: DistillPaths, chunks: Sequence[Chunk], advance: Advance, tell: Tell) -> None:
    """Rank the patches of every chunk that has no piece yet, by the same kind of actors."""
    arguments = {"prepared": str(places.prepared), "networks": str(places.networks)}
    pieces = patch_ranking.parts_folder(places.networks, config)
    _over_chunks(config, chunks, pieces, RankingActor, arguments, advance, tell)


def _over_chunks(
    config: Config,
    chunks: Sequence[Chunk],
    pieces: Path,
    actor: type[ChunkActor],
    arguments: dict[str, Any],
    advance: Advance,
    tell: Tell,
) -> None:
    """One pass; an actor gets several chunks at a time and reads ahead within them."""
    waiting: list[dict[str, Any]] = []
    for chunk in chunks:
        path = score_part_path(pieces, chunk)
        if path.exists():
            advance(chunk.rows)
        else:
            waiting.append({**asdict(chunk), "path": str(path)})
    gpus, arguments = config.cluster.gpus_per_worker, {"packed": pack(config), **arguments}
    units = grouped(waiting, config, gpus) if waiting else []
    for result in stream(units, actor, arguments, config, gpus, tell) if waiting else ():
        advance(result["samples"])


class ChunkActor:
    """An actor on one core or a GPU (or a share of one); what it works with is loaded on the first call."""

    does = "work"

    def __init__(self, packed: dict[str, Any], **folders: str):
        self.spent = TimeSpent()
        self.space = WorkerRunDir(packed)
        self.folders = {name: self.space(folder) for name, folder in folders.items()}

    def load(self, config: Config, device: torch.device) -> Work:
        """What publishes the piece of each of some chunks and yields the chunk's samples."""
        raise NotImplementedError

    @cached_property
    def work(self) -> Work:
        torch.set_num_threads(1)
        self.space.need("ingest")
        self.space.fetch(*(folder for name, folder in self.folders.items() if name != "prepared"))
        return self.load(self.space.config, device(self.space.config))

    @reporting
    def __call__(self, unit: pa.Table) -> pa.Table:
        work = work_of(unit)
        targets = [self.space(item.pop("path")) for item in work]
        samples = sum(self.work(list(zip(map(_chunk, work), targets, strict=True))))
        self.space.keep(*targets)
        return pa.table({"samples": [samples]})


class ScoringActor(ChunkActor):
    """With every checkpoint of every trial."""

    does = "score"

    def load(self, config: Config, device: torch.device) -> Work:
        return Scorer(config, self.folders["prepared"], self.folders["checkpoints"], device, self.spent).score


class RankingActor(ChunkActor):
    """With the teacher."""

    does = "rank"

    def load(self, config: Config, device: torch.device) -> Work:
        return patch_ranking.PatchRanker(config, self.folders["prepared"], self.folders["networks"], device).rank


def _chunk(fields: dict[str, Any]) -> Chunk:
    return Chunk(**fields)
