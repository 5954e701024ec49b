"""The executor that runs all work in this process, on a GPU if there is one. It never imports Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from distill_at_scale.config.load import Config
from distill_at_scale.core.events import Emit, Event, TimeSpent, discard
from distill_at_scale.pipeline.executors.base import Group, Poll, Result, Task, no_poll
from distill_at_scale.pipeline.executors.tasks import threads
from distill_at_scale.pipeline.monitoring.observers import Observer


class LocalExecutor:
    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.emit: Emit = discard

    def observers(self, config: Config) -> list[Observer]:
        return []

    def run(self, task: Task, done: Callable[[Result], None], poll: Poll = no_poll) -> None:
        if not task.units:
            return
        kind = task.worker
        # one thread where actors of a cluster have one, so that the results are the same bytes
        with threads(1) if kind.uses_torch and not kind.long else nullcontext():
            spent = TimeSpent()
            worker = kind(task.config, task.paths, self.device, spent)
            worker.poll = poll
            began = time.time()
            for result in worker.run(task.units):
                values = {**worker.counts(result), **spent.delta()}
                self.emit(Event("work", worker.event, began, time.time(), values=values))
                done(result)
                began = time.time()

    def train(self, group: Group) -> None:
        group.body(group.config, group.paths, self.device, group.report or (lambda line: None))

    def close(self) -> None:
        pass
