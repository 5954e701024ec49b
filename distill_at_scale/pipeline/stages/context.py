"""What the stages of one run share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distill_at_scale.config.load import Config
from distill_at_scale.core.events import measured
from distill_at_scale.core.progress import Display
from distill_at_scale.data.ingest.plan import IngestPlan
from distill_at_scale.models import precision
from distill_at_scale.pipeline import warnings
from distill_at_scale.pipeline.executors.base import Executor, Report
from distill_at_scale.pipeline.executors.synced import SyncedExecutor
from distill_at_scale.pipeline.monitoring.observers import Observer, Observers
from distill_at_scale.pipeline.monitoring.tensorboard import TensorBoard
from distill_at_scale.pipeline.monitoring.timeline import Timeline
from distill_at_scale.storage.run_dir import RunDir

MakeObservers = Callable[[Config], Sequence[Observer]]  # observers of a run besides timeline and TensorBoard
StageOutput = tuple[list[Path], dict[str, Any]]  # what a stage wrote, and facts for its record


def no_observers(config: Config) -> Sequence[Observer]:
    return ()


class RunContext:
    """A configuration, its run folder, display and observers, and an executor that starts when it is first used."""

    def __init__(
        self,
        config: Config,
        make_executor: Callable[[], Executor],
        display: Display,
        watch: Report | None = None,
        observers: MakeObservers = no_observers,
    ):
        # as configured, and with the results of `precision: auto` and `select.keep: auto`
        self.requested, self.config = config, precision.resolved(config)
        self.make_executor, self.display = make_executor, display
        self.watch = watch  # called with each line of the distillation's log
        self.dir = RunDir.of(config.run, display.say)
        defaults = (Timeline(self.dir.path), TensorBoard(self.dir.path))
        self.observers = Observers(display.say, [*defaults, *observers(config)])
        self.plan: IngestPlan  # the listing of the source, set by `stages.ingest.inputs`
        self.warned = False  # whether the warnings of `pipeline.warnings.of_data` were printed
        self._executor: Executor | None = None

    def warn_of_data(self, class_names: Sequence[str], counts: Sequence[int], tested: int) -> None:
        """Say the warnings of `pipeline.warnings.of_data` once."""
        for line in () if self.warned else warnings.of_data(self.config, class_names, counts, tested):
            self.display.say(f"warning: {line}")
        self.warned = True

    @property
    def executor(self) -> Executor:
        if self._executor is None:
            with measured("start", self.observers.emit, what="wait"):
                executor = self.make_executor()
            executor.emit = self.observers.emit
            for observer in executor.observers(self.config):
                self.observers.add(observer)
            self._executor = SyncedExecutor(executor, self.dir.remote) if self.dir.remote else executor
        return self._executor

    def close(self) -> None:
        self.observers.close()
        if self._executor is not None:
            self._executor.close()
