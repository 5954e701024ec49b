"""Trials on Ray Tune: several at a time, each of which distils on Ray Train and evaluates in Ray tasks.

A trial itself takes no cores, so that its workers find some. What is tried, and what is finished, is decided before: Tune
is given the numbers of the trials, and schedules them. With asha it also gives up those whose evaluations on the way lag
behind; finished trials then report theirs again, so that its comparison is whole after a restart. Tune itself stops none:
it would end the trial's process, while Ray Train's run in it would keep its cores. A trial asks, and ends its run itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends the command, which goes on when given again
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # a trial's files are our own
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the newer output has a table that verbose=0 does not silence
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # controls report nothing to the scheduler

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from distill_at_scale.cluster.actor_pool import check_gpus, cores
from distill_at_scale.cluster.executor import RayExecutor, absolute
from distill_at_scale.cluster.session import Session, pack, unpack
from distill_at_scale.cluster.train_group import release_all
from distill_at_scale.config.load import Config, with_overrides
from distill_at_scale.core.errors import Busy, TrialStopped, Unreachable, UserError
from distill_at_scale.distillation.engine import step_count
from distill_at_scale.experiments.trials import Attempt, Body, Done
from distill_at_scale.pipeline.executors.base import Executor
from distill_at_scale.storage.run_dir import RunDir, address_of

TIME, METRIC, ENDED, GIVEN_UP, BUSY = "evaluations", "top1", "ended", "given_up", "busy"  # keys of what a trial reports
NO_CORES: dict[str, float] = {
    "cpu": 0,
    "memory": 1,
}  # Ray refuses a request for nothing at all, so a trial asks for a byte


class TunedTrials:
    """One Ray for the whole command; executors made meanwhile find it and leave it."""

    def __init__(self, config: Config, say: Callable[[str], None]):
        self.config = config
        self.session = Session(config.cluster, say)
        for name in ("ray.tune", "ray.air"):
            logging.getLogger(name).setLevel(logging.CRITICAL)

    def executor(self) -> Executor:
        return RayExecutor(self.config, lambda text: None)

    def check(self, config: Config) -> None:
        check_gpus(config.cluster)
        concurrency(config)

    def run(self, config: Config, attempts: Sequence[Attempt], body: Body, done: Done) -> None:
        """Run `body` on each attempt that is not old; judged ones report to asha's scheduler, old ones what they saw before."""
        at_once = concurrency(config)
        every = [replace(attempt, config=_resolved(attempt.config)) for attempt in attempts]
        stops = f"given-up-{uuid.uuid4().hex}"
        keep = (
            ray.remote(_Stops).options(name=stops, num_cpus=0).remote() if config.sweep.search == "asha" else None
        )  # ends with this reference
        ended = _Ended(done, [attempt.config for attempt in every])
        own = tempfile.TemporaryDirectory(prefix="distill_at_scale-", ignore_cleanup_errors=True)
        tuner = tune.Tuner(
            _trainable(every, body, min(at_once, sum(not attempt.old for attempt in attempts)), stops),
            param_space={"number": tune.grid_search(list(range(len(attempts))))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=at_once,
                scheduler=scheduler(config, stops),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=own.name,  # of this machine alone, as trials store nothing there; the run's disk may be full
                failure_config=tune.FailureConfig(max_failures=config.cluster.max_failures),
                callbacks=[ended],
                verbose=0,
            ),
        )
        with own:
            try:
                tuner.fit()
            except Exception:
                if ended.count < len(attempts):
                    raise  # else it is about Tune's own notes, which nobody needs
        del keep

    def close(self) -> None:
        self.session.close()


def concurrency(config: Config) -> int:
    """Trials at a time: sweep.concurrent, else as many as the cluster's cores and GPUs hold.

    Raises UserError where the cluster cannot hold them.
    """
    workers, share, have = config.distill.min_workers, config.cluster.gpus_per_worker, cores()
    gpus = ray.cluster_resources().get("GPU", 0)
    room = min(have // workers, int(gpus / (workers * share)) if share else have)
    asked = config.sweep.concurrent or 1
    if asked > room and not config.cluster.grows:
        what = f"{gpus:g} GPUs" if have // workers >= asked else f"{have} cores"
        raise UserError(
            f"{asked} {'trial' if asked == 1 else 'trials'} at a time with distill.workers = {config.distill.workers} "
            f"{f'and cluster.gpus_per_worker = {share:g} ' if share else ''}do not fit on the cluster's {what}; "
            f"lower {'sweep.concurrent' if asked > 1 and room else 'distill.workers'}"
        )
    return config.sweep.concurrent or max(1, room)


class _Stops:
    """The trials that the scheduler gave up."""

    def __init__(self) -> None:
        self.numbers: set[int] = set()

    def add(self, number: int) -> None:
        self.numbers.add(number)

    def has(self, number: int) -> bool:
        return number in self.numbers


class _Asha(ASHAScheduler):
    """Says which trials to give up instead of stopping them; a trial goes on only after its report was judged."""

    def __init__(self, stops: str, **options: Any):
        super().__init__(TIME, METRIC, "max", **options)
        self.stops = stops

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if super().on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP:
            ray.get(ray.get_actor(self.stops).add.remote(trial.config["number"]))
        return TrialScheduler.CONTINUE


def scheduler(config: Config, stops: str) -> TrialScheduler:
    """asha: time is the number of an evaluation on the way; a trial that reaches the last one is never stopped."""
    if config.sweep.search != "asha":
        return FIFOScheduler()
    most = (step_count(config) - 1) // config.distill.evaluate_every
    return _Asha(
        stops, max_t=max(most, config.sweep.grace), grace_period=config.sweep.grace,
        reduction_factor=config.sweep.reduction, stop_last_trials=False,
    )  # fmt: skip


def _resolved(config: Config) -> Config:
    """Trials start in other folders."""
    return with_overrides(absolute(config), {"run.dir": address_of(config.run)})


def _trainable(attempts: Sequence[Attempt], body: Body, sharing: int, stops: str) -> Any:
    packed, here = ray.put([pack(attempt.config) for attempt in attempts]), os.getcwd()
    judged, old = [attempt.judged for attempt in attempts], [attempt.old for attempt in attempts]

    def trial(drawn: dict[str, Any]) -> dict[str, Any]:
        number = drawn["number"]
        with contextlib.suppress(OSError):  # Tune has moved to a folder of its own
            os.chdir(here)
        config = unpack(ray.get(packed)[number])
        asked = None if old[number] else stops
        reporter = _Reporter(config, number, asked) if judged[number] else None
        try:
            if reporter is not None:
                run = RunDir.of(config.run)
                run.fetch()
                reporter.again(run / "metrics.jsonl")
            if not old[number]:
                body(config, RayExecutor(config, lambda text: None, sharing), reporter)
        except TrialStopped:
            return {ENDED: True, GIVEN_UP: reporter.last if reporter else None}
        except Busy as error:
            return {ENDED: True, BUSY: str(error)}
        return {ENDED: True}

    return tune.with_resources(trial, NO_CORES)


class _Reporter:
    """Tells Tune of each evaluation on the way, once, and not of the one at the end.

    Raises GivenUp where the scheduler then gives the trial up; `stops` is the actor that knows, None for trials that ended.
    """

    def __init__(self, config: Config, number: int, stops: str | None):
        self.every, self.number, self.stops = config.distill.evaluate_every, number, stops
        self.step, self.last = 0, dict[str, Any]()

    def again(self, log: Path) -> None:
        """What an earlier command saw; the same steps would be evaluated alike again."""
        for text in log.read_text().splitlines() if log.exists() else ():
            with contextlib.suppress(ValueError):
                self(json.loads(text))

    def __call__(self, line: dict[str, Any]) -> None:
        if METRIC in line and self.step < line["step"] < line["of"]:
            self.step = line["step"]
            self.last = {METRIC: line[METRIC], "step": self.step}
            tune.report({TIME: self.step // self.every, **self.last})
            if self.stops and ray.get(ray.get_actor(self.stops).has.remote(self.number)):
                raise TrialStopped


class _Ended(tune.Callback):
    """In the driver: how trials ended."""

    def __init__(self, done: Done, configs: Sequence[Config]):
        self.done, self.configs, self.count = done, configs, 0

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps a copy of its callbacks; ours belongs to this process."""
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.count += 1
        last = trial.last_result or {}
        self.done(trial.config["number"], last.get(GIVEN_UP), last.get(BUSY))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.count += 1
        with contextlib.suppress(Unreachable):  # its process is gone, and may have left its workers' cores
            release_all(self.configs[trial.config["number"]])
        lines = str(trial.get_error() or "").strip().splitlines()
        self.done(trial.config["number"], None, lines[-1] if lines else "its process was lost")
