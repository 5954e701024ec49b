"""Runs points in warm Ray actors: many short distillations without a process start each.

An actor has one thread and one core (or a worker's GPU share). Actors start when a point needs them, stay for the whole
command, and release their cores while the ordinary executor uses the same Ray. The runner replaces a lost actor and repeats its
point, at most `cluster.max_failures` times.
"""

from __future__ import annotations

import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import ray
import ray.exceptions

from distill_at_scale.cluster.actor_pool import LOST, actor_count, check_gpus, device
from distill_at_scale.cluster.executor import RayExecutor
from distill_at_scale.cluster.session import Session, root_cause
from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError
from distill_at_scale.experiments.runners import Body, Done, PointTask
from distill_at_scale.pipeline.executors.local import LocalExecutor


class ActorRunner:
    """A `PointRunner` that connects to Ray when it is first used."""

    def __init__(self, config: Config, say: Callable[[str], None]):
        self.config, self.say = config, say
        self._session: Session | None = None
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[int, Any]] = {}  # reference of the result -> index of the task, actor

    def check(self) -> None:
        """Connect, once. Raises UserError where Ray cannot be reached or no node has the GPUs of an actor."""
        if self._session is None:
            self._session = Session(self.config.cluster, self.say)
            check_gpus(self.config.cluster)
            self._size = actor_count(self.config, self.config.cluster.gpus_per_worker)

    def at_once(self) -> int:
        self.check()
        return self._size

    def run(self, tasks: Sequence[PointTask], body: Body, done: Done) -> None:
        self.check()
        waiting, losses = deque(index for index, task in enumerate(tasks) if not task.finished), Counter[int]()
        try:
            for index, task in enumerate(tasks):
                if task.finished:
                    done(index, None, None)
            while waiting or self._busy:
                while waiting and (actor := self._free_actor()):
                    index = waiting.popleft()
                    self._busy[actor.run.remote(tasks[index].config.model_dump(), body)] = (index, actor)
                ready, _ = ray.wait(list(self._busy))
                index, actor = self._busy.pop(ready[0])
                failure: Exception | None = None
                try:
                    ray.get(ready[0])
                    self._idle.append(actor)
                except LOST as error:
                    losses[index] += 1
                    if losses[index] <= self.config.cluster.max_failures:
                        waiting.appendleft(index)
                        continue
                    failure = UserError(
                        f"{tasks[index].name}: its worker was lost {losses[index]} times ({str(error).splitlines()[0]}). "
                        "Finished points are kept: give the same command again, with fewer cluster.actors if the workers "
                        "ran out of memory"
                    )
                except ray.exceptions.RayTaskError as error:
                    self._idle.append(actor)
                    cause = root_cause(error)
                    failure = cause if isinstance(cause, UserError | OSError) else error
                done(index, None, failure)
        finally:
            for _, actor in self._busy.values():
                ray.kill(actor)
            self._busy.clear()

    def executor(self) -> RayExecutor:
        """The ordinary executor on the same Ray; ends the actors, and the next `run` starts new ones."""
        self.check()
        self._kill_idle()
        return RayExecutor(self.config, self.say)

    def close(self) -> None:
        """End the actors, and Ray if this runner started it."""
        if self._session is not None:
            self._kill_idle()
            self._session.close()
            self._session = None

    def _free_actor(self) -> Any:
        """An idle actor, a new one while there is room, else None."""
        if self._idle:
            return self._idle.pop()
        if len(self._busy) >= self._size:
            return None
        gpus = self.config.cluster.gpus_per_worker
        # this runner restarts and retries, not Ray, so that it can count the losses
        actor: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, max_task_retries=0)(_PointActor)
        return actor.remote([entry or os.getcwd() for entry in sys.path])

    def _kill_idle(self) -> None:
        for actor in self._idle:
            ray.kill(actor)
        self._idle.clear()


class _PointActor:
    def __init__(self, path: list[str]):
        """`path` is the driver's sys.path; it is searched after the worker's own."""
        import torch

        sys.path.extend(entry for entry in path if entry not in sys.path)
        torch.set_num_threads(1)

    def run(self, values: dict[str, Any], body: Body) -> None:
        config = Config.model_validate(values)
        body(config, LocalExecutor(device(config)), None)
