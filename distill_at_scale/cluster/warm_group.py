"""Runs groups of a fixed number of processes on the actors of a pool, on this machine. It starts no processes of Ray Train.

After a loss all processes of the group restart from the last checkpoint. On other clusters, on GPUs and with an elastic number
of workers, `train_group.py` runs the group on Ray Train.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from typing import Any

import ray
import torch

from distill_at_scale.cluster.actor_pool import LOST, ActorPool, Say, lost_too_often
from distill_at_scale.cluster.session import pack, root_cause
from distill_at_scale.cluster.worker_run_dir import WorkerRunDir
from distill_at_scale.core.collectives import joined
from distill_at_scale.core.errors import UserError, WorkersLost
from distill_at_scale.pipeline.executors.base import Group

POLL = 0.3  # seconds between two polls
ENDING = 10.0  # seconds that the others may take to end after one has failed


def run(group: Group, pool: ActorPool, threads: int, say: Say) -> None:
    """Run `group.workers` processes with `threads` threads each to their end.

    Raises WorkersLost if processes were lost more than `cluster.max_failures` times without progress, and the error of one.
    """
    failures = 0
    while True:
        before = group.saved()
        error = _attempt(group, pool, threads)
        if error is None:
            return
        if isinstance(cause := root_cause(error), UserError | OSError):
            raise cause from None
        failures = 1 if group.saved() > before else failures + 1
        if failures > group.config.cluster.max_failures:
            if isinstance(error, LOST):
                raise WorkersLost(lost_too_often(group.stage, group.config, error)) from None
            raise error
        if group.resumed is not None:
            say(f"  workers were lost; {group.resumed()}")


def _attempt(group: Group, pool: ActorPool, threads: int) -> Exception | None:
    """Run the processes once. Returns the error that ended them, or None.

    If there are several, an error that a user can act on comes first, then a lost process.
    """
    assert isinstance(group.workers, int)
    parts = settings(group) | {"threads": threads}
    errors: dict[int, Exception] = {}
    with tempfile.TemporaryDirectory(prefix="distill_at_scale-") as folder:
        store, deadline = f"file://{folder}/store", float("inf")
        try:
            actors = pool.ready(group.workers)
        except LOST as error:
            pool.close()
            return error
        size = len(actors)
        running = {a.handle.call.remote(join, parts, store, rank, size): rank for rank, a in enumerate(actors)}
        try:
            while running and time.monotonic() < deadline:
                for answer in ray.wait(list(running), timeout=POLL)[0]:
                    rank = running.pop(answer)
                    try:
                        ray.get(answer)
                    except Exception as error:
                        errors[rank] = error
                        deadline = min(deadline, time.monotonic() + ENDING)
                group.poll()
        finally:
            lost = [rank for rank, error in errors.items() if isinstance(error, LOST)]
            for rank in {*running.values(), *lost}:
                pool.drop(actors[rank])
    # when one process fails, the others fail too, with other errors
    own = [rank for rank, error in errors.items() if isinstance(root_cause(error), UserError | OSError)]
    return errors[min(own or lost or errors)] if errors else None


def settings(group: Group) -> dict[str, Any]:
    """What the processes of a group need, picklable."""
    paths = {name: str(path) for name, path in group.paths.items()}
    names = ("body", "stages", "fetches", "renews", "publishes")
    return {"packed": pack(group.config), "paths": paths, **{name: getattr(group, name) for name in names}}


def join(parts: dict[str, Any], store: str, rank: int, size: int) -> None:
    """One process of the group."""
    torch.set_num_threads(parts["threads"])
    with joined(store, rank, size):
        work(WorkerRunDir(parts["packed"]), parts, rank == 0, torch.device("cpu"))


def work(space: WorkerRunDir, parts: dict[str, Any], first: bool, device: torch.device) -> None:
    """Run the body of a group. Fetches its files first; the `first` process stores what the group publishes."""
    paths = {name: space(path) for name, path in parts["paths"].items()}
    fetches, renews, publishes = ([paths[name] for name in parts[key]] for key in ("fetches", "renews", "publishes"))
    space.need(*parts["stages"])
    space.fetch(*fetches)
    if first and renews:
        space.renew(*renews)
    with space.keeping(*publishes) if first else contextlib.nullcontext():
        parts["body"](space.config, paths, device, lambda line: None)
