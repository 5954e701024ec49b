"""The executor that runs all work in this process, on a GPU if there is one. It never imports Ray.

Threads: short units have one thread, as on a cluster. Long units share the cores like the tasks of a cluster of this
machine's size: the number of threads decides the last bits of a network's weights, so it follows from the number of cores and
of all units alone, never from other load. Load decides how many units run side by side (`helpers.py`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

from distill_at_scale.config.load import Config
from distill_at_scale.core.environment import usable_cores
from distill_at_scale.core.events import Emit, Event, TimeSpent, discard
from distill_at_scale.pipeline.executors.base import Group, Poll, Result, Task, Worker, no_poll
from distill_at_scale.pipeline.executors.helpers import Helpers, Say
from distill_at_scale.pipeline.executors.tasks import threads
from distill_at_scale.pipeline.monitoring.observers import Observer

POLL = 0.5  # seconds


class LocalExecutor:
    def __init__(self, device: torch.device | None = None, say: Say = lambda text: None) -> None:
        self.device, self.say = device or torch.device("cuda" if torch.cuda.is_available() else "cpu"), say
        self.emit: Emit = discard

    def observers(self, config: Config) -> list[Observer]:
        return []

    def run(self, task: Task, done: Callable[[Result], None], poll: Poll = no_poll) -> None:
        if not task.units:
            return
        if task.worker.long:
            self._run_long(task, done, poll)
            return
        # one thread where actors of a cluster have one, so that the results are the same bytes
        with threads(1 if task.worker.uses_torch else torch.get_num_threads()):
            spent = TimeSpent()
            worker = task.worker(task.config, task.paths, self.device, spent)
            began = time.time()
            for result in worker.run(task.units):
                self._emit(worker, result, began, spent)
                done(result)
                began = time.time()

    def _run_long(self, task: Task, done: Callable[[Result], None], poll: Poll) -> None:
        cores = local_cores()
        each = threads_each(max(task.total, len(task.units)), cores)
        pending, most = deque(task.units), min(len(task.units), cores // each) - 1
        helpers = None
        if most and self.device.type == "cpu":
            helpers = Helpers(task, pending, most, each, cores, self.say)

        def look() -> bool:
            if helpers is not None:
                helpers.collect(done, self.emit)
            return poll()

        try:
            with threads(each):
                spent = TimeSpent()
                worker = task.worker(task.config, task.paths, self.device, spent)
                worker.poll = look
                while pending or (helpers is not None and helpers.working):
                    began = time.time()
                    try:
                        unit = pending.popleft()
                    except IndexError:  # helpers have the rest
                        time.sleep(POLL)
                        look()
                        continue
                    for result in worker.run([unit]):
                        self._emit(worker, result, began, spent)
                        done(result)
                    if helpers is not None:
                        helpers.finished += 1
                if helpers is not None:
                    helpers.collect(done, self.emit)
        finally:
            if helpers is not None:
                helpers.close()

    def _emit(self, worker: Worker, result: Result, began: float, spent: TimeSpent) -> None:
        values = {**worker.counts(result), **spent.delta()}
        self.emit(Event("work", worker.event, began, time.time(), values=values))

    def train(self, group: Group) -> None:
        with threads(local_cores()):
            group.body(group.config, group.paths, self.device, group.report or (lambda line: None))

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass


def local_cores() -> int:
    """The cores that this process uses: torch's number of threads (OMP_NUM_THREADS), at most the cores that it may use."""
    return min(torch.get_num_threads(), usable_cores())


def threads_each(units: int, cores: int) -> int:
    """The threads of one of `units` long units, as on a cluster of one node with these cores."""
    return max(1, cores // min(max(1, units), cores))
