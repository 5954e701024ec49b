"""Distillation in a group of workers on Ray Train."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch

from distill_at_scale.cluster import train_group
from distill_at_scale.cluster.worker_run_dir import WorkerRunDir
from distill_at_scale.config.load import Config
from distill_at_scale.distillation.checkpoint import saved_step
from distill_at_scale.distillation.engine import DistillPaths
from distill_at_scale.pipeline.executors.base import Report
from distill_at_scale.pipeline.executors.tasks import run_distillation


def run(config: Config, places: DistillPaths, report: Report, sharing: int, say: Callable[[str], None]) -> None:
    """Distil with `distill.workers` workers, or as many between its two numbers as find room, beside `sharing` - 1 other
    distillations.

    Raises UserError where they cannot be placed, and DistillationDiverged where the loss was not finite on one of them.
    """
    paths = [str(p) for p in places.as_tuple()]
    tail = _Tail(places.log, report)

    def again() -> None:
        step = saved_step(places.state)
        what = "were lost" if isinstance(config.distill.workers, int) else "were lost or have joined"
        say(f"  workers {what}; going on from step {step}, so {max(0, tail.step - step)} steps are repeated")

    def attempt() -> None:
        own = {"places": paths}
        train_group.fit(
            "distill", _distill, config, config.distill.workers, own, places.work, tail.read, sharing, again
        )

    train_group.getting_on(attempt, lambda: saved_step(places.state), say)


def _distill(space: WorkerRunDir, arguments: dict[str, Any]) -> None:
    """One worker's part; the first one keeps checkpoint and log."""
    places = DistillPaths(*map(space, arguments["places"]))
    first = ray.train.get_context().get_world_rank() == 0
    space.need("ingest", "select")
    space.fetch(places.networks)
    if first:
        space.renew(places.log, places.work)
    with space.keeping(places.log, places.work) if first else contextlib.nullcontext():
        run_distillation(space.config, places, ray.train.torch.get_device(), lambda line: None)


class _Tail:
    """Reports lines that rank 0 appends to the log."""

    def __init__(self, path: Path, report: Report):
        self.path, self.report, self.step = path, report, 0
        before = path.read_bytes() if path.exists() else b""
        self.position, self.last = len(before), before[before.rfind(b"\n", 0, -1) + 1 :]

    def read(self) -> None:
        if not self.path.exists():
            return
        with open(self.path, "rb") as log:
            log.seek(self.position - len(self.last))
            if log.read(len(self.last)) != self.last:  # rank 0 dropped the lines of steps that are done again
                self.position = 0
                log.seek(0)
            for line in log:
                if not line.endswith(b"\n"):
                    break
                self.position, self.last = self.position + len(line), line
                with contextlib.suppress(ValueError):  # a line may be cut where the log was replaced meanwhile
                    found = json.loads(line)
                    self.step = max(self.step, found["step"])
                    self.report(found)
