"""Short units of work through a Ray Data actor pool, and how many actors and cores the cluster has for it."""

from __future__ import annotations

import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy

from distill_at_scale.cluster.session import pack, plain_errors
from distill_at_scale.cluster.worker_run_dir import WorkerRunDir
from distill_at_scale.config.load import Config
from distill_at_scale.config.sections import ClusterSection
from distill_at_scale.core.errors import UserError, WorkersLost
from distill_at_scale.core.events import Emit, Event, TimeSpent, instant, measured
from distill_at_scale.pipeline.executors.base import Result, Task, Unit, Worker

UNITS_AT_ONCE, CALLS_EACH = 8, 8  # units in one call of an actor at most, and calls that an actor gets at least
LOST = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.ObjectLostError,
        ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)  # fmt: skip

if TYPE_CHECKING:
    import torch  # imported where it is used: ingest needs none

Say = Callable[[str], None]
Batch = Sequence[Unit]


def run(task: Task, done: Callable[[Result], None], sharing: int, emit: Emit, say: Say) -> None:
    """Run all units, several in each call of an actor, which reads ahead within them.

    A killed actor is restarted and its call repeated; where a whole node is lost, the batches without a result are sent
    again, `cluster.max_failures` times each. Every unit is counted once. Raises WorkersLost after more losses.
    """
    waiting, repeated = dict(enumerate(grouped(task.units, actor_count(task.config, task.gpus, sharing)))), 0
    for failures in range(task.config.cluster.max_failures + 1):
        try:
            for number, results, event in _stream(waiting, task, sharing):
                repeated += event.values.get("restarted", 0)
                if waiting.pop(number, None) is None:
                    continue  # Ray repeats a finished call whose result was lost with its node
                emit(event)
                for result in results:
                    done(result)
            break
        except LOST as error:
            if not waiting:  # actors were lost after their last call
                break
            emit(instant("lost", "workers of the pool", {"units": len(waiting)}))
            if failures == task.config.cluster.max_failures:
                first = next(iter(waiting.values()))[0].outputs[-1]
                raise WorkersLost(
                    f"workers were lost {failures + 1} times ({str(error).splitlines()[0]}); {len(waiting)} batches of work "
                    f"are left, the first one makes {first}. Finished work is kept. Run the same command again, with fewer "
                    "cluster.actors if the workers ran out of memory. If it fails here again, a sample of that batch kills its "
                    "process: `validate` finds such samples"
                ) from None
            say(f"  workers were lost; sending the {len(waiting)} unfinished batches of work again")
    if repeated:
        what = "1 unit of work was" if repeated == 1 else f"{repeated} units of work were"
        say(f"  {what} repeated after losses, and counted once")


def grouped(units: Sequence[Unit], actors: int) -> list[Batch]:
    """Batches of several units: few enough for Ray, enough for all actors."""
    size = max(1, min(UNITS_AT_ONCE, len(units) // (CALLS_EACH * actors)))
    return [units[i : i + size] for i in range(0, len(units), size)]


def _stream(waiting: Mapping[int, Batch], task: Task, sharing: int) -> Iterator[tuple[int, list[Result], Event]]:
    """Send batches through a pool of actors; yields (number, results, event) of each as it is finished."""
    cluster, size = task.config.cluster, min(actor_count(task.config, task.gpus, sharing), len(waiting))
    most = size if cluster.actors or sharing > 1 else len(waiting)  # an unlimited pool grows with the cluster
    paths = {name: str(path) for name, path in task.paths.items()}
    arguments = {"packed": pack(task.config), "kind": task.worker, "paths": paths}
    tables = [pa.table({"number": [number], "units": [pickle.dumps(batch)]}) for number, batch in waiting.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray 2.60 announces new names for ray_remote_args_fn, and has none yet
        data = ray.data.from_arrow(tables).map_batches(
            PoolActor, batch_size=1, batch_format="pyarrow", compute=ActorPoolStrategy(min_size=size, max_size=most),
            fn_constructor_kwargs=arguments, num_cpus=1, num_gpus=task.gpus or None,
            ray_remote_args_fn=lambda: {"max_restarts": cluster.max_failures, "max_task_retries": cluster.max_failures},
        )  # fmt: skip
    with plain_errors():
        for table in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            assert isinstance(table, pa.Table)
            for row in table.to_pylist():
                answer = pickle.loads(row["answer"])
                if isinstance(answer, Exception):
                    raise answer
                yield row["number"], *answer


class PoolActor:
    """One worker of a pool, on one core or a GPU (or a share of one). It loads what it needs in its first call."""

    def __init__(self, packed: dict[str, Any], kind: type[Worker], paths: dict[str, str]):
        self.space, self.kind, self.paths, self.spent = WorkerRunDir(packed), kind, paths, TimeSpent()
        self.called = False

    @cached_property
    def worker(self) -> Worker:
        if self.kind.uses_torch:
            import torch

            torch.set_num_threads(1)
        return load(self.space, self.kind, self.paths, self.spent)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Takes one row with a `number` and pickled `units`; answers with that number and the pickled results and event.

        Ray Data keeps only the text of exceptions, so errors that a user can act on are the answer instead.
        """
        answer: Any
        try:
            answer = self._run(pickle.loads(batch["units"][0].as_py()))
        except (UserError, OSError) as error:
            answer = error
        return pa.table({"number": batch["number"], "answer": [pickle.dumps(answer)]})

    def _run(self, units: Batch) -> tuple[list[Result], Event]:
        events: list[Event] = []
        with measured(self.kind.event, events.append, self.spent) as counts:
            restarted = False
            if not self.called and ray.is_initialized():  # without a cluster, asking would start one
                context = ray.get_runtime_context()
                # this is the call in which the predecessor of a restarted actor was lost
                restarted = context.get_actor_id() is not None and context.was_current_actor_reconstructed
            self.called = True
            results, total = run_units(self.space, self.worker, units), Counter[str]()
            for result in results:
                total.update(self.worker.counts(result))
            counts |= {"units": 1, **total, **({"restarted": 1} if restarted else {})}
        return results, events[0]


def load(space: WorkerRunDir, kind: type[Worker], paths: Mapping[str, str], spent: TimeSpent) -> Worker:
    """A worker in this process, once the files that it reads are here."""
    here = {name: space(path) for name, path in paths.items()}
    space.need(*kind.stages)
    if kind.fetches:
        space.fetch(*(here[name] for name in kind.fetches))
    return kind(space.config, here, device(space.config) if kind.uses_torch else None, spent)  # type: ignore[arg-type]


def run_units(space: WorkerRunDir, worker: Worker, units: Batch) -> list[Result]:
    """Run units, with their files fetched before and stored as they are published."""
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
    room = int(ray.cluster_resources().get("GPU", 0) / gpus) if gpus else cores()
    return max(1, room // sharing)


def cores() -> int:
    return int(ray.cluster_resources().get("CPU", 1))


def cores_each(tasks: int) -> int:
    """Cores for each of `tasks` concurrent tasks, at least one, such that the nodes can hold all tasks."""
    nodes = _per_node("CPU")
    each = max(1, min(max(nodes, default=1), cores() // max(1, tasks)))
    while each > 1 and sum(node // each for node in nodes) < tasks:
        each -= 1
    return each


def check_gpus(cluster: ClusterSection) -> None:
    """Raises UserError where no node has the GPUs of one worker or actor; Ray would wait for ever."""
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
