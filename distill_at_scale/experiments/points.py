"""A set of points: one run folder for each, on top of ingest and scores that points share.

    <run.dir>/shared/data-<id>/      ingest of one data configuration
    <run.dir>/shared/scores-<id>/    its scores
    <run.dir>/points/<id>/           select, distill, evaluate; prepared/ and scores.parquet are links into shared/

The id of a folder covers everything its stages depend on, so no stage runs twice, neither in one command nor in the next. On
object storage each is a run folder of its own, and records take the place of links. Where points run: `runners.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_at_scale.config.fields import changes_results, result_values
from distill_at_scale.config.load import Config, with_overrides
from distill_at_scale.core.atomic_files import write_json
from distill_at_scale.core.errors import Busy, UserError, is_transient
from distill_at_scale.core.hashing import digest
from distill_at_scale.core.progress import Display
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation.evaluate import require_samples_to_test
from distill_at_scale.experiments.point import Outcome, Point
from distill_at_scale.experiments.runners import LastEvaluation, PointRunner, PointTask, Watch
from distill_at_scale.models.precision import resolved
from distill_at_scale.pipeline.executors.base import Executor
from distill_at_scale.pipeline.pipeline import Pipeline
from distill_at_scale.pipeline.stages import ingest
from distill_at_scale.pipeline.stages.context import MakeObservers, no_observers
from distill_at_scale.storage.filesystem import child_address
from distill_at_scale.storage.run_dir import RunDir, address_of
from distill_at_scale.storage.sync import AT_ONCE, POINTS, SHARED
from distill_at_scale.storage.working_copy import NOTES

OWN = ("select", "distill", "evaluate")  # the stages of a point
# sections that an id does not cover, or covers only in part
POINT_SECTIONS = ("select", "distill", "runtime", "evaluate")
# keys that are newer than the ids of existing folders and never change what a point computes (it has no controls of its own)
NOT_IN_IDS = ("evaluate.controls", "score.check_weights", "score.preset")
STOPPED, FAILED = NOTES  # notes in a point's folder: stopped by a scheduler, or ended by an error
OF_OUTCOMES = ("manifest.parquet", "evaluation.json")  # the files of an outcome
PATIENCE = 20  # seconds until the process of a killed sweep releases a point's folder


@dataclass(frozen=True)
class Failure:
    """Why a point has no outcome; a `transient` failure is about the machines, not the point, so a retry may succeed."""

    message: str
    transient: bool


class PointSet:
    """The points of one base configuration: their folders, what they share, and their outcomes."""

    def __init__(self, config: Config, runner: PointRunner, display: Display):
        self.config, self.runner, self.display = resolved(config), runner, display
        self.root = address_of(config.run)
        self.ready: set[str] = set()  # shared folders that this command has completed or verified

    def configured(self, point: Point) -> Config:
        """The complete configuration of a point, with its run folder.

        Raises UserError for an override that is not allowed.
        """
        overrides = {"evaluate.control": "none", "evaluate.controls": [], **point.overrides}
        config = with_overrides(self.config, overrides, "a point")
        seeds = {"distill.seed": config.distill_seed + point.seed, "select.seed": config.select_seed + point.seed}
        config = with_overrides(config, seeds)
        # a scheduler may stop a trial at an evaluation on the way, so evaluate_every counts too
        values: dict[str, Any] = {"distill.evaluate_every": config.distill.evaluate_every}
        for name in POINT_SECTIONS:
            values = result_values(getattr(config, name), f"{name}.", unused=True) | values
        values = {key: value for key, value in values.items() if key not in NOT_IN_IDS}
        own = digest(values | {"shared": self._shared_names(config)[1].rpartition("/")[2]})[:16]
        return with_overrides(config, {"run.dir": child_address(self.root, f"{POINTS}/{own}"), "run.reuse": None})

    def run(self, points: Sequence[Point]) -> list[Outcome]:
        """Outcomes in the order of the points; finished points are read, the others run, each once.

        Raises UserError, before anything starts, for an override that is not allowed, and for the first point that fails.
        """
        configs = [self.configured(point) for point in points]
        todo: dict[str, PointTask] = {}
        for point, config, outcome in zip(points, configs, read_outcomes(points, configs), strict=True):
            if outcome is None and config.run.dir not in todo:
                changes = " ".join(f"{key}={value}" for key, value in point.overrides.items())
                todo[config.run.dir] = PointTask(config, f"the point [{changes}], repetition {point.seed}")
        tasks = list(todo.values())
        for task in tasks:
            require_samples_to_test(task.config, PreparedDataset(self.prepare(task.config) / "prepared"))
        if tasks:
            with self.display.meter("points", len(tasks), "points") as meter:

                def done(index: int, last: LastEvaluation | None, error: Exception | None) -> None:
                    if isinstance(error, UserError):
                        raise type(error)(f"{tasks[index].name}: {error}") from None
                    if error is not None:
                        raise error
                    meter.advance()

                self.runner.run(tasks, run_point, done)
        return [outcome for outcome in read_outcomes(points, configs, all_files=True) if outcome is not None]

    def shared(self, overrides: Mapping[str, Any]) -> Path:
        """The run folder with finished ingest and score stages (prepared/, scores.parquet, proxies/) of a configuration."""
        return self.scored(with_overrides(self.config, overrides, "a point")).path

    def ingested(self, config: Config) -> RunDir:
        """The run folder with the prepared data of a configuration; runs ingest if necessary."""
        data, _ = self._shared_names(config)
        if data not in self.ready:
            self._pipeline(config, data).run(("ingest",))
            self.ready.add(data)
        return self._run(data)

    def scored(self, config: Config) -> RunDir:
        """The run folder with prepared data and scores of a configuration; runs ingest and score if necessary."""
        _, scores = self._shared_names(config)
        run = self._run(scores)
        if scores not in self.ready:
            _adopt(run, self.ingested(config), "ingest")
            pipeline = self._pipeline(config, scores)
            pipeline.context.warned = True  # by ingest
            pipeline.run(("score",))
            self.ready.add(scores)
        return run

    def prepare(self, config: Config) -> RunDir:
        """The folder of a configured point, linked to its ingest and scores; ready for its own stages."""
        shared, run = self.scored(config), RunDir.of(config.run)
        _adopt(run, shared, "ingest", "score")
        return run

    def take_over(self, run: RunDir) -> None:
        """Use the finished ingest and scores of a run of the base configuration instead of computing them again."""
        for folder, stages in zip(self._shared_names(self.config), (("ingest",), ("ingest", "score")), strict=True):
            _adopt(self._run(folder), run, *stages)

    def _run(self, name: str) -> RunDir:
        own = {"dir": child_address(self.root, name), "reuse": None}
        return RunDir.of(self.config.run.model_copy(update=own), self.display.say)

    def _shared_names(self, config: Config) -> tuple[str, str]:
        # fingerprints hash the content of data; here the locations that differ from the base configuration's count
        ours, base = config.data, self.config.data
        names = [n for n, field in type(ours).model_fields.items() if changes_results(field) == "by content"]
        elsewhere = {f"at data.{n}": getattr(ours, n) for n in names if getattr(ours, n) != getattr(base, n)}
        data = digest(ingest.config_values(config) | elsewhere)
        score = result_values(config.score, "score.", locations=True, neutral=True)
        score = {key: value for key, value in score.items() if key not in NOT_IN_IDS}
        scores = digest({"data": data, **score, "seed": config.run.seed})
        return f"{SHARED}/data-{data[:16]}", f"{SHARED}/scores-{scores[:16]}"

    def _pipeline(self, config: Config, name: str) -> Pipeline:
        own = {"run.dir": child_address(self.root, name), "run.reuse": self.config.run.reuse}
        return Pipeline(with_overrides(config, own), self.runner.executor, self.display)


def run_point(
    config: Config, executor: Executor, watch: Watch | None = None, observers: MakeObservers = no_observers
) -> None:
    """Run the stages of a prepared point; finished stages are skipped, interrupted ones resume."""
    Pipeline(config, lambda: executor, Display.silent(), watch=watch, observers=observers).run(OWN)


def try_point(
    config: Config, executor: Executor, watch: Watch | None = None, observers: MakeObservers = no_observers
) -> None:
    """`run_point`, but an error is written to the point's folder instead of raised.

    Raises Busy, and changes nothing, where another command holds the folder; also whatever prevents writing the error.
    """
    run = RunDir.of(config.run)
    try:
        run.wait(PATIENCE)
        run.drop(FAILED)
        run_point(config, executor, watch, observers)
        run.drop(STOPPED)
    except Busy:
        raise
    except Exception as error:
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        write_failure(run, Failure(message, is_transient(error)))


def write_failure(run: RunDir, failure: Failure) -> None:
    write_json(run / FAILED, {"error": failure.message, "passing": failure.transient})
    run.keep(FAILED)


def write_stop(run: RunDir, last: LastEvaluation) -> None:
    """A scheduler stopped the point after `last`, an evaluation during distillation."""
    write_json(run / STOPPED, {"step": last["step"], "top1": last["top1"]})
    run.keep(STOPPED)


def read_failure(run: RunDir) -> Failure | None:
    """Why the last attempt at a point failed, None if it did not fail; on object storage as of the last fetch."""
    if (note := _read_note(run, FAILED)) is None:
        return None
    damaged = f"{run.place(FAILED)} is damaged"
    return Failure(str(note.get("error", damaged)), note.get("passing", "error" not in note) is True)


def read_stopped(point: Point, run: RunDir, network: str) -> Outcome | None:
    """The outcome of a stopped point: its last evaluation, with one `network`; None if no scheduler stopped it."""
    note = _read_note(run, STOPPED)
    if note is None or not {"step", "top1"} <= set(note) or run.record("select") is None:
        return None
    rows = [{"set": "distilled", "network": network, "seed": 0, "top1": note["top1"]}]
    return _outcome(point, run, rows, note["step"])


def read_outcome(point: Point, run: RunDir, all_files: bool = False) -> Outcome | None:
    """The outcome in a point's folder, None if it is not finished; `all_files` fetches all files of the folder."""
    run.fetch(*(() if all_files else OF_OUTCOMES))
    if run.record("evaluate") is None:
        return None
    for stage in ("ingest", "score"):  # outdated where a shared stage ran again since; a missing shared folder is fine
        shared = run.output_run(stage)
        if shared.record(stage) is not None and _differs(run, shared, stage):
            return None
    return _outcome(point, run, json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["rows"])


def read_outcomes(points: Sequence[Point], configs: Sequence[Config], all_files: bool = False) -> list[Outcome | None]:
    """`read_outcome` of each point, several at a time: on object storage each takes a few requests."""
    runs = [RunDir.of(config.run) for config in configs]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(read_outcome, points, runs, [all_files] * len(points)))


def _outcome(point: Point, run: RunDir, rows: Sequence[Mapping[str, Any]], stopped: int | None = None) -> Outcome:
    facts = manifest.facts(run / "manifest.parquet")
    seconds = {stage: record["seconds"] for stage in ("ingest", "score", *OWN) if (record := run.record(stage))}
    seconds["start"] = (run.record("distill") or {}).get("start_seconds", 0.0)
    return Outcome(point, rows, facts["kept"], facts["of"], facts["kept_per_class"], seconds, run.path, stopped)


def _read_note(run: RunDir, name: str) -> dict[str, Any] | None:
    """The contents of a note: None if there is none, empty if it is damaged."""
    try:
        note = json.loads((run / name).read_text(encoding="utf-8"))
        return note if isinstance(note, dict) else {}
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _adopt(run: RunDir, source: RunDir, *stages: str) -> None:
    """Link a run folder to the outputs of stages; where they changed, a point's own stages have to run again."""
    run.begin()
    for stage in stages:
        if changed := _differs(run, source, stage):
            for name in (f"stages/{own}.json" for own in OWN):
                if (run / name).exists():
                    run.drop(name)
        if changed or not run.has(stage):
            run.adopt(source, stage)


def _differs(run: RunDir, shared: RunDir, stage: str) -> bool:
    ours, theirs = run.record(stage), shared.record(stage)
    return ours is None or theirs is None or ours["output"] != theirs["output"]
