"""Short units of work on a running cluster: Ray Data shards them over a pool of actors on all nodes and GPUs.

Ray Data takes all calls at once, so their sizes are planned: large ones first, and single units at the end.
"""

from __future__ import annotations

import pickle
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy

from distill_at_scale.cluster.actor_pool import (
    LOST,
    Batch,
    Job,
    PoolActor,
    Say,
    actor_count,
    job_of,
    lost_for_good,
    repeats,
)
from distill_at_scale.cluster.session import plain_errors
from distill_at_scale.core.errors import UserError, WorkersLost
from distill_at_scale.core.events import Emit, Event, instant
from distill_at_scale.pipeline.executors.base import Result, Task, Unit
from distill_at_scale.pipeline.executors.helpers import pickled_error

CALLS, MOST_UNITS = 2, 64  # calls that an actor has at a time, and units of a call at most


def run(task: Task, done: Callable[[Result], None], sharing: int, emit: Emit, say: Say) -> None:
    """Run all units on actors that work for this task only. More actors start if the cluster grows. Every unit is counted once.

    Ray restarts a killed actor and repeats its call, at most `cluster.max_failures` times. Units that still have no result
    are sent again one by one, also at most `cluster.max_failures` times. If a node is lost with results, all unfinished units
    are sent again. Raises WorkersLost after more losses, and the error of a unit.
    """
    failures, actors = task.config.cluster.max_failures, actor_count(task.config, task.gpus, sharing)
    waiting, alone, losses, repeated = dict(enumerate(grouped(task.units, actors))), False, 0, 0
    for times in range(1, failures + 2):
        error: Exception | None = None
        try:
            for number, results, event, again in _stream(waiting, task, sharing, alone):
                if waiting.pop(number, None) is None:
                    continue  # Ray repeated a finished call because its result was lost with a node
                if again:
                    repeated += again
                    emit(instant("lost", "workers of the pool", {"units": again}))
                emit(event)
                for result in results:
                    done(result)
        except LOST as loss:
            error = loss
        if not waiting:  # also if actors were lost after their last call
            break
        units = [unit for batch in waiting.values() for unit in batch]
        emit(instant("lost", "workers of the pool", {"units": len(units)}))
        losses += 1 if alone or error else failures + 1
        if times > failures:
            raise WorkersLost(lost_for_good(losses, error, len(units), units[0])) from None
        alone = error is None  # only these calls were lost too often; the others have results
        if alone:
            repeated += len(units)
        else:
            say(f"  workers were lost; sending {len(units)} unfinished units of work again")
        waiting = dict(enumerate([[unit] for unit in units] if alone else grouped(units, actors)))
    if repeated:
        say(repeats(repeated))


def grouped(units: Sequence[Unit], actors: int) -> list[Batch]:
    """Calls of 1 / (CALLS x `actors`) of the units that are left each: about CALLS x `actors` x log(units / actors)."""
    calls, start = list[Batch](), 0
    while start < len(units):
        size = max(1, min(MOST_UNITS, (len(units) - start) // (CALLS * actors)))
        calls.append(list(units[start : start + size]))
        start += size
    return calls


def _stream(
    waiting: Mapping[int, Batch], task: Task, sharing: int, alone: bool
) -> Iterator[tuple[int, list[Result], Event, int]]:
    """Send batches through a pool; yields (number, results, event, units repeated after a loss) when a batch is finished.

    Yields nothing for a batch whose actor was lost too often. With `alone` an actor has one call at a time, and Ray does not
    repeat a lost call.
    """
    cluster, size = task.config.cluster, min(actor_count(task.config, task.gpus, sharing), len(waiting))
    most = size if cluster.actors or sharing > 1 else len(waiting)  # an unlimited pool grows with the cluster
    rows = [{"number": number, "units": pickle.dumps(batch)} for number, batch in waiting.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray 2.60 announces a new name for max_task_retries, and has none yet
        data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            DataActor, batch_size=1, batch_format="pyarrow", fn_constructor_args=(job_of(task),),
            compute=ActorPoolStrategy(min_size=size, max_size=most, max_tasks_in_flight_per_actor=1 if alone else CALLS),
            num_cpus=1, num_gpus=task.gpus or None, max_task_retries=0 if alone else cluster.max_failures,
        )  # fmt: skip
    context = data.context
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_errored_blocks = -1  # the other calls go on after one was lost
    with plain_errors():
        for table in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            assert isinstance(table, pa.Table)
            for row in table.to_pylist():
                answer = pickle.loads(row["answer"])
                if isinstance(answer, Exception):
                    raise answer
                yield row["number"], *answer


class DataActor(PoolActor):
    """A process of a Ray Data pool, for one task, on one core or a GPU (or a share of one)."""

    def __init__(self, job: Job):
        super().__init__([])
        self.begin(job)
        self.called = False

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Takes one row with a `number` and pickled `units`; returns that number and a pickled answer.

        The answer is (results, event, units repeated after a loss), or the error: a call that raises would count as lost.
        """
        try:
            units, again = pickle.loads(batch["units"][0].as_py()), 0
            if not self.called and ray.get_runtime_context().was_current_actor_reconstructed:  # lost in this call
                again = sum(not all(path.exists() for path in unit.at(self.space).outputs) for unit in units)
            self.called = True
            answer = pickle.dumps((*self.run(units), again))
        except (UserError, OSError) as error:
            answer = pickled_error(error)
        except Exception:
            answer = pickle.dumps(RuntimeError(traceback.format_exc()))
        return pa.table({"number": batch["number"], "answer": [answer]})
