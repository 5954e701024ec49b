"""Runs points as Ray Tune trials: several at a time, each distilling on Ray Train and evaluating in Ray tasks.

A trial itself takes no cores; its workers take them. Tune only receives the indices of the tasks and schedules them. With asha
it also judges trials by their evaluations during distillation; finished trials report theirs again, so that the comparison
is complete after a restart. Tune never stops a trial itself: that would end the trial's process while its Ray Train run kept
the cores. Instead a trial asks whether it is stopped, and ends its own run.
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
from typing import Any

os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends the command; the same command resumes
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # trials write their own files
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # verbose=0 does not silence the table of the newer output
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # controls report no metric

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
from distill_at_scale.experiments.runners import Body, Done, PointTask
from distill_at_scale.pipeline.executors.base import Executor
from distill_at_scale.storage.run_dir import RunDir, address_of

TIME, METRIC, ENDED, STOPPED, BUSY = "evaluations", "top1", "ended", "stopped", "busy"  # keys of a trial's reports
# Ray refuses a request for nothing, so a trial requests one byte
NO_CORES: dict[str, float] = {"cpu": 0, "memory": 1}


class TuneRunner:
    """A `PointRunner` that holds one Ray session for the whole command; its executors join that session."""

    def __init__(self, config: Config, say: Callable[[str], None]):
        self.config = config
        self.session = Session(config.cluster, say)
        for name in ("ray.tune", "ray.air"):
            logging.getLogger(name).setLevel(logging.CRITICAL)

    def executor(self) -> Executor:
        return RayExecutor(self.config, lambda text: None)

    def check(self) -> None:
        check_gpus(self.config.cluster)
        concurrency(self.config)

    def at_once(self) -> int:
        return concurrency(self.config)

    def run(self, tasks: Sequence[PointTask], body: Body, done: Done) -> None:
        config, at_once = self.config, self.at_once()
        # trials start in other folders, so paths become absolute
        configs = [with_overrides(absolute(one.config), {"run.dir": address_of(one.config.run)}) for one in tasks]
        tasks = [replace(task, config=one) for task, one in zip(tasks, configs, strict=True)]
        registry = f"stopped-trials-{uuid.uuid4().hex}"
        stopped: Any = None  # the actor lives as long as this reference
        if config.sweep.search == "asha":
            stopped = ray.remote(_StoppedTrials).options(name=registry, num_cpus=0).remote()
        callback = _DoneCallback(done, configs)
        trial = _trainable(tasks, body, min(at_once, sum(not task.finished for task in tasks)), registry)
        tune_config = tune.TuneConfig(
            max_concurrent_trials=at_once, scheduler=scheduler(config, registry), reuse_actors=True
        )
        failures = tune.FailureConfig(max_failures=config.cluster.max_failures)
        # Tune's files stay on this machine: trials store nothing there, and the run's disk may be full
        with tempfile.TemporaryDirectory(prefix="distill_at_scale-", ignore_cleanup_errors=True) as folder:
            run_config = tune.RunConfig(
                name="trials", storage_path=folder, failure_config=failures, callbacks=[callback], verbose=0
            )
            param_space = {"index": tune.grid_search(list(range(len(tasks))))}
            tuner = tune.Tuner(trial, param_space=param_space, tune_config=tune_config, run_config=run_config)
            try:
                tuner.fit()
            except Exception:
                if callback.count < len(tasks):
                    raise  # otherwise only Tune's own files failed, after the last trial
        del stopped

    def close(self) -> None:
        self.session.close()


def concurrency(config: Config) -> int:
    """Trials at a time: sweep.concurrent, else as many as the cluster's cores and GPUs hold.

    Raises UserError where the cluster cannot hold sweep.concurrent trials, or a single one.
    """
    workers, share, have = config.distill.min_workers, config.cluster.gpus_per_worker, cores()
    gpus = ray.cluster_resources().get("GPU", 0)
    room = min(have // workers, int(gpus / (workers * share)) if share else have)
    wanted = config.sweep.concurrent or 1
    if wanted > room and not config.cluster.grows:
        what = f"{gpus:g} GPUs" if have // workers >= wanted else f"{have} cores"
        raise UserError(
            f"{wanted} {'trial' if wanted == 1 else 'trials'} at a time with distill.workers = {config.distill.workers} "
            f"{f'and cluster.gpus_per_worker = {share:g} ' if share else ''}do not fit on the cluster's {what}; "
            f"lower {'sweep.concurrent' if wanted > 1 and room else 'distill.workers'}"
        )
    return config.sweep.concurrent or max(1, room)


class _StoppedTrials:
    """Actor with the indices of the trials that the scheduler stopped."""

    def __init__(self) -> None:
        self.indices: set[int] = set()

    def add(self, index: int) -> None:
        self.indices.add(index)

    def has(self, index: int) -> bool:
        return index in self.indices


class _Asha(ASHAScheduler):
    """Registers the trials to stop instead of stopping them; a trial continues only after its report was judged."""

    def __init__(self, registry: str, **options: Any):
        super().__init__(TIME, METRIC, "max", **options)
        self.registry = registry

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if super().on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP:
            ray.get(ray.get_actor(self.registry).add.remote(trial.config["index"]))
        return TrialScheduler.CONTINUE


def scheduler(config: Config, registry: str) -> TrialScheduler:
    """asha, whose time is the number of an evaluation; it never stops a trial at its last evaluation. FIFO otherwise."""
    if config.sweep.search != "asha":
        return FIFOScheduler()
    most = (step_count(config) - 1) // config.distill.evaluate_every
    grace, factor = config.sweep.grace, config.sweep.reduction
    return _Asha(registry, max_t=max(most, grace), grace_period=grace, reduction_factor=factor, stop_last_trials=False)


def _trainable(tasks: Sequence[PointTask], body: Body, sharing: int, registry: str) -> Any:
    packed, here = ray.put([pack(task.config) for task in tasks]), os.getcwd()
    judged, finished = [task.judged for task in tasks], [task.finished for task in tasks]

    def trial(params: dict[str, Any]) -> dict[str, Any]:
        index = params["index"]
        with contextlib.suppress(OSError):  # Tune changed to a folder of its own
            os.chdir(here)
        config = unpack(ray.get(packed)[index])
        reporter = _Reporter(config, index, None if finished[index] else registry) if judged[index] else None
        try:
            if reporter is not None:  # report what an earlier command evaluated: the same steps give the same results
                run = RunDir.of(config.run)
                run.fetch()
                log = run / "metrics.jsonl"
                for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
                    with contextlib.suppress(ValueError):
                        reporter(json.loads(line))
            if not finished[index]:
                body(config, RayExecutor(config, lambda text: None, sharing), reporter)
        except TrialStopped:
            return {ENDED: True, STOPPED: reporter.last if reporter else None}
        except Busy as error:
            return {ENDED: True, BUSY: str(error)}
        return {ENDED: True}

    return tune.with_resources(trial, NO_CORES)


class _Reporter:
    """Reports each evaluation during distillation to Tune once, but not the final one.

    Raises TrialStopped where the scheduler stopped the trial. `registry` names the actor that knows; None for a finished trial.
    """

    def __init__(self, config: Config, index: int, registry: str | None):
        self.interval, self.index, self.registry = config.distill.evaluate_every, index, registry
        self.step, self.last = 0, dict[str, Any]()

    def __call__(self, line: dict[str, Any]) -> None:
        if METRIC in line and self.step < line["step"] < line["of"]:
            self.step = line["step"]
            self.last = {METRIC: line[METRIC], "step": self.step}
            tune.report({TIME: self.step // self.interval, **self.last})
            if self.registry and ray.get(ray.get_actor(self.registry).has.remote(self.index)):
                raise TrialStopped


class _DoneCallback(tune.Callback):
    """Calls `done` in the driver for each trial that ends."""

    def __init__(self, done: Done, configs: Sequence[Config]):
        self.done, self.configs, self.count = done, configs, 0

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks; the state of this one belongs to this process."""
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.count += 1
        result = trial.last_result or {}
        self.done(trial.config["index"], result.get(STOPPED), Busy(result[BUSY]) if result.get(BUSY) else None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.count += 1
        with contextlib.suppress(Unreachable):  # the process is gone, and may have left its workers' cores allocated
            release_all(self.configs[trial.config["index"]])
        lines = str(trial.get_error() or "").strip().splitlines()
        self.done(trial.config["index"], None, UserError(lines[-1] if lines else "its process was lost"))
