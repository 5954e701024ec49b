"""Monte Carlo subsets on Ray: every unit of some subsets is a task of one core, as many at a time as the cluster holds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import ray
import torch

from distill_at_scale.cluster.actor_pool import actor_count, device, waited_for
from distill_at_scale.cluster.session import pack
from distill_at_scale.cluster.worker_run_dir import WorkerRunDir
from distill_at_scale.config.load import Config
from distill_at_scale.core.events import Emit, Event, discard, measured
from distill_at_scale.pipeline.executors.base import Advance
from distill_at_scale.pipeline.executors.tasks import subset_trials, waiting_units
from distill_at_scale.pruning.scoring.monte_carlo import SubsetRange, SubsetTrials, subset_part_path

AHEAD = 2  # units that are sent for every one that runs, so that no core waits


def run(config: Config, prepared: Path, pieces: Path, advance: Advance, emit: Emit = discard) -> None:
    """All units that are not there yet; one whose process is lost is run again, `cluster.max_failures` times at most."""
    gpus = config.cluster.gpus_per_worker
    options = {"num_cpus": 1, "num_gpus": gpus or None, "max_retries": config.cluster.max_failures}
    task, settings = _subsets.options(**options), ray.put(pack(config))
    waiting: Iterator[SubsetRange] = iter(waiting_units(config, pieces, advance))
    running: list[Any] = []
    with waited_for("monte_carlo", config):
        while True:
            free = AHEAD * actor_count(config, gpus) - len(running)  # of the cluster as it is now
            running += [
                task.remote(settings, str(prepared), str(pieces), unit) for unit in islice(waiting, max(0, free))
            ]
            if not running:
                return
            finished, running = ray.wait(running)
            for event in ray.get(finished):
                emit(event)
                advance(event.values["subsets"])


@ray.remote
def _subsets(packed: dict[str, Any], prepared: str, pieces: str, unit: SubsetRange) -> Event:
    torch.set_num_threads(1)
    space, events = WorkerRunDir(packed), list[Event]()
    space.need("ingest")
    with measured("subsets", events.append) as counts:
        counts["subsets"] = unit[1]
        _trials(space.config.model_dump_json(), str(space(prepared))).publish(unit, space(pieces))
    space.keep(subset_part_path(space(pieces), unit))
    return events[0]


@lru_cache(maxsize=1)
def _trials(config: str, prepared: str) -> SubsetTrials:
    """Kept between the tasks of a process, so that the training split is read once."""
    settings = Config.model_validate_json(config)
    return subset_trials(settings, Path(prepared), device(settings))
