"""An executor for a run folder on an object store, whose workers may be on other machines.

Before the work it uploads the files that the driver published. During and after the work it fetches the files that the workers
uploaded. `cluster/worker_run_dir.py` has the workers' side.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from distill_at_scale.config.load import Config
from distill_at_scale.pipeline.executors.base import Executor, Group, Poll, Result, Task, no_poll
from distill_at_scale.pipeline.monitoring.observers import Observer
from distill_at_scale.storage.working_copy import WorkingCopy


class SyncedExecutor:
    """Another executor, with this exchange of files around its work."""

    def __init__(self, executor: Executor, copy: WorkingCopy):
        self.executor, self.copy = executor, copy
        self.emit = executor.emit

    def observers(self, config: Config) -> list[Observer]:
        return self.executor.observers(config)

    def run(self, task: Task, done: Callable[[Result], None], poll: Poll = no_poll) -> None:
        with self._exchanged(task.folder) if task.folder else nullcontext():
            self.executor.run(task, done, poll)

    def train(self, group: Group) -> None:
        with self._exchanged(*group.results):
            self.executor.train(group)

    def release(self) -> None:
        self.executor.release()

    def close(self) -> None:
        self.executor.close()

    def _exchanged(self, *paths: Path) -> AbstractContextManager[None]:
        return self.copy.exchanging(*(path.relative_to(self.copy.path).as_posix() for path in paths))
