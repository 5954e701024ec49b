"""Evaluation on Ray: every (set, network, seed) is a task of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import ray
import torch

from distill_at_scale.cluster.actor_pool import ANYWHERE, cores, cores_each, device, waited_for
from distill_at_scale.cluster.session import pack
from distill_at_scale.cluster.worker_run_dir import WorkerRunDir
from distill_at_scale.config.load import Config
from distill_at_scale.core.events import Emit, Event, discard, measured
from distill_at_scale.distillation.evaluate import EvaluationJob, Evaluator
from distill_at_scale.distillation.evaluate import jobs as every_job
from distill_at_scale.pipeline.executors.base import Report


def run(
    config: Config,
    jobs: Sequence[EvaluationJob],
    folders: tuple[Path, Path, Path],
    done: Report,
    sharing: int = 1,
    emit: Emit = discard,
) -> None:
    """Some jobs, as many at a time as the cluster holds; reports each row when it is there.

    Cores follow from all jobs of the evaluation, not from what is left: on other threads accuracies differ.
    """
    cpus = cores_each(min(len(every_job(config)) * sharing, cores()))
    options = {
        "num_cpus": cpus,
        "num_gpus": config.cluster.gpus_per_worker or None,
        "max_retries": config.cluster.max_failures,
        "scheduling_strategy": ANYWHERE,
    }
    task = _evaluate.options(**options)
    settings = ray.put(pack(config))
    running = [task.remote(settings, tuple(map(str, folders)), asdict(job), cpus) for job in jobs]
    with waited_for("evaluate", config):
        while running:
            finished, running = ray.wait(running)
            for row, event in ray.get(finished):
                emit(event)
                done(row)


@ray.remote
def _evaluate(
    packed: dict[str, Any], folders: tuple[str, ...], job: dict[str, Any], threads: int
) -> tuple[dict[str, Any], Event]:
    torch.set_num_threads(threads)
    space, events = WorkerRunDir(packed), list[Event]()
    space.need("ingest", "select", "distill")
    with measured("evaluate", events.append) as counts:
        counts |= {"set": job["set"], "network": job["network"], "networks": 1}
        row = _evaluator(_Settings(space.config), tuple(str(space(folder)) for folder in folders)).run(
            EvaluationJob(**job)
        )
    return row, events[0]


class _Settings:
    """A configuration that can be the key of a cache."""

    def __init__(self, config: Config):
        self.config = config

    def __hash__(self) -> int:
        return hash(self.config.model_dump_json())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Settings) and self.config == other.config


@lru_cache(maxsize=1)
def _evaluator(settings: _Settings, folders: tuple[str, ...]) -> Evaluator:
    """Kept between the tasks of a process, so that the test split is read once."""
    prepared, synthetic, manifest = map(Path, folders)
    return Evaluator(settings.config, prepared, synthetic, manifest, device(settings.config))
