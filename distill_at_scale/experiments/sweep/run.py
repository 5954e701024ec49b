"""The command `sweep`: ingest and scores once for all trials, then the trials, their table and their page.

Trials are points (`experiments/points.py`): a finished trial never runs again, an interrupted one resumes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa

from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.progress import Display
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.experiments import points
from distill_at_scale.experiments.point import Outcome
from distill_at_scale.experiments.points import Failure, PointSet
from distill_at_scale.experiments.runners import LastEvaluation, LocalRunner, PointRunner, PointTask
from distill_at_scale.experiments.sweep import page, space, table
from distill_at_scale.experiments.sweep import validate as checks
from distill_at_scale.experiments.sweep.space import SweepTrial
from distill_at_scale.pipeline import validate
from distill_at_scale.pipeline.stages.context import MakeObservers, no_observers
from distill_at_scale.storage.filesystem import last_name
from distill_at_scale.storage.run_dir import RunDir
from distill_at_scale.storage.sync import AT_ONCE

Connect = Callable[[], PointRunner]
UNKNOWN = Failure("its folder does not say how it ended", transient=True)


@dataclass(frozen=True)
class PlannedTrial:
    """A trial and the configuration of its point; trials that share a point have the same configuration."""

    trial: SweepTrial
    config: Config

    @property
    def folder(self) -> str:
        return self.config.run.dir

    def open(self, retry: bool = True) -> RunDir:
        """Its run folder; without `retry` a failing object store raises at once."""
        return RunDir.of(self.config.run.model_copy(update={} if retry else {"retry_seconds": 0.0}))

    def outcome(self, search: str, retry: bool = True) -> Outcome | None:
        """Its outcome, None if it has to run (again)."""
        run = self.open(retry)
        outcome = points.read_outcome(self.trial.point, run)
        if outcome is None and search == "asha":
            return points.read_stopped(self.trial.point, run, self.config.distill.network)
        return outcome


def run(config: Config, display: Display, connect: Connect, observers: MakeObservers = no_observers) -> pa.Table:
    """Run a sweep; returns its table, which is also printed and written to sweep.parquet.

    Raises UserError for every error that can be detected before a trial starts, where no trial succeeded, and, at the end,
    where a trial failed because of the disk, the object store or lost processes. A trial that fails by itself is a result.
    """
    checks.check_search(config)
    base = RunDir.of(config.run, display.say)
    planned = plan(config)
    base.create()
    with base.lock(), contextlib.closing(connect()) as runner:
        runner.check()
        return Sweep(config, base, PointSet(config, runner, display), planned, observers).run()


def plan(config: Config) -> list[PlannedTrial]:
    """All trials with their configurations; resolves every name in them. Reads and writes nothing."""
    point_set = PointSet(config, LocalRunner(), Display.silent())
    planned = [PlannedTrial(trial, point_set.configured(trial.point)) for trial in space.trials(config)]
    for one in planned:
        if one.config.select.keep == "auto":
            raise UserError(
                "select.keep = auto cannot be swept: a sweep compares rates itself; list them, for example "
                "sweep.space={select.keep: [0.1, 0.3]}"
            )
        validate.check_names(one.config)
        if config.sweep.search == "asha":
            checks.check_asha(one.config)
    return planned


@dataclass
class Sweep:
    """One running sweep command."""

    config: Config
    base: RunDir
    points: PointSet
    planned: Sequence[PlannedTrial]
    observers: MakeObservers
    ends: dict[str, Outcome | Failure | None] = field(default_factory=dict)  # by folder; None while unknown

    def __post_init__(self) -> None:
        self.display = self.points.display
        self.jobs = list({planned.folder: planned for planned in self.planned}.values())  # one per point

    def run(self) -> pa.Table:
        datasets: dict[Path, PreparedDataset] = {}
        for planned in self.planned:  # check every trial against its data before anything is scored
            folder = self.points.ingested(planned.config).path
            data = datasets.setdefault(folder, PreparedDataset(folder / "prepared"))
            checks.check_trial(space.trial_name(planned.trial), planned.config, data)
        for job in self.jobs:
            self.points.scored(job.config)
        with ThreadPoolExecutor(AT_ONCE) as pool:  # on object storage each trial takes a few requests
            outcomes = list(pool.map(lambda job: job.outcome(self.config.sweep.search), self.jobs))
            self.ends |= {job.folder: outcome for job, outcome in zip(self.jobs, outcomes, strict=True)}
            todo = [job for job in self.jobs if self.ends[job.folder] is None]
            finished = len(self.jobs) - len(todo)
            before = f", {finished} of them finished before" if finished else ""
            self.display.say(f"sweep: {len(self.jobs)} trials{before}")
            list(pool.map(lambda job: self.points.prepare(job.config), todo))
        if not todo:
            return self._finish()
        asha = self.config.sweep.search == "asha"  # then finished trials come first, for the scheduler's comparison
        jobs = [*(job for job in self.jobs if asha and job not in todo), *todo]
        tasks = [
            PointTask(job.config, space.trial_name(job.trial), asha and job.trial.control is None, job not in todo)
            for job in jobs
        ]
        with self.display.meter("sweep", len(todo), "trials") as meter:

            def done(index: int, last: LastEvaluation | None, error: Exception | None) -> None:
                if not tasks[index].finished:
                    self._record_end(jobs[index], last, error)
                    meter.advance(1, tasks[index].name)

            self.points.runner.run(tasks, partial(points.try_point, observers=self.observers), done)
        return self._finish()

    def _record_end(self, job: PlannedTrial, last: LastEvaluation | None, error: Exception | None) -> None:
        """Other trials are running, so a failing store is not retried; `_finish` reads again what could not be read here."""
        if error is not None:
            self.ends[job.folder] = Failure(str(error), transient=True)
        with contextlib.suppress(OSError, UserError):
            run = job.open(retry=False)
            if last is not None:
                points.write_stop(run, last)
            if error is not None:
                points.write_failure(run, Failure(str(error), transient=True))
            self._read_end(job, retry=False)
            table.write(self._table(), self.base / "sweep.parquet")

    def _read_end(self, job: PlannedTrial, retry: bool = True) -> None:
        end = job.outcome(self.config.sweep.search, retry) or points.read_failure(job.open())
        self.ends[job.folder] = end or self.ends[job.folder]

    def _table(self) -> pa.Table:
        ended = [(planned, end) for planned in self.planned if (end := self.ends[planned.folder]) is not None]
        names, keys = [last_name(planned.folder) for planned, _ in ended], list(space.dimensions(self.config))
        return table.make([(planned.trial, end) for planned, end in ended], names, keys)

    def _finish(self) -> pa.Table:
        """Print and write the table and the page; raises UserError where trials failed for want of machines or storage."""
        for job in self.jobs:
            if self.ends[job.folder] is None:
                self._read_end(job)
            self.ends[job.folder] = self.ends[job.folder] or UNKNOWN
        result = self._table()
        table.show(result, self.display.console, self.config.evaluate.split)  # before the files: the disk may be full
        table.write(result, self.base / "sweep.parquet")
        failed = [end for end in self.ends.values() if isinstance(end, Failure)]
        if len(failed) == len(self.jobs):
            raise UserError(f"none of the {len(failed)} trials succeeded; the first failed with: {failed[0].message}")
        if failed:
            self.display.say(f"  {len(failed)} of {len(self.jobs)} trials failed; the column error of "
                             f"{self.base.place('sweep.parquet')} says why, and the same command tries them again")  # fmt: skip
        page.write(self.base.path, result, self.config)
        self.display.say(f"  page: {self.base.place('sweep.html')}")
        self.display.say(f"  table: {self.base.place('sweep.parquet')}")
        if transient := [failure for failure in failed if failure.transient]:
            raise UserError(
                f"{len(transient)} of {len(self.jobs)} trials could not be carried out here, the first for: "
                f"{transient[0].message}. Mend that, and give the same command again; what is finished is kept"
            )
        return result
