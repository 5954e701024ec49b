"""The executor that spreads each stage's work over a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from distill_at_scale.cluster import actor_pool, tasks, warm_group
from distill_at_scale.cluster.actor_pool import ActorPool
from distill_at_scale.cluster.pending_resources import watched
from distill_at_scale.cluster.prometheus import PrometheusMetrics
from distill_at_scale.cluster.session import connected
from distill_at_scale.config.load import Config
from distill_at_scale.core.atomic_files import resolve_parent
from distill_at_scale.core.events import Emit, discard
from distill_at_scale.pipeline.executors.base import Group, Poll, Result, Task, no_poll
from distill_at_scale.pipeline.monitoring.observers import Observer
from distill_at_scale.storage.filesystem import is_uri, last_name


class RayExecutor:
    def __init__(self, config: Config, say: Callable[[str], None], sharing: int = 1):
        """Connects to the cluster that the configuration names; `sharing` executors use it at the same time.

        Raises UserError where it cannot be reached, or where no node has the GPUs of one worker.
        """
        self.session, self.say, self.sharing = connected(config.cluster, say), say, sharing
        try:
            actor_pool.check_gpus(config.cluster)
        except BaseException:
            self.session.close()
            raise
        self.emit: Emit = discard
        self._warm = ActorPool()  # on a Ray that this executor alone uses, the actors stay from one stage to the next

    def observers(self, config: Config) -> list[Observer]:
        return [PrometheusMetrics(last_name(config.run.dir))]

    def run(self, task: Task, done: Callable[[Result], None], poll: Poll = no_poll) -> None:
        if not task.units:
            return
        paths = {name: resolve_parent(path) for name, path in task.paths.items()}
        units = [unit.at(resolve_parent) for unit in task.units]
        task = replace(task, config=absolute(task.config), paths=paths, units=units)
        with watched(task.worker.name, self.say) as progressed:

            def finished(result: Result) -> None:
                progressed()
                done(result)

            if self.session.local:
                self._run_warm(task, finished, _watched(poll, progressed))
            elif task.worker.long:
                tasks.run(task, finished, _watched(poll, progressed), self.sharing, self.emit)
            else:
                from distill_at_scale.cluster import data_pool  # takes seconds

                data_pool.run(task, finished, self.sharing, self.emit, self.say)

    def _run_warm(self, task: Task, done: Callable[[Result], None], poll: Poll) -> None:
        """Run units on the actors that stay. A long unit has several threads; fewer actors work then."""
        if self._warm.gpus != task.gpus:
            self.release()
            self._warm = ActorPool(task.gpus)
        most, threads = min(actor_pool.actor_count(task.config, task.gpus), actor_pool.places(task.gpus)), 1
        if task.worker.long:
            threads = actor_pool.cores_each(min(task.total, actor_pool.cores()))
            most = min(actor_pool.places(task.gpus), actor_pool.cores() // threads)
        self._warm.run(task, most, done, self.emit, self.say, poll, threads)

    def train(self, group: Group) -> None:
        with watched(group.stage, self.say) as progressed:
            paths = {name: resolve_parent(path) for name, path in group.paths.items()}
            work, poll = resolve_parent(group.work), _watched(group.poll, progressed)
            group = replace(group, config=absolute(group.config), paths=paths, work=work, poll=poll)
            workers, on_cpus = group.workers, not group.config.cluster.gpus_per_worker
            if self.session.local and on_cpus and isinstance(workers, int) and workers <= actor_pool.cores():
                warm_group.run(group, self._warm, actor_pool.cores_each(workers), self.say)
                return
            from distill_at_scale.cluster import train_group  # takes seconds

            self.release()
            train_group.run(group, self.sharing, self.say)

    def release(self) -> None:
        """End the actors, so that other work finds free cores."""
        self._warm.close()

    def close(self) -> None:
        self.release()
        self.session.close()


def _watched(poll: Poll, progressed: Callable[[], None]) -> Poll:
    def watched_poll() -> bool:
        if progress := poll():
            progressed()
        return progress

    return watched_poll


def absolute(config: Config) -> Config:
    """A configuration with absolute paths of data and weights, as workers may start in another folder."""
    data, score, sections = config.data, config.score, {}
    paths = {key: _absolute(value) for key in ("path", "class_names") if (value := getattr(data, key)) is not None}
    files = [_absolute(name) if Path(name).expanduser().is_file() else name for name in score.weight_names]
    for name in ("sre2l", "rded"):
        method = getattr(config.distill, name)
        if method.teacher_weights is not None and Path(method.teacher_weights).expanduser().is_file():
            sections[name] = method.model_copy(update={"teacher_weights": _absolute(method.teacher_weights)})
    data, score = data.model_copy(update=paths), score.model_copy(update={"weights": files or None})
    distill = config.distill.model_copy(update=sections)
    return config.model_copy(update={"data": data, "score": score, "distill": distill})


def _absolute(path: str) -> str:
    """Links are not resolved: the name of a file can say what it is."""
    return path if is_uri(path) else os.path.abspath(os.path.expanduser(path))
