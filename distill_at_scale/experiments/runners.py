"""The contract for running a set of prepared points, and the runner that uses this process alone.

`cluster/actor_runner.py` runs points in warm Ray actors, `cluster/tune_runner.py` as trials of Ray Tune.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from distill_at_scale.config.load import Config
from distill_at_scale.pipeline.executors.base import Executor
from distill_at_scale.pipeline.executors.local import LocalExecutor

Watch = Callable[[dict[str, Any]], None]  # called with each line of a distillation's log as it is written
# runs one point; importable, so that it can be sent to a worker
Body = Callable[[Config, Executor, Watch | None], None]
LastEvaluation = Mapping[str, Any]  # step and top1 of an evaluation during distillation
# Called for a finished task with its index, the last evaluation of a point that the scheduler stopped, and what the body
# raised (a UserError where the point's process was lost). A runner starts no further task once it raises.
Done = Callable[[int, LastEvaluation | None, Exception | None], None]


@dataclass(frozen=True)
class PointTask:
    """A prepared point to run.

    The scheduler of sweep.search = asha may stop a `judged` point. A `finished` point does not run: it only reports its
    earlier evaluations to the scheduler.
    """

    config: Config
    name: str  # for error messages
    judged: bool = False
    finished: bool = False


class PointRunner(Protocol):
    """Where points run."""

    def executor(self) -> Executor:
        """An executor for the ingest and scores that points share."""

    def check(self) -> None:
        """Raises UserError where the cluster cannot hold the configured number of points at a time."""

    def at_once(self) -> int:
        """How many points run at a time."""

    def run(self, tasks: Sequence[PointTask], body: Body, done: Done) -> None:
        """Run `body` on every unfinished task and call `done` once for each task; a failed task does not end the others."""

    def close(self) -> None:
        """Release what the runner holds."""


class LocalRunner:
    """Runs points one after the other in this process."""

    def executor(self) -> Executor:
        return LocalExecutor()

    def check(self) -> None:
        pass

    def at_once(self) -> int:
        return 1

    def run(self, tasks: Sequence[PointTask], body: Body, done: Done) -> None:
        for index, task in enumerate(tasks):
            failure = None
            if not task.finished:
                try:
                    body(task.config, self.executor(), None)
                except Exception as error:
                    failure = error
            done(index, None, failure)

    def close(self) -> None:
        pass
