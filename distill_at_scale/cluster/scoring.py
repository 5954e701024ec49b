"""Scoring on Ray: proxy trials as parallel tasks, then one Ray Data pass in which an actor pool scores with all
checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch

from distill_at_scale.cluster.pool import cores, cores_each, device, reporting, stream
from distill_at_scale.cluster.session import pack, plain_errors, unpack
from distill_at_scale.config import Config
from distill_at_scale.data.shards import Chunk
from distill_at_scale.execution import Advance, run_trial, score_piece
from distill_at_scale.scoring.proxy import checkpoint_path
from distill_at_scale.scoring.scorer import Scorer

POLL = 0.5  # seconds between two looks at the finished epochs


def train(config: Config, prepared: Path, checkpoints: Path, advance: Advance) -> None:
    """All trials, as many at a time as the cluster holds."""
    cpus = cores_each(min(config.score.trials, max(cores(), 1)))
    options = {
        "num_cpus": cpus,
        "num_gpus": config.cluster.gpus_per_worker or None,
        "max_retries": config.cluster.max_failures,
    }
    task = _trial.options(**options)
    last = config.score.epochs - 1
    todo = [t for t in range(config.score.trials) if not checkpoint_path(checkpoints, t, last).exists()]
    running = [task.remote(pack(config), str(prepared), str(checkpoints), t, cpus) for t in todo]
    done = _finished_epochs(config, checkpoints)
    advance(done)
    with plain_errors():
        while running:
            finished, running = ray.wait(running, timeout=POLL)
            ray.get(finished)
            epochs = _finished_epochs(config, checkpoints)
            advance(epochs - done)
            done = epochs


@ray.remote
def _trial(packed: dict[str, Any], prepared: str, checkpoints: str, trial: int, threads: int) -> None:
    settings = unpack(packed)
    torch.set_num_threads(threads)
    run_trial(settings, Path(prepared), Path(checkpoints), trial, device(settings), lambda epochs: None)


def _finished_epochs(config: Config, checkpoints: Path) -> int:
    score = config.score
    return sum(checkpoint_path(checkpoints, t, e).exists() for t in range(score.trials) for e in range(score.epochs))


def score(
    config: Config, prepared: Path, checkpoints: Path, chunks: Sequence[Chunk], pieces: Path, advance: Advance
) -> None:
    """Score every chunk that has no piece yet."""
    units = []
    for chunk in chunks:
        path = score_piece(pieces, chunk)
        if path.exists():
            advance(chunk.rows)
        else:
            units.append(pa.table({key: [value] for key, value in {**asdict(chunk), "path": str(path)}.items()}))
    arguments = {"packed": pack(config), "prepared": str(prepared), "checkpoints": str(checkpoints)}
    for result in stream(units, ScoringActor, arguments, config, config.cluster.gpus_per_worker) if units else ():
        advance(result["rows"])


class ScoringActor:
    """An actor: every checkpoint of every trial, on one core or GPU, loaded on the first call."""

    def __init__(self, packed: dict[str, Any], prepared: str, checkpoints: str):
        self.packed, self.prepared, self.checkpoints = packed, Path(prepared), Path(checkpoints)

    @cached_property
    def scorer(self) -> Scorer:
        settings = unpack(self.packed)
        torch.set_num_threads(1)
        return Scorer(settings, self.prepared, self.checkpoints, device(settings))

    @reporting
    def __call__(self, unit: pa.Table) -> pa.Table:
        row = unit.to_pylist()[0]
        target = Path(row.pop("path"))
        return pa.table({"rows": [self.scorer.score_chunk(Chunk(**row), target)]})
