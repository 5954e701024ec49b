"""Short units of work on a running cluster: Ray Data shards them over a pool of actors on all nodes and GPUs.

Ray Data takes all calls at once, so their sizes are planned: large ones first, and single units at the end.
"""

from __future__ import annotations

import pickle
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

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

CALLS, MOST_UNITS = 2, 64  # calls that an actor has at a time, and units of a call at most


def run(task: Task, done: Callable[[Result], None], sharing: int, emit: Emit, say: Say) -> None:
    """Run all units on actors of this task alone; their number follows the cluster, if it grows. Every unit is counted once.

    A killed actor restarts and repeats its call, `cluster.max_failures` times. What has no result then is sent again one by
    one, as often; so is what was left when a node was lost with results. Raises WorkersLost after more losses, and what a
    unit raised.
    """
    failures, actors = task.config.cluster.max_failures, actor_count(task.config, task.gpus, sharing)
    waiting, alone, losses, repeated = dict(enumerate(grouped(task.units, actors))), False, 0, 0
    for times in range(1, failures + 2):
        error: Exception | None = None
        try:
            for number, results, event, again in _stream(waiting, task, sharing, alone):
                if waiting.pop(number, None) is None:
                    continue  # Ray repeats a finished call whose result was lost with its node
                if again:
                    repeated += again
                    emit(instant("lost", "workers of the pool", {"units": again}))
                emit(event)
                for result in results:
                    done(result)
        except LOST as loss:
            error = loss
        if not waiting:  # else actors were lost after their last call
            break
        units = [unit for batch in waiting.values() for unit in batch]
        emit(instant("lost", "workers of the pool", {"units": len(units)}))
        losses += 1 if alone or error else failures + 1
        if times > failures:
            raise WorkersLost(lost_for_good(losses, error, len(units), units[0])) from None
        alone = error is None  # these calls alone were lost too often
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
    """Send batches through a pool; yields (number, results, event, units repeated after a loss) as they are finished.

    It skips batches whose actor was lost too often. With `alone`, an actor has one call at a time, and its loss is one too
    many.
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
    context.max_errored_blocks = -1  # a call whose actor is lost ends no other
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
        """Takes one row with a `number` and pickled `units`; answers with that number, and results and event or an error.

        An error is an answer too, as a call without one counts as lost.
        """
        answer: Any
        units, again = pickle.loads(batch["units"][0].as_py()), 0
        try:
            if (
                not self.called and ray.get_runtime_context().was_current_actor_reconstructed
            ):  # it was lost in this call
                again = sum(not all(path.exists() for path in unit.at(self.space).outputs) for unit in units)
            self.called = True
            answer = (*self.run(units), again)
        except (UserError, OSError) as error:
            answer = error
        except Exception:
            answer = RuntimeError(traceback.format_exc())
        return pa.table({"number": batch["number"], "answer": [pickle.dumps(answer)]})
