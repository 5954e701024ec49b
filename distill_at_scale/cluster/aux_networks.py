"""The networks that a method needs before its first step (experts, a teacher) on Ray: each is a task of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
import torch

from distill_at_scale.cluster.actor_pool import ANYWHERE, cores, cores_each, device, waited_for
from distill_at_scale.cluster.session import pack
from distill_at_scale.cluster.worker_run_dir import WorkerRunDir
from distill_at_scale.config.load import Config
from distill_at_scale.core.events import Emit, Event, discard, measured
from distill_at_scale.distillation.engine import DistillPaths, make_network, method_class
from distill_at_scale.pipeline.executors.base import Advance


def run(
    config: Config, places: DistillPaths, names: Sequence[str], advance: Advance, sharing: int = 1, emit: Emit = discard
) -> None:
    """All of them, as many at a time as the cluster holds; one that is lost is made again.

    Cores follow from all that the method needs, not from what is missing: on other threads weights differ in the last bits.
    """
    cpus = cores_each(min(len(method_class(config).networks(config)) * sharing, cores()))
    options = {
        "num_cpus": cpus,
        "num_gpus": config.cluster.gpus_per_worker or None,
        "max_retries": config.cluster.max_failures,
        "scheduling_strategy": ANYWHERE,
    }
    task = _make.options(**options)
    settings, paths = ray.put(pack(config)), [str(path) for path in places.as_tuple()]
    running = [task.remote(settings, paths, name, cpus) for name in names]
    with waited_for("training of networks", config):
        while running:
            finished, running = ray.wait(running)
            for event in ray.get(finished):
                emit(event)
            advance(len(finished))


@ray.remote
def _make(packed: dict[str, Any], paths: list[str], name: str, threads: int) -> Event:
    space, events = WorkerRunDir(packed), list[Event]()
    torch.set_num_threads(threads)
    places = DistillPaths(*map(space, paths))
    made = places.networks / name
    own = made, made.with_suffix(".partial"), made.with_name(f"{name}.partial")  # and what it goes on from
    space.need("ingest", "select")
    space.renew(*own)
    with space.keeping(*own), measured(f"make {name}", events.append):
        make_network(space.config, places, name, device(space.config))
    return events[0]
