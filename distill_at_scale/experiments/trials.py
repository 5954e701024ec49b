"""Trials of a sweep: the contract of what runs several of them, and the one that takes them in turn in this process.

`cluster/tune_trials.py` has the other one, on Ray Tune. Left out: what a trial is (`experiments/points.py`), and which are tried (`sweep/`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from distill_at_scale.config.load import Config
from distill_at_scale.pipeline.executors.base import Executor
from distill_at_scale.pipeline.executors.local import LocalExecutor

Watch = Callable[[dict[str, Any]], None]  # takes every line of a distillation's log as it is written
Body = Callable[[Config, Executor, Watch | None], None]  # runs one trial
Last = Mapping[str, Any]  # step and top1 of an evaluation on the way


@dataclass(frozen=True)
class Attempt:
    """A trial to run, by its whole configuration.

    One that is `judged` may be given up by the scheduler of sweep.search = asha; an `old` one ended before, and only shows
    it its evaluations again.
    """

    config: Config
    judged: bool = False
    old: bool = False


class Done(Protocol):
    """Is told how an attempt ended."""

    def __call__(self, number: int, last: Last | None, error: str | None, /) -> None:
        """`last` is its last evaluation, where it was given up; `error` says why its process was lost, or could not
        work in the trial's folder."""


class TrialRunner(Protocol):
    """Where trials run."""

    def executor(self) -> Executor:
        """For what they share; others may be at work when it is made, and it leaves the cluster as it is."""

    def check(self, config: Config) -> None:
        """Raises UserError where more trials are wanted at a time than there is room for."""

    def run(self, config: Config, attempts: Sequence[Attempt], body: Body, done: Done) -> None:
        """Run `body` on every attempt that is not old; one that fails or is lost does not end the others."""

    def close(self) -> None:
        """Give back what is held."""


class OneByOne:
    """In this process, in turn; nothing is judged."""

    def executor(self) -> Executor:
        return LocalExecutor()

    def check(self, config: Config) -> None:
        pass

    def run(self, config: Config, attempts: Sequence[Attempt], body: Body, done: Done) -> None:
        for number, attempt in enumerate(attempts):
            if not attempt.old:
                try:
                    body(attempt.config, self.executor(), None)
                except Exception as error:
                    done(number, None, str(error))
                    continue
            done(number, None, None)

    def close(self) -> None:
        pass
