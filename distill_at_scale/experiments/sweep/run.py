"""The command `sweep`: ingest and scores once for all trials, the trials, and their table and page.

Trials are points (`experiments/points.py`), so one that is finished is never done again, and one that was interrupted goes on. How
they are run, several at a time or one after the other, is the business of `experiments/trials.py`. Left out: what is tried (`space.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.progress import Display
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.experiments import points
from distill_at_scale.experiments.point import Outcome
from distill_at_scale.experiments.points import Failure, Points
from distill_at_scale.experiments.sweep import page, space, summary, table
from distill_at_scale.experiments.sweep import validate as checks
from distill_at_scale.experiments.sweep.space import SweepTrial
from distill_at_scale.experiments.trials import Attempt, Last, TrialRunner
from distill_at_scale.pipeline import validate
from distill_at_scale.pipeline.executors.local import LocalExecutor
from distill_at_scale.pipeline.stages.stages import MakeObservers, nobody
from distill_at_scale.storage.filesystem import last_name
from distill_at_scale.storage.run_dir import RunDir
from distill_at_scale.storage.sync import AT_ONCE

T = TypeVar("T")
UNKNOWN = Failure("its end could not be noted in its folder", passing=True)


@dataclass(frozen=True)
class PlannedTrial:
    """A trial and the configuration of its point; trials of one point have the same."""

    trial: SweepTrial
    config: Config

    @property
    def folder(self) -> str:
        return self.config.run.dir

    def opened(self, hurry: bool = False) -> RunDir:
        """Its run folder; a storage that refuses is not waited for in a `hurry`."""
        waiting = {"retry_seconds": 0.0} if hurry else {}
        return RunDir.of(self.config.run.model_copy(update=waiting))

    def outcome(self, search: str, hurry: bool = False) -> Outcome | None:
        """What came of it, if it needs no more work."""
        run = self.opened(hurry)
        finished = points.outcome_of(self.trial.point, run)
        if finished is None and search == "asha":
            return points.stopped_of(self.trial.point, run, self.config.distill.network)
        return finished


def run(
    config: Config, display: Display, connect: Callable[[], TrialRunner], observers: MakeObservers = nobody
) -> pa.Table:
    """Everything; returns the table, which is also shown and in sweep.parquet.

    Raises UserError for whatever can be known to be wrong before a trial starts, where no trial succeeded, and at the end
    where one failed for the disk, the storage or lost processes: what fails by itself is a result, that is none.
    """
    checks.check_search(config)
    base = RunDir.of(config.run, display.say)
    found = plan(config)
    base.create()
    with base.lock():
        trials = connect()
        try:
            trials.check(config)
            return Sweep(config, base, display, trials, found, observers).run()
        finally:
            trials.close()


def note(run: RunDir, last: Last | None, error: str | None) -> None:
    """Leave in a trial's folder how it ended, where it could not do so itself."""
    if last is not None:
        points.note_stop(run, last["step"], last["top1"])
    if error is not None:
        points.note_failure(run, Failure(error, passing=True))


def plan(config: Config) -> list[PlannedTrial]:
    """All trials with their configurations, and every name in them resolved; nothing is read or written."""
    where = Points(config, LocalExecutor, Display.silent())
    found = [PlannedTrial(trial, where.configured(trial.point)) for trial in space.trials(config)]
    for planned in found:
        checks.check_rate(planned.config)
        validate.check_names(planned.config)
        if config.sweep.search == "asha":
            checks.check_asha(planned.config)
    return found


class Sweep:
    """One command at work."""

    def __init__(
        self,
        config: Config,
        base: RunDir,
        display: Display,
        trials: TrialRunner,
        planned: Sequence[PlannedTrial],
        observers: MakeObservers = nobody,
    ):
        self.config, self.base, self.display, self.trials, self.planned = config, base, display, trials, planned
        self.body = partial(points.attempt, observers=observers)
        self.points = Points(config, trials.executor, display)
        self.jobs = list({planned.folder: planned for planned in planned}.values())  # one per point
        self.ends: dict[str, Outcome | Failure | None] = {}  # by folder; None where nothing is known yet

    def run(self) -> pa.Table:
        self._check_data()
        for job in self.jobs:
            self.points.shared_by(job.config)
        found = _side_by_side(lambda job: job.outcome(self.config.sweep.search), self.jobs)
        self.ends |= {job.folder: end for job, end in zip(self.jobs, found, strict=True)}
        todo = [job for job in self.jobs if self.ends[job.folder] is None]
        old = len(self.jobs) - len(todo)
        self.display.say(f"sweep: {len(self.jobs)} trials" + (f", {old} of them finished before" if old else ""))
        _side_by_side(lambda job: self.points.stand(job.config, self.points.shared_by(job.config)), todo)
        if todo:
            self._try(todo)
        return self._end()

    def _check_data(self) -> None:
        """Every trial against the data that it stands on, before anything is scored."""
        seen: dict[Path, PreparedDataset] = {}
        for planned in self.planned:
            folder = self.points.ingested(planned.config).path
            data = seen.setdefault(folder, PreparedDataset(folder / "prepared"))
            checks.check_trial(space.said(planned.trial), planned.config, data)

    def _try(self, todo: Sequence[PlannedTrial]) -> None:
        """Run what is not finished; with asha the finished ones come first, to be compared with again."""
        asha = self.config.sweep.search == "asha"
        jobs = [*(job for job in self.jobs if asha and job not in todo), *todo]
        attempts = [Attempt(job.config, asha and job.trial.control is None, job not in todo) for job in jobs]
        with self.display.meter("sweep", len(todo), "trials") as meter:

            def done(number: int, last: Last | None, error: str | None) -> None:
                if jobs[number] in todo:
                    self._ended(jobs[number], last, error)
                    meter.advance(1, space.said(jobs[number].trial))

            self.trials.run(self.config, attempts, self.body, done)

    def so_far(self) -> pa.Table:
        """The table of all trials that ended so far."""
        ended = [(planned, found) for planned in self.planned if (found := self.ends[planned.folder]) is not None]
        keys = list(space.dimensions(self.config))
        return table.make([(p.trial, found) for p, found in ended], [last_name(p.folder) for p, _ in ended], keys)

    def publish(self, made: pa.Table) -> None:
        table.write(made, self.base / "sweep.parquet")

    def _ended(self, job: PlannedTrial, last: Last | None, error: str | None) -> None:
        """Others go on meanwhile, so nothing is waited for; what cannot be noted or read now is looked at in the end."""
        if error is not None:
            self.ends[job.folder] = Failure(error, passing=True)
        with contextlib.suppress(OSError, UserError):
            note(job.opened(hurry=True), last, error)
            self._look(job, hurry=True)
            self.publish(self.so_far())

    def _look(self, job: PlannedTrial, hurry: bool = False) -> None:
        found = job.outcome(self.config.sweep.search, hurry) or points.failure_of(job.opened())
        self.ends[job.folder] = found or self.ends[job.folder]

    def _end(self) -> pa.Table:
        for job in self.jobs:
            if self.ends[job.folder] is None:
                self._look(job)
            self.ends[job.folder] = self.ends[job.folder] or UNKNOWN
        made = self.so_far()
        summary.show(made, self.display.console)  # whatever the disk can still take
        self.publish(made)
        failed = [end for end in self.ends.values() if isinstance(end, Failure)]
        if len(failed) == len(self.jobs):
            raise UserError(f"none of the {len(failed)} trials succeeded; the first failed with: {failed[0].message}")
        if failed:
            self.display.say(f"  {len(failed)} of {len(self.jobs)} trials failed; the column error of "
                             f"{self.base.place('sweep.parquet')} says why, and the same command tries them again")  # fmt: skip
        page.write(self.base.path, made, self.config)
        self.display.say(f"  page: {self.base.place('sweep.html')}")
        self.display.say(f"  table: {self.base.place('sweep.parquet')}")
        if passing := [failure for failure in failed if failure.passing]:
            raise UserError(
                f"{len(passing)} of {len(self.jobs)} trials could not be carried out here, the first for: "
                f"{passing[0].message}. Mend that, and give the same command again; what is finished is kept"
            )
        return made


def _side_by_side(action: Callable[[PlannedTrial], T], jobs: Sequence[PlannedTrial]) -> list[T]:
    """On object storage each is some requests."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(action, jobs))
