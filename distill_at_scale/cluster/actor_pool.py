"""Runs units of work on actors that stay for the whole command, and counts the actors and cores of a cluster.

Used on a Ray that the command itself starts. One call gives an actor as many units as take about CALL_SECONDS, fewer towards
the end, so that one driver can serve many actors and all actors end together. Callbacks tell the driver which calls have
finished, so that it does not poll every actor.
"""

from __future__ import annotations

import os
import queue
import sys
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions

from distill_at_scale.cluster.session import pack, plain_errors
from distill_at_scale.cluster.worker_run_dir import WorkerRunDir
from distill_at_scale.config.infrastructure import ClusterSection
from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError, WorkersLost
from distill_at_scale.core.events import Emit, Event, TimeSpent, instant, measured
from distill_at_scale.pipeline.executors.base import Poll, Result, Task, Unit, Worker, no_poll

CALLS = 2  # short calls that an actor has at a time, so that it never waits for the driver
CALL_SECONDS, MOST_UNITS = 4.0, 256  # of one call, at most
POLL = 0.5  # seconds between two polls
LOST = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.ObjectLostError,
        ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)  # fmt: skip

if TYPE_CHECKING:
    import torch  # imported where it is used: ingest needs none

Say = Callable[[str], None]
Batch = list[Unit]
Job = tuple[dict[str, Any], type[Worker], dict[str, str], int]  # packed configuration, kind of work, paths, threads


def units_per_call(waiting: int, actors: int, seconds: float | None) -> int:
    """Units of the next call, if `waiting` units are left and one takes `seconds`; None: not known yet."""
    if not seconds:
        return 1
    return max(1, min(MOST_UNITS, waiting // (CALLS * actors), int(CALL_SECONDS / seconds)))


@dataclass(eq=False)
class Actor:
    handle: Any
    ready: bool = False
    job: Any = None  # what it works on
    calls: deque[Batch] = field(default_factory=deque)  # in the order in which it works on them


class ActorPool:
    """Actors with one core and `gpus` GPUs each. They start to work as soon as they are ready, and stay until `close`."""

    def __init__(self, gpus: float = 0.0):
        self.gpus = gpus
        self._actors: dict[Actor, None] = {}
        self._ended: queue.SimpleQueue[tuple[Actor, Batch | None, Future[Any]]] = queue.SimpleQueue()

    def grow(self, count: int) -> None:
        """Start actors until there are `count`."""
        while len(self._actors) < count:
            actor = Actor(self.start())
            self._actors[actor] = None
            self._watch(actor, None, actor.handle.ready.remote())

    def start(self) -> Any:
        """Start one actor. If it is lost, this pool replaces it, not Ray, so that the pool can count the losses."""
        remote: Any = ray.remote(num_cpus=1, num_gpus=self.gpus, max_restarts=0, max_task_retries=0)(PoolActor)
        return remote.remote([entry or os.getcwd() for entry in sys.path])

    def ready(self, count: int) -> list[Actor]:
        """`count` actors, when they are ready; ends the others that are not. Raises the error if one was lost."""
        self.grow(count)
        starting = {actor.handle.ready.remote(): actor for actor in self._actors}
        answers, others = ray.wait(list(starting), num_returns=count)
        ray.get(answers)
        for answer in ray.wait(others, num_returns=len(others), timeout=0)[1] if others else ():
            self.drop(starting[answer])  # it may wait for a core that never becomes free
        return [starting[answer] for answer in answers]

    def drop(self, actor: Actor) -> None:
        self._actors.pop(actor, None)
        ray.kill(actor.handle)

    def close(self) -> None:
        for actor in list(self._actors):
            self.drop(actor)

    def run(
        self, task: Task, count: int, done: Callable[[Result], None], emit: Emit, say: Say, poll: Poll = no_poll,
        threads: int = 1,
    ) -> None:  # fmt: skip
        """Run all units on `count` actors with `threads` threads each. Every unit is counted once.

        The units of a lost actor are repeated one by one, at most `cluster.max_failures` times each. Raises WorkersLost
        after more losses, and the error of a unit.
        """
        failures, job, long = task.config.cluster.max_failures, ray.put(job_of(task, threads)), task.worker.long
        waiting, left, seconds = deque(task.units), len(task.units), None
        busy, alone, losses, repeated = set[Actor](), set[int](), Counter[int](), 0

        def feed(actor: Actor) -> None:
            while waiting and actor.ready and (actor.calls or len(busy) < count):
                if actor.calls and (long or len(actor.calls) == CALLS or len(waiting) < count):
                    return
                many = 1 if long or id(waiting[0]) in alone else units_per_call(len(waiting), count, seconds)
                busy.add(actor)
                self._send(actor, job, [waiting.popleft() for _ in range(many)])

        try:
            while left:
                self.grow(min(left, count))
                if waiting and len(busy) < count:
                    for idle in [one for one in self._actors if not one.calls]:
                        feed(idle)
                poll()
                try:
                    actor, batch, answer = self._ended.get(timeout=POLL)
                except queue.Empty:
                    continue
                if actor not in self._actors or (batch is not None and batch not in actor.calls):
                    continue  # the actor was dropped, or the answer belongs to an earlier task
                try:
                    with plain_errors():
                        result = answer.result()
                except LOST as error:
                    self.drop(actor)
                    busy.discard(actor)
                    lost = actor.calls[0] if actor.calls else []
                    first = id(lost[0]) if lost else 0  # 0: it was lost before its first call
                    losses[first] += 1
                    repeated += len(lost)
                    emit(instant("lost", "workers of the pool", {"units": len(lost)}))
                    if losses[first] > failures:
                        unit = [*lost, *waiting, *task.units][0]
                        raise WorkersLost(lost_for_good(losses[first], error, left, unit)) from None
                    alone.update(map(id, lost))
                    waiting.extendleft(unit for call in reversed(actor.calls) for unit in reversed(call))
                    continue
                if batch is None:
                    actor.ready = True
                    continue
                actor.calls.remove(batch)
                results, event = result
                left, seconds = left - len(batch), event.seconds / len(batch)
                if not actor.calls:
                    busy.discard(actor)
                feed(actor)
                emit(event)
                for one in results:
                    done(one)
        finally:
            for actor in [actor for actor in self._actors if actor.calls]:
                self.drop(actor)
        if repeated:
            say(repeats(repeated))

    def _send(self, actor: Actor, job: Any, batch: Batch) -> None:
        if actor.job is not job:
            self._watch(actor, None, actor.handle.begin.remote(job))
            actor.job = job
        actor.calls.append(batch)
        self._watch(actor, batch, actor.handle.run.remote(batch))

    def _watch(self, actor: Actor, batch: Batch | None, answer: Any) -> None:
        """Put the answer of a call into the queue when it arrives; `batch` is None for the call `begin`."""
        answer.future().add_done_callback(lambda future: self._ended.put((actor, batch, future)))


def job_of(task: Task, threads: int = 1) -> Job:
    """What an actor needs once for a task."""
    return pack(task.config), task.worker, {name: str(path) for name, path in task.paths.items()}, threads


def repeats(units: int) -> str:
    what = "1 unit of work was" if units == 1 else f"{units} units of work were"
    return f"  {what} repeated after losses, and counted once"


def lost_for_good(times: int, error: Exception | None, left: int, unit: Unit) -> str:
    first, why = unit.outputs[-1] if unit.outputs else unit.work, f" ({str(error).splitlines()[0]})" if error else ""
    return (
        f"workers were lost {times} times{why}; {left} units of work are left, the first one makes "
        f"{first}. Finished work is kept. Run the same command again, with fewer cluster.actors if the workers ran out of "
        "memory. If it fails here again, a sample of that unit kills its process: `validate` finds such samples"
    )


class PoolActor:
    """A process of a pool. It works on one task after another, and loads what a task needs in the first call of that task."""

    def __init__(self, path: list[str]):
        """`path` is the driver's sys.path; it is searched after the worker's own."""
        sys.path.extend(entry for entry in path if entry not in sys.path)
        self.spent = TimeSpent()

    def ready(self) -> None:
        """Import what the work needs."""
        import distill_at_scale.pipeline.executors.tasks  # noqa: F401

    def begin(self, job: Job) -> None:
        self._forget()
        self.packed, self.kind, self.paths, self.threads = job

    def _forget(self) -> None:
        """Release what the previous task loaded."""
        for name in ("space", "worker"):
            self.__dict__.pop(name, None)

    @cached_property
    def space(self) -> WorkerRunDir:
        return WorkerRunDir(self.packed)

    @cached_property
    def worker(self) -> Worker:
        if self.kind.uses_torch:
            import torch

            torch.set_num_threads(self.threads)
        return load(self.space, self.kind, self.paths, self.spent)

    def run(self, units: Batch) -> tuple[list[Result], Event]:
        """The result of each unit, and an event of all of them."""
        events: list[Event] = []
        with measured(self.kind.event, events.append, self.spent) as counts:
            results, total = run_units(self.space, self.worker, units), Counter[str]()
            if self.kind.long:
                counts |= self.worker.counts(results[0])
            else:
                for result in results:
                    total.update(self.worker.counts(result))
                counts |= {"units": len(units), **total}
        return results, events[0]

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Do something else than a task."""
        self._forget()
        function(*arguments)


def load(space: WorkerRunDir, kind: type[Worker], paths: Mapping[str, str], spent: TimeSpent) -> Worker:
    """A worker in this process. Fetches the files that it reads first."""
    here = {name: space(path) for name, path in paths.items()}
    space.need(*kind.stages)
    if kind.fetches:
        space.fetch(*(here[name] for name in kind.fetches))
    return kind(space.config, here, device(space.config) if kind.uses_torch else None, spent)  # type: ignore[arg-type]


def run_units(space: WorkerRunDir, worker: Worker, units: Sequence[Unit]) -> list[Result]:
    """Run units. Fetches their input files first, and stores each output when it is published."""
    units = [unit.at(space) for unit in units]
    outputs = [path for unit in units for path in unit.outputs]
    if inputs := {path for unit in units for path in unit.inputs}:
        space.fetch(*inputs)
    if worker.resumes:
        space.renew(*outputs)
        with space.keeping(*outputs):
            return list(worker.run(units))
    results = []
    for result in worker.run(units):
        results.append(result)
        if ready := [path for path in outputs if path.exists()]:
            space.keep(*ready)
            outputs = [path for path in outputs if path not in ready]
    return results


def lost_too_often(what: str, config: Config, error: BaseException) -> str:
    return (
        f"{what}: processes were lost more often than cluster.max_failures = {config.cluster.max_failures} allows "
        f"({str(error).splitlines()[0]}). Finished work is kept. Run the same command again, with a higher "
        "cluster.max_failures if machines come and go, or with fewer workers per machine if memory ran out"
    )


def actor_count(config: Config, gpus: float, sharing: int = 1) -> int:
    """cluster.actors, else one actor per core, or per `gpus` of a GPU, divided among `sharing` executors."""
    if config.cluster.actors:
        return config.cluster.actors
    return max(1, places(gpus) // sharing)


def places(gpus: float) -> int:
    """Workers with `gpus` GPUs each, or one core each, that the cluster holds."""
    return int(ray.cluster_resources().get("GPU", 0) / gpus) if gpus else cores()


def cores() -> int:
    return int(ray.cluster_resources().get("CPU", 1))


def cores_each(tasks: int) -> int:
    """Cores for each of `tasks` concurrent tasks: at least one, and few enough that the nodes can hold all tasks."""
    nodes = _per_node("CPU")
    each = max(1, min(max(nodes, default=1), cores() // max(1, tasks)))
    while each > 1 and sum(node // each for node in nodes) < tasks:
        each -= 1
    return each


def check_gpus(cluster: ClusterSection) -> None:
    """Raises UserError if no node has the GPUs of one worker or actor; Ray would wait for them without end."""
    share, most = cluster.gpus_per_worker, max(_per_node("GPU"), default=0)
    if share > most and not cluster.grows:
        raise UserError(
            f"cluster.gpus_per_worker = {share:g}, but the largest node of this cluster has {most} GPUs; "
            "lower it (0 runs on CPUs), or set cluster.grows=true where an autoscaler adds them"
        )


def _per_node(kind: str) -> list[int]:
    return [int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"]]


def device(config: Config) -> torch.device:
    """The device of this worker: its GPU if it has one, else the CPU."""
    import torch

    return torch.device("cuda" if config.cluster.gpus_per_worker and torch.cuda.is_available() else "cpu")
