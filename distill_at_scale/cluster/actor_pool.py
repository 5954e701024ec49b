"""Fixed units of work through a Ray Data actor pool, and how many actors and cores the cluster has for it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy

from distill_at_scale.cluster.session import plain_errors
from distill_at_scale.config.load import Config
from distill_at_scale.config.sections import ClusterSection
from distill_at_scale.core.errors import UserError, WorkersLost
from distill_at_scale.core.events import Emit, Event, discard, instant, measured

CHUNKS_AT_ONCE, UNITS_EACH = 8, 8  # chunks in a unit of work at most, and units that an actor gets at least
LOST = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.ObjectLostError,
        ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)  # fmt: skip
ANYWHERE = "DEFAULT"  # where there is room; not within the placement group of a sweep's trial

if TYPE_CHECKING:
    import torch  # imported where it is used: ingest needs none


class Tell(NamedTuple):
    """Who hears of what happens: observers of events, and the user."""

    emit: Emit = discard
    say: Callable[[str], None] = lambda text: None


def grouped(chunks: Sequence[dict[str, Any]], config: Config, gpus: float) -> list[pa.Table]:
    """Units of several chunks, each a dict with the `path` that it makes: few enough for Ray, enough for all actors."""
    size = max(1, min(CHUNKS_AT_ONCE, len(chunks) // (UNITS_EACH * actor_count(config, gpus))))
    parts = (chunks[i : i + size] for i in range(0, len(chunks), size))
    return [pa.table({"path": [part[0]["path"]], "work": [json.dumps(part)]}) for part in parts]


def work_of(unit: pa.Table) -> list[dict[str, Any]]:
    """The chunks of a unit."""
    return json.loads(unit["work"][0].as_py())


def stream(
    units: Sequence[pa.Table], actor: type, arguments: dict[str, Any], config: Config, gpus: float, tell: Tell
) -> Iterator[dict[str, Any]]:
    """Send one-row tables through a pool of actors; yields each result row when it is there, in any order.

    An actor is called with one unit (an Arrow table, whose `path` is what it makes) and returns a table. A killed actor is
    restarted and its unit repeated, and where a whole node was lost the units without a result are sent again,
    `cluster.max_failures` times at most each.
    """
    waiting, repeated = dict(enumerate(units)), 0
    for failures in range(config.cluster.max_failures + 1):
        try:
            for row in _stream_once(waiting, actor, arguments, config, gpus):
                event = Event.from_json(row.pop("event"))
                repeated += event.values.get("restarted", 0)
                if waiting.pop(row["unit"], None) is not None:  # Ray makes a result again whose node was lost with it
                    tell.emit(event)
                    yield row
            break
        except LOST as error:
            if not waiting:  # they were lost after their last unit
                break
            tell.emit(instant("lost", "workers of the pool", {"units": len(waiting)}))
            if failures == config.cluster.max_failures:
                raise WorkersLost(_gave_up(failures + 1, waiting, error)) from None
            tell.say(f"  workers were lost; what is left of {len(waiting)} units of work is sent again")
    if repeated:
        what = "1 unit of work was" if repeated == 1 else f"{repeated} units of work were"
        tell.say(f"  {what} repeated after losses, and counted once")


def _stream_once(
    units: Mapping[int, pa.Table], actor: type, arguments: dict[str, Any], config: Config, gpus: float
) -> Iterator[dict[str, Any]]:
    cluster, size = config.cluster, min(actor_count(config, gpus), len(units))
    most = size if cluster.actors else len(units)  # a pool that nobody limits grows with the cluster
    numbered = [table.append_column("unit", pa.array([number])) for number, table in units.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray 2.60 announces new names for ray_remote_args_fn, and has none yet
        data = ray.data.from_arrow(numbered).map_batches(
            actor, batch_size=1, batch_format="pyarrow", compute=ActorPoolStrategy(min_size=size, max_size=most),
            fn_constructor_kwargs=arguments, num_cpus=1, num_gpus=gpus or None,
            ray_remote_args_fn=lambda: {"max_restarts": cluster.max_failures, "max_task_retries": cluster.max_failures},
        )  # fmt: skip
    with plain_errors():
        for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            assert isinstance(batch, pa.Table)
            for row in batch.to_pylist():
                _raise_reported(row)
                yield row


def _gave_up(times: int, waiting: Mapping[int, pa.Table], error: BaseException) -> str:
    first = next(iter(waiting.values()))["path"][0].as_py()
    return (
        f"workers were lost {times} times ({str(error).splitlines()[0]}), with {len(waiting)} units of work left, the first of "
        f"which makes {first}. What is finished is kept: give the same command again, with fewer cluster.actors if they ran "
        "out of memory; if it ends here again, a sample of that unit kills its process (`validate` finds such samples)"
    )


@contextmanager
def waited_for(what: str, config: Config) -> Iterator[None]:
    """Around the wait for tasks, which Ray repeats `cluster.max_failures` times when their process is lost; what one of them
    raised is raised as it was.

    Raises WorkersLost where one was lost more often.
    """
    try:
        with plain_errors():
            yield
    except LOST as error:
        raise WorkersLost(lost_too_often(what, config, error)) from None


def lost_too_often(what: str, config: Config, error: BaseException) -> str:
    return (
        f"{what}: processes were lost more often than cluster.max_failures = {config.cluster.max_failures} allows "
        f"({str(error).splitlines()[0]}). What is finished is kept: give the same command again, with a higher "
        "cluster.max_failures where machines come and go, and with fewer workers a machine if its memory ran out"
    )


def reporting(call: Callable[[Any, pa.Table], pa.Table]) -> Callable[[Any, pa.Table], pa.Table]:
    """For an actor's __call__: the result says which unit it belongs to and what the work took (an event), and what a user
    can mend comes back as a row, since Ray Data keeps only the text of exceptions. The actor has a name for its work (`does`)
    and the seconds that it `spent`.
    """

    @wraps(call)
    def guarded(self: Any, unit: pa.Table) -> pa.Table:
        events: list[Event] = []
        try:
            with measured(self.does, events.append, self.spent) as counts:
                found = call(self, unit)
                counts |= {"units": 1, **found.to_pylist()[0], **repeats(self)}
            found = found.append_column("event", pa.array([events[0].to_json()]))
        except UserError as error:
            found = pa.table({"error": [str(error)], "errno": [0], "file": [""]})
        except OSError as error:
            what, where = error.strerror or str(error), str(error.filename or "")
            found = pa.table({"error": [what], "errno": [error.errno or 0], "file": [where]})
        return found.append_column("unit", unit["unit"])

    return guarded


def repeats(actor: Any) -> dict[str, int]:
    """In the first call of an actor that Ray has started again, which is the call that its predecessor was lost in."""
    first = not getattr(actor, "called", False)
    actor.called = True
    if not ray.is_initialized():  # called without a cluster, and asking would start one
        return {}
    context = ray.get_runtime_context()
    again = first and context.get_actor_id() is not None and context.was_current_actor_reconstructed
    return {"restarted": 1} if again else {}


def _raise_reported(row: dict[str, Any]) -> None:
    if "error" in row:
        raise OSError(row["errno"], row["error"], row["file"]) if row["errno"] else UserError(row["error"])


def actor_count(config: Config, gpus: float) -> int:
    """cluster.actors, else one per core, or per GPU share where an actor takes `gpus` of them."""
    if config.cluster.actors:
        return config.cluster.actors
    if gpus:
        return max(1, int(ray.cluster_resources().get("GPU", 0) / gpus))
    return max(1, cores())


def with_fewer_actors(config: Config, sharing: int) -> Config:
    """For one of `sharing` executors at work on the cluster: its part of the actors, where their number is not given."""
    if sharing == 1 or config.cluster.actors:
        return config
    part = max(1, actor_count(config, config.cluster.gpus_per_worker) // sharing)
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"actors": part})})


def cores() -> int:
    return int(ray.cluster_resources().get("CPU", 1))


def cores_each(tasks: int) -> int:
    """Cores for each of `tasks` tasks that run side by side, such that the nodes can hold them all (at least one each)."""
    nodes = _per_node("CPU")
    each = max(1, min(max(nodes, default=1), cores() // max(1, tasks)))
    while each > 1 and sum(node // each for node in nodes) < tasks:
        each -= 1
    return each


def check_gpus(cluster: ClusterSection) -> None:
    """Raises UserError where no node has the GPUs that one worker or actor asks for; Ray would wait for ever."""
    share, most = cluster.gpus_per_worker, max(_per_node("GPU"), default=0)
    if share > most and not cluster.grows:
        raise UserError(
            f"cluster.gpus_per_worker = {share:g}, but the largest node of this cluster has {most} GPUs; "
            "lower it (0 runs on CPUs), or set cluster.grows=true where an autoscaler adds them"
        )


def _per_node(kind: str) -> list[int]:
    return [int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"]]


def device(config: Config) -> torch.device:
    """Inside a worker: the GPU it was given, else the CPU."""
    import torch

    return torch.device("cuda" if config.cluster.gpus_per_worker and torch.cuda.is_available() else "cpu")
