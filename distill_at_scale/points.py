"""Points of sweeps and studies: a run folder each, standing on ingest and scores that are made once and shared.

    <run.dir>/shared/data-<id>/      ingest of one data configuration
    <run.dir>/shared/scores-<id>/    and its scores
    <run.dir>/points/<id>/           select, distill, evaluate; prepared/ and scores.parquet are links into shared/

The id of a folder covers what its stages depend on, so nothing is done twice, in one command or in the next. On object
storage each of these is a run folder with a copy of its own, and records say what a link would. Left out: which points are
tried (`sweep/`, `studies/`) and where (`cluster/`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from distill_at_scale import fingerprints
from distill_at_scale.bucket import is_remote
from distill_at_scale.config import Config, flatten, with_overrides
from distill_at_scale.data.prepared import Prepared
from distill_at_scale.data.storage import inside
from distill_at_scale.errors import UserError, is_passing
from distill_at_scale.evaluate import need_test_split
from distill_at_scale.execution import Executor, Local
from distill_at_scale.mirror import POINTS, SHARED
from distill_at_scale.pipeline import Pipeline
from distill_at_scale.progress import Display
from distill_at_scale.pruning import manifest
from distill_at_scale.records import digest
from distill_at_scale.rundir import RunDir, write_json
from distill_at_scale.stages import MakeObservers, nobody
from distill_at_scale.studies.base import Outcome, Point
from distill_at_scale.trials import Watch

OWN = ("select", "distill", "evaluate")  # the stages of a point
# sections that an id leaves out or takes apart
NOT_OF_POINTS = ("run", "data", "score", "cluster", "track", "sweep", "studies")
STOPPED, FAILED = "stopped.json", "failed.json"  # in a point's folder: given up by a scheduler, or ended by an error
PATIENCE = 20  # seconds in which the process of a killed sweep, which held a point's folder, is gone
MakeExecutor = Callable[[], Executor]


@dataclass(frozen=True)
class Failure:
    """Why a point has no outcome; a `passing` failure says something of the machines at work and nothing of the point."""

    message: str
    passing: bool


class Points:
    """Where the points of one base configuration lie, and what they share."""

    def __init__(self, config: Config, executor: MakeExecutor, display: Display):
        self.config, self.executor, self.display = config, executor, display
        self.root = root_of(config)
        self.ready: set[str] = set()  # shared folders that this command has made or looked through

    def configured(self, point: Point) -> Config:
        """The whole configuration of a point, with its run folder.

        Raises UserError for an override that is not allowed.
        """
        overrides = {"evaluate.control": "none", **point.overrides}
        config = with_overrides(self.config, overrides, "a point")
        seeds = {"distill.seed": config.distill_seed + point.seed, "select.seed": config.select_seed + point.seed}
        config = with_overrides(config, seeds)
        return with_overrides(config, {"run.dir": inside(self.root, f"{POINTS}/{self._id(config)}"), "run.reuse": None})

    def shared(self, overrides: Mapping[str, Any]) -> Path:
        """The run folder with ingest and scores of a configuration, made if need be."""
        return self.shared_by(with_overrides(self.config, overrides, "a point")).path

    def ingested(self, config: Config) -> RunDir:
        """The run folder with the prepared data of a configuration, made if need be."""
        data, _ = self._places(config)
        if data not in self.ready:
            self._pipeline(config, data).run(("ingest",))
            self.ready.add(data)
        return self._run(data)

    def shared_by(self, config: Config) -> RunDir:
        _, scores = self._places(config)
        run = self._run(scores)
        if scores not in self.ready:
            data = self.ingested(config)
            run.begin()
            if _differs(run, data, "ingest"):
                run.adopt(data, "ingest")
            self._pipeline(config, scores).run(("score",))
            self.ready.add(scores)
        return run

    def prepare(self, point: Point) -> RunDir:
        """A point's folder, standing on what it shares; ready for its own stages."""
        config = self.configured(point)
        return self.stand(config, self.shared_by(config))

    def take_over(self, run: RunDir) -> None:
        """Take the finished ingest and scores of a run of the base configuration, instead of making them again."""
        for folder, stages in zip(self._places(self.config), (("ingest",), ("ingest", "score")), strict=True):
            made = self._run(folder)
            made.begin()
            for stage in stages:
                if _differs(made, run, stage):
                    made.adopt(run, stage)

    def stand(self, config: Config, shared: RunDir) -> RunDir:
        run = RunDir.of(config.run)
        run.begin()
        for stage in ("ingest", "score"):
            if _differs(run, shared, stage):
                _forget(run)
                run.adopt(shared, stage)
        return run

    def _run(self, name: str) -> RunDir:
        own = {"dir": inside(self.root, name), "reuse": None}
        return RunDir.of(self.config.run.model_copy(update=own), self.display.say)

    def _places(self, config: Config) -> tuple[str, str]:
        """The names of the shared folders with ingest and with scores."""
        data = digest(fingerprints.data(config) | self._elsewhere(config))
        scores = digest({"data": data, **_flat(config, "score"), "seed": config.run.seed})
        return f"{SHARED}/data-{data[:16]}", f"{SHARED}/scores-{scores[:16]}"

    def _elsewhere(self, config: Config) -> dict[str, Any]:
        """Where data of a point lie, if not where those of the base do: fingerprints leave that out, for data that move."""
        ours, base = _flat(config, "data"), _flat(self.config, "data")
        keys = [f"data.{name}" for name in fingerprints.LEFT_OUT["data"]]
        return {f"at {key}": ours[key] for key in keys if ours[key] != base[key]}

    def _id(self, config: Config) -> str:
        sections = [name for name in type(config).model_fields if name not in NOT_OF_POINTS]
        values = {key: value for name in sections for key, value in _flat(config, name).items()}
        left = {"distill.workers", "distill.checkpoint_every", "distill.hold"}
        own = {key: value for key, value in values.items() if key not in left and not key.startswith("select.auto.")}
        return digest(own | {"shared": self._places(config)[1].rpartition("/")[2]})[:16]

    def _pipeline(self, config: Config, name: str) -> Pipeline:
        own = {
            "run.dir": inside(self.root, name),
            "run.reuse": self.config.run.reuse,
        }  # taken over where another run has made it
        config = with_overrides(config, own)
        return Pipeline(config, self.executor, self.display)


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
        for point, config in zip(points, configs, strict=True):
            if outcome_of(point, RunDir.of(config.run)) is None:
                todo.setdefault(config.run.dir, (config, named(point)))
        for point, config in zip(points, configs, strict=True):
            if config.run.dir in todo:
                need_test_split(Prepared(self.points.prepare(point) / "prepared"))
        if todo:
            with self.display.meter("points", len(todo), "points") as meter:
                for _ in self._try(list(todo.values())):
                    meter.advance()
        found = [outcome_of(point, RunDir.of(config.run)) for point, config in zip(points, configs, strict=True)]
        return [outcome for outcome in found if outcome is not None]

    def _try(self, todo: Sequence[tuple[Config, str]]) -> Iterator[None]:
        """Carry out prepared points; yields once for each when it is finished."""
        raise NotImplementedError


class LocalRunner(PointRunner):
    """Points one after the other in this process."""

    def __init__(self, config: Config, display: Display):
        super().__init__(config, Local, display)

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


def root_of(config: Config) -> str:
    """The address of the folder that holds the points of a configuration."""
    address = config.run.dir
    return address if is_remote(address) else str(Path(address.removeprefix("file://")).expanduser().resolve())


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
        carry_out(config, Local(device))
    except UserError as error:
        raise type(error)(f"{name}: {error}") from None


def carry_out(
    config: Config, executor: Executor, watch: Watch | None = None, observers: MakeObservers = nobody
) -> None:
    """The stages of a prepared point, each skipped where it is done, resumed where it was interrupted."""
    Pipeline(config, lambda: executor, Display.silent(), watch=watch, observers=observers).run(OWN)


def attempt(config: Config, executor: Executor, watch: Watch | None = None, observers: MakeObservers = nobody) -> None:
    """carry_out, but an error is noted in the point's folder instead of raised, so that other points go on."""
    run = RunDir.of(config.run)
    run.drop(FAILED)
    run.wait(PATIENCE)
    try:
        carry_out(config, executor, watch, observers)
        run.drop(STOPPED)
    except Exception as error:
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        note_failure(run, Failure(message, is_passing(error)))


def note_failure(run: RunDir, failure: Failure) -> None:
    write_json(run / FAILED, {"error": failure.message, "passing": failure.passing})
    run.keep(FAILED)


def note_stop(run: RunDir, step: int, top1: float) -> None:
    """A scheduler gave the point up after `step`, where an evaluation on the way had reached `top1` (a fraction)."""
    write_json(run / STOPPED, {"step": step, "top1": top1})
    run.keep(STOPPED)


def failure_of(run: RunDir) -> Failure | None:
    """Why the last attempt at a point failed; None where it did not. On object storage what was fetched last is looked at."""
    path = run / FAILED
    if not path.exists():
        return None
    noted = json.loads(path.read_text())
    return Failure(noted["error"], noted.get("passing", False))


def stopped_of(point: Point, run: RunDir, network: str) -> Outcome | None:
    """What is known of a point that a scheduler gave up: its last evaluation, of one `network`; None where none did."""
    path = run / STOPPED
    if not path.exists() or run.record("select") is None:
        return None
    noted, facts = json.loads(path.read_text()), manifest.facts(run / "manifest.parquet")
    rows = [{"set": "distilled", "network": network, "seed": 0, "top1": noted["top1"]}]
    return Outcome(
        point, rows, facts["kept"], facts["of"], facts["kept_per_class"], _seconds(run), run.path, noted["step"]
    )


def outcome_of(point: Point, run: RunDir) -> Outcome | None:
    """Read from a point's folder; None where it is not finished."""
    run.fetch()
    if run.record("evaluate") is None or _outdated(run):
        return None
    facts = manifest.facts(run / "manifest.parquet")
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    return Outcome(point, rows, facts["kept"], facts["of"], facts["kept_per_class"], _seconds(run), run.path)


def _seconds(run: RunDir) -> dict[str, float]:
    return {stage: record["seconds"] for stage in ("ingest", "score", *OWN) if (record := run.record(stage))}


def _outdated(run: RunDir) -> bool:
    """Whether what a point stands on was made anew since, as after a user removed its record; gone is not outdated."""
    for stage in ("ingest", "score"):
        shared = run.stood_on(stage)
        if shared.record(stage) is not None and _differs(run, shared, stage):
            return True
    return False


def _differs(run: RunDir, shared: RunDir, stage: str) -> bool:
    ours, theirs = run.record(stage), shared.record(stage)
    return ours is None or theirs is None or ours["output"] != theirs["output"]


def _forget(run: RunDir) -> None:
    """A point's own stages are to be done again."""
    for stage in OWN:
        run.drop(f"stages/{stage}.json")


def _flat(config: Config, section: str) -> dict[str, Any]:
    return flatten(getattr(config, section), f"{section}.")
