"""Long units of work on Ray: one task each, as many at a time as the cluster holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
import torch

from distill_at_scale.cluster.actor_pool import LOST, cores, cores_each, load, lost_too_often, run_units
from distill_at_scale.cluster.session import pack, plain_errors
from distill_at_scale.cluster.worker_run_dir import WorkerRunDir
from distill_at_scale.core.errors import WorkersLost
from distill_at_scale.core.events import Emit, Event, TimeSpent, measured
from distill_at_scale.pipeline.executors.base import Poll, Result, Task, Unit, Worker

ANYWHERE = "DEFAULT"  # scheduling strategy: not within the placement group of a sweep's trial
POLL = 0.5  # seconds


def run(task: Task, done: Callable[[Result], None], poll: Poll, sharing: int, emit: Emit) -> None:
    """Run all units. Ray repeats a unit whose process is lost, at most `cluster.max_failures` times.

    The cores of a unit depend on the number of all units of the task, not of those that are left, because the number of
    threads changes the last bits of a network's weights. Raises WorkersLost after more losses, and the error of a unit.
    """
    cpus = cores_each(min(task.total * sharing, cores()))
    retries, gpus = task.config.cluster.max_failures, task.gpus or None
    remote = _run.options(num_cpus=cpus, num_gpus=gpus, max_retries=retries, scheduling_strategy=ANYWHERE)
    settings, paths = ray.put(pack(task.config)), {name: str(path) for name, path in task.paths.items()}
    running = [remote.remote(settings, task.worker, paths, unit, cpus) for unit in task.units]
    try:
        with plain_errors():
            while running:
                finished, running = ray.wait(running, timeout=POLL)
                for result, event in ray.get(finished):
                    emit(event)
                    done(result)
                poll()
    except LOST as error:
        raise WorkersLost(lost_too_often(task.worker.name, task.config, error)) from None


@ray.remote
def _run(
    packed: dict[str, Any], kind: type[Worker], paths: dict[str, str], unit: Unit, threads: int
) -> tuple[Result, Event]:
    torch.set_num_threads(threads)
    space, events = WorkerRunDir(packed), list[Event]()
    with measured(kind.event, events.append) as counts:
        worker = _loaded(space, kind, paths)
        (result,) = run_units(space, worker, [unit])
        counts |= worker.counts(result)
    return result, events[0]


_workers: dict[tuple[Any, ...], Worker] = {}  # at most one: tasks of a process share it, so data are read once


def _loaded(space: WorkerRunDir, kind: type[Worker], paths: dict[str, str]) -> Worker:
    key = (kind, space.config.model_dump_json(), *paths.items())
    if key not in _workers:
        _workers.clear()
        _workers[key] = load(space, kind, paths, TimeSpent())
    return _workers[key]
