"""What tries the points of studies: finished ones are read, the others are prepared and then tried, here or in warm actors.

Left out: what a point is and where it lies (`experiments/points.py`), and trials of a sweep (`experiments/trials.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.progress import Display
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation.evaluate import need_test_split
from distill_at_scale.experiments.point import Outcome, Point
from distill_at_scale.experiments.points import MakeExecutor, Points, carry_out, outcome_of
from distill_at_scale.pipeline.executors.base import Executor
from distill_at_scale.pipeline.executors.local import LocalExecutor
from distill_at_scale.storage.run_dir import RunDir
from distill_at_scale.storage.sync import AT_ONCE


class WarmActors(Protocol):
    """What `cluster.warm.WarmPool` offers."""

    def map(
        self, function: Callable[..., Any], arguments: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None
    ) -> Iterator[tuple[int, Any]]: ...

    def executor(self) -> Executor: ...


class PointRunner:
    """What runners share: finished points are read, the others are prepared and then tried."""

    def __init__(self, config: Config, executor: MakeExecutor, display: Display):
        self.points, self.display = Points(config, executor, display), display

    def configured(self, point: Point) -> Config:
        return self.points.configured(point)

    def shared(self, overrides: Mapping[str, Any]) -> Path:
        return self.points.shared(overrides)

    def run(self, points: Sequence[Point]) -> list[Outcome]:
        configs = [self.points.configured(point) for point in points]  # all, before anything starts
        todo: dict[str, tuple[Config, str]] = {}
        for point, config, found in zip(points, configs, outcomes(points, configs), strict=True):
            if found is None:
                todo.setdefault(config.run.dir, (config, named(point)))
        for point, config in zip(points, configs, strict=True):
            if config.run.dir in todo:
                need_test_split(PreparedDataset(self.points.prepare(point) / "prepared"))
        if todo:
            with self.display.meter("points", len(todo), "points") as meter:
                for _ in self._try(list(todo.values())):
                    meter.advance()
        return [outcome for outcome in outcomes(points, configs, whole=True) if outcome is not None]

    def _try(self, todo: Sequence[tuple[Config, str]]) -> Iterator[None]:
        """Carry out prepared points; yields once for each when it is finished."""
        raise NotImplementedError


class LocalRunner(PointRunner):
    """Points one after the other in this process."""

    def __init__(self, config: Config, display: Display):
        super().__init__(config, LocalExecutor, display)

    def _try(self, todo: Sequence[tuple[Config, str]]) -> Iterator[None]:
        for config, name in todo:
            try_out(config.model_dump(), name)
            yield


class PooledRunner(PointRunner):
    """Points side by side in warm actors; what they share is made by the ordinary executor before."""

    def __init__(self, config: Config, display: Display, pool: WarmActors):
        super().__init__(config, pool.executor, display)
        self.pool = pool

    def _try(self, todo: Sequence[tuple[Config, str]]) -> Iterator[None]:
        arguments = [{"values": config.model_dump(), "name": name} for config, name in todo]
        for _ in self.pool.map(try_out, arguments, [name for _, name in todo]):
            yield


def outcomes(points: Sequence[Point], configs: Sequence[Config], whole: bool = False) -> list[Outcome | None]:
    """`outcome_of` for each, several at a time: on object storage every one is a few requests."""
    runs = [RunDir.of(config.run) for config in configs]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(outcome_of, points, runs, [whole] * len(points)))


def named(point: Point) -> str:
    """A point in messages."""
    changed = " ".join(f"{key}={value}" for key, value in point.overrides.items())
    return f"the point [{changed}], repetition {point.seed}"


def try_out(values: dict[str, Any], name: str) -> None:
    """Carry out a prepared point, here and now; `values` is its configuration, plain, so that it can be sent to an actor.

    Raises UserError (or the kind of it that was raised) with the point's name before the message.
    """
    config = Config.model_validate(values)
    wanted = config.cluster.address == "none" or config.cluster.gpus_per_worker
    device = torch.device("cuda" if wanted and torch.cuda.is_available() else "cpu")
    try:
        carry_out(config, LocalExecutor(device))
    except UserError as error:
        raise type(error)(f"{name}: {error}") from None
