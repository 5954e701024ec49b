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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_at_scale.config.load import Config, flatten, with_overrides
from distill_at_scale.core.atomic_files import write_json
from distill_at_scale.core.errors import Busy, UserError, is_transient
from distill_at_scale.core.hashing import digest
from distill_at_scale.core.progress import Display
from distill_at_scale.data.prepared import manifest
from distill_at_scale.experiments.point import Outcome, Point
from distill_at_scale.experiments.trials import Watch
from distill_at_scale.pipeline import fingerprints
from distill_at_scale.pipeline.executors.base import Executor
from distill_at_scale.pipeline.pipeline import Pipeline
from distill_at_scale.pipeline.stages.stages import MakeObservers, nobody
from distill_at_scale.storage.filesystem import inside
from distill_at_scale.storage.run_dir import RunDir, address_of
from distill_at_scale.storage.sync import POINTS, SHARED
from distill_at_scale.storage.working_copy import NOTES

OWN = ("select", "distill", "evaluate")  # the stages of a point
# sections that an id leaves out or takes apart
NOT_OF_POINTS = ("run", "data", "score", "cluster", "track", "sweep", "studies")
STOPPED, FAILED = NOTES  # in a point's folder: given up by a scheduler, or ended by an error
OF_OUTCOMES = ("manifest.parquet", "evaluation.json")  # what an outcome is read from
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
        self.root = address_of(config.run)
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
            if _differs(run, data, "ingest") or not run.has("ingest"):
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
            if _differs(run, shared, stage) or not run.has(stage):
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
        """With run.reuse: what another run has made is taken over."""
        own = {"run.dir": inside(self.root, name), "run.reuse": self.config.run.reuse}
        config = with_overrides(config, own)
        return Pipeline(config, self.executor, self.display)


def carry_out(
    config: Config, executor: Executor, watch: Watch | None = None, observers: MakeObservers = nobody
) -> None:
    """The stages of a prepared point, each skipped where it is done, resumed where it was interrupted."""
    Pipeline(config, lambda: executor, Display.silent(), watch=watch, observers=observers).run(OWN)


def attempt(config: Config, executor: Executor, watch: Watch | None = None, observers: MakeObservers = nobody) -> None:
    """carry_out, but an error is noted in the point's folder instead of raised, so that other points go on.

    Raises Busy where another command has the folder, in which nothing is changed then, and whatever forbids to note an error.
    """
    run = RunDir.of(config.run)
    try:
        run.wait(PATIENCE)
        run.drop(FAILED)
        carry_out(config, executor, watch, observers)
        run.drop(STOPPED)
    except Busy:
        raise
    except Exception as error:
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        note_failure(run, Failure(message, is_transient(error)))


def note_failure(run: RunDir, failure: Failure) -> None:
    write_json(run / FAILED, {"error": failure.message, "passing": failure.passing})
    run.keep(FAILED)


def note_stop(run: RunDir, step: int, top1: float) -> None:
    """A scheduler gave the point up after `step`, where an evaluation on the way had reached `top1` (a fraction)."""
    write_json(run / STOPPED, {"step": step, "top1": top1})
    run.keep(STOPPED)


def failure_of(run: RunDir) -> Failure | None:
    """Why the last attempt at a point failed; None where it did not. On object storage what was fetched last is looked at."""
    noted = _noted(run, FAILED)
    if noted is None:
        return None
    damaged = f"{run.place(FAILED)} is damaged"
    return Failure(str(noted.get("error", damaged)), noted.get("passing", "error" not in noted) is True)


def stopped_of(point: Point, run: RunDir, network: str) -> Outcome | None:
    """What is known of a point that a scheduler gave up: its last evaluation, of one `network`; None where none did."""
    noted = _noted(run, STOPPED)
    if noted is None or not {"step", "top1"} <= set(noted) or run.record("select") is None:
        return None
    facts = manifest.facts(run / "manifest.parquet")
    rows = [{"set": "distilled", "network": network, "seed": 0, "top1": noted["top1"]}]
    return Outcome(
        point, rows, facts["kept"], facts["of"], facts["kept_per_class"], _seconds(run), run.path, noted["step"]
    )


def outcome_of(point: Point, run: RunDir, whole: bool = False) -> Outcome | None:
    """Read from a point's folder; None where it is not finished. With `whole`, all in its folder can be read then."""
    run.fetch(*(() if whole else OF_OUTCOMES))
    if run.record("evaluate") is None or _outdated(run):
        return None
    facts = manifest.facts(run / "manifest.parquet")
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    return Outcome(point, rows, facts["kept"], facts["of"], facts["kept_per_class"], _seconds(run), run.path)


def _noted(run: RunDir, name: str) -> dict[str, Any] | None:
    """What a note says; nothing where it is damaged."""
    try:
        found = json.loads((run / name).read_text())
        return found if isinstance(found, dict) else {}
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


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
    for name in (f"stages/{stage}.json" for stage in OWN):
        if (run / name).exists():
            run.drop(name)


def _flat(config: Config, section: str) -> dict[str, Any]:
    return flatten(getattr(config, section), f"{section}.")
