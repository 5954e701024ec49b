"""Distillation on Ray Train: workers that each own some classes, restarted together from the last checkpoint if one is
lost.
"""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from distill_at_scale.cluster.pool import cores, cores_each
from distill_at_scale.cluster.session import pack, plain_errors, unpack
from distill_at_scale.config import Config
from distill_at_scale.distill import Places
from distill_at_scale.errors import DistillationDiverged, UserError
from distill_at_scale.execution import Report, run_distillation

DIVERGED, REFUSED = "diverged.txt", "refused.txt"  # notes of the workers to the driver
POLL = 0.3  # seconds between two looks at the log


def run(config: Config, places: Places, report: Report) -> None:
    """Distil with `distill.workers` workers.

    Raises UserError where they cannot be placed, and DistillationDiverged where the loss was not finite on one of them.
    """
    workers, gpus = config.distill.workers, config.cluster.gpus_per_worker
    _check_room(workers, gpus)
    cpus = cores_each(workers)
    for note in (DIVERGED, REFUSED):
        (places.work / note).unlink(missing_ok=True)
    resources = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"packed": pack(config), "cpus": cpus, "places": [str(p) for p in _paths(places)]},
        torch_config=TorchConfig(backend="nccl" if gpus >= 1 else "gloo"),  # NCCL refuses two workers on one GPU
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus > 0, resources_per_worker=resources),
        run_config=RunConfig(
            name="distill",
            storage_path=str(places.work / "ray"),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
        ),
    )
    try:
        with plain_errors():
            _fit(trainer, _Tail(places.log, report))
    except Exception:
        if not (places.work / REFUSED).exists():
            raise
    if (places.work / DIVERGED).exists():
        raise DistillationDiverged((places.work / DIVERGED).read_text())
    if (places.work / REFUSED).exists():
        raise UserError((places.work / REFUSED).read_text())


def _worker(loop: dict[str, Any]) -> None:
    """One worker.

    A divergence, which all workers agree on, is noted and ends the run. What a user must mend is noted and ends it when Ray
    starts the workers again; any other exception is a failure, after which they resume.
    """
    torch.set_num_threads(loop["cpus"])
    places = Places(*map(Path, loop["places"]))
    if (places.work / REFUSED).exists():
        return
    try:
        run_distillation(unpack(loop["packed"]), places, ray.train.torch.get_device(), lambda line: None)
    except DistillationDiverged as error:
        if ray.train.get_context().get_world_rank() == 0:
            (places.work / DIVERGED).write_text(str(error))
    except UserError as error:
        (places.work / REFUSED).write_text(str(error))
        raise


def _check_room(workers: int, gpus: float) -> None:
    have = ray.cluster_resources()
    if workers > cores():
        raise UserError(
            f"distill.workers = {workers} needs as many cores, the cluster has {cores()}; lower distill.workers"
        )
    if workers * gpus > have.get("GPU", 0):
        raise UserError(
            f"{workers} workers with cluster.gpus_per_worker = {gpus:g} do not fit on {have.get('GPU', 0):g} GPUs"
        )


def _paths(places: Places) -> tuple[Path, ...]:
    return places.prepared, places.manifest, places.work, places.log


def _fit(trainer: TorchTrainer, tail: _Tail) -> None:
    """trainer.fit() in a thread, while this one follows the log.

    In the main thread Ray Train would take over Ctrl-C for good and end the process with status 0.
    """
    problem: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            problem.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL)
        tail.read()
    if problem:
        raise problem[0]


class _Tail:
    """Reports lines that rank 0 appends to the log."""

    def __init__(self, path: Path, report: Report):
        self.path, self.report = path, report
        self.position = path.stat().st_size if path.exists() else 0

    def read(self) -> None:
        if not self.path.exists():
            return
        if self.path.stat().st_size < self.position:
            self.position = 0  # rank 0 dropped the lines of steps that are done again
        with open(self.path, "rb") as log:
            log.seek(self.position)
            for line in log:
                if not line.endswith(b"\n"):
                    break
                self.position += len(line)
                with contextlib.suppress(ValueError):  # a line may be cut where the log was replaced meanwhile
                    self.report(json.loads(line))
