"""What each stage checks, calls and publishes; how the work is spread is the executor's business.

Each reads the artefacts of earlier stages in the run folder and returns what it wrote, with facts for its record. Left out:
when a stage runs, and what it depends on (`pipeline/pipeline.py`, `pipeline/fingerprints.py`).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from distill_at_scale.config.load import Config
from distill_at_scale.core.atomic_files import write_json
from distill_at_scale.core.environment import environment
from distill_at_scale.core.events import instant, measured
from distill_at_scale.core.progress import Display
from distill_at_scale.data.codecs.clip import decoders_for, describe_decoders
from distill_at_scale.data.ingest import derived_splits
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.ingest.chunks import is_finished, part_path
from distill_at_scale.data.ingest.merge import merge
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import engine as distill
from distill_at_scale.distillation import evaluate, synthetic_set
from distill_at_scale.pipeline import validate
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.executors.base import Executor
from distill_at_scale.pipeline.executors.synced import SyncedExecutor
from distill_at_scale.pipeline.monitoring.distillation_log import DistillationLog
from distill_at_scale.pipeline.monitoring.observers import Observer, Observers
from distill_at_scale.pipeline.monitoring.tensorboard import TensorBoard
from distill_at_scale.pipeline.monitoring.timeline import Timeline
from distill_at_scale.pipeline.report import run_report
from distill_at_scale.pipeline.stages import networks
from distill_at_scale.pruning.criteria.factory import build_criteria
from distill_at_scale.pruning.proxies import train as proxy
from distill_at_scale.pruning.scoring import extra_columns, imported, score_table, scorer
from distill_at_scale.pruning.scoring.scorer import score_part_path
from distill_at_scale.pruning.selection import checks
from distill_at_scale.pruning.selection import select as static
from distill_at_scale.pruning.selection.ranking import score_columns
from distill_at_scale.storage.filesystem import shown
from distill_at_scale.storage.run_dir import STAGES, RunDir
from distill_at_scale.storage.stage_record import StageInputs

MakeObservers = Callable[[Config], Sequence[Observer]]  # who is to watch a run, beside timeline and TensorBoard


def nobody(config: Config) -> Sequence[Observer]:
    return ()


class Stages:
    """The stages of one run: a configuration, its folder, an executor that is made when first needed, and a display."""

    def __init__(
        self,
        config: Config,
        executor: Callable[[], Executor],
        display: Display,
        watch: Callable[[dict[str, Any]], None] | None = None,
        observers: MakeObservers = nobody,
    ):
        self.config, self.display, self._make_executor = config, display, executor
        self.asked = config
        self.watch = watch  # called with every line of the distillation's log as it is written
        self._executor: Executor | None = None
        self.dir = RunDir.of(config.run, display.say)
        always = (Timeline(self.dir.path), TensorBoard(self.dir.path))
        self.observers = Observers(display.say, [*always, *observers(config)])
        self.plan: ingest.IngestPlan  # what the source lists, once ingest has looked

    @cached_property
    def environment(self) -> dict[str, Any]:
        return environment()

    @property
    def executor(self) -> Executor:
        if self._executor is None:
            with measured("start", self.observers.emit, what="wait"):
                made = self._make_executor()
            made.emit = self.observers.emit
            for observer in made.observers(self.config):
                self.observers.add(observer)
            self._executor = SyncedExecutor(made, self.dir.remote) if self.dir.remote else made
        return self._executor

    def _say_plan(self, plan: ingest.IngestPlan) -> None:
        if self.config.data.frames:
            self.display.say(f"  clips are decoded by {describe_decoders(decoders_for(self.config.data))}")
        self.display.say(validate.space(self.config, plan, shutil.disk_usage(self.dir.path).free))

    def _ingest(self, inputs: StageInputs) -> tuple[list[Path], dict[str, Any]]:
        validate.check_networks(self.config, validate.planned(self.config, self.plan))
        imported.check(self.config, self.plan)
        pieces = self.dir.work("ingest", inputs) / "pieces"
        pieces.mkdir(exist_ok=True)
        self._say_plan(self.plan)
        self.plan = self.plan.on_disk(pieces)
        chunks = self.plan.chunks(self.config.data.chunk)
        before = sum(r.num_rows for split, i, r in chunks if is_finished(part_path(pieces, split, i), check=False))
        executor = self.executor
        with self.display.meter("decode", self.plan.samples, "samples", before) as meter:
            tasks.ingest(executor, self.config, self.plan, pieces, meter.advance)
        meta = merge(self.plan, pieces, self.dir / "prepared", self.config.data, self.config.run.seed)
        if "transform" in meta:
            self.display.say(f"  {derived_splits.describe(meta)}")
        if "decoders" in meta:
            self.display.say("  " + ", ".join(f"{name} decoded {n} clips" for name, n in meta["decoders"].items()))
        rejected = meta["rejected"]
        if rejected:
            listed = self.dir.place("rejected.parquet")
            self.display.say(f"  {rejected} of {self.plan.known} samples were rejected; see {listed}")
        return [self.dir / "prepared", self.dir / "rejected.parquet"], {
            "samples": sum(map(sum, meta["counts"].values())),
            "rejected": rejected,
        }

    def _score(self, inputs: StageInputs) -> tuple[list[Path], dict[str, Any]]:
        data, score = PreparedDataset(self.dir / "prepared"), self.config.score
        validate.check_networks(self.config, data)
        validate.check_weights(self.config, data)
        scorer.check(self.config, data)
        distill.check_inputs(self.config, data, data.counts("train"))  # what no selection can mend
        extra_columns.check(self.config, data)
        if not build_criteria(score):
            return self._write_unscored(data)
        work, prepared = self.dir.work("score", inputs), self.dir / "prepared"
        checkpoints, pieces = work / "proxies", work / "pieces"
        began = time.perf_counter()
        chunks = data.chunks("train")
        pieces.mkdir(exist_ok=True)
        paths = [score_part_path(pieces, chunk) for chunk in chunks]
        if score.weights is None and not all(path.exists() for path in paths):
            self._train_proxies(data, prepared, checkpoints)
        trained = time.perf_counter()
        before = sum(chunk.rows for chunk, path in zip(chunks, paths, strict=True) if path.exists())
        executor = self.executor
        with self.display.meter("score", sum(c.rows for c in chunks), "samples", before) as meter:
            tasks.score(executor, self.config, prepared, checkpoints, chunks, pieces, meter.advance)
        scored = time.perf_counter()
        more = self._brought(data)
        expected = (data.read(chunk, columns=["sample_id"])["sample_id"].combine_chunks() for chunk in chunks)
        written = score_table.write_scores(self.dir / "scores.parquet", paths, expected, self.config, more)
        self._keep_proxies(checkpoints)
        facts = {
            "train_seconds": round(trained - began, 3),
            "score_seconds": round(scored - trained, 3),
            "mean_score": written["mean_score"],
        }
        self.display.say(f"  mean score {facts['mean_score']:.4f} over {written['rows']} samples")
        return self._score_outputs(), facts

    def _write_unscored(self, data: PreparedDataset) -> tuple[list[Path], dict[str, Any]]:
        """The table of samples where no criterion needs a checkpoint, so that no proxy is trained."""
        more = self._brought(data)
        rows = (data.read(chunk, columns=["sample_id", "label"]) for chunk in data.chunks("train"))
        written = score_table.write_unscored(self.dir / "scores.parquet", rows, self.config, more)
        self.display.say(f"  {written['rows']} samples; no criterion needs proxies, so none was trained")
        return self._score_outputs(), {"mean_score": written["mean_score"]}

    def _brought(self, data: PreparedDataset) -> dict[str, Any]:
        def run_subsets(folder: Path, advance: Callable[[int], None]) -> None:
            tasks.run_subsets(self.executor, self.config, data.folder, folder, advance)

        return extra_columns.load(self.config, self.dir, data, run_subsets, self.display)

    def _score_outputs(self) -> list[Path]:
        return [self.dir / "scores.parquet", *extra_columns.outputs(self.config, self.dir)]

    def _train_proxies(self, data: PreparedDataset, prepared: Path, checkpoints: Path) -> None:
        score = self.config.score
        proxy.check_workers(data, score, self.config.run.seed)
        before, executor = proxy.finished_epochs(score, checkpoints), self.executor
        with self.display.meter("proxies", score.trials * score.epochs, "epochs", before) as meter:
            tasks.train_proxies(executor, self.config, prepared, checkpoints, meter.advance)

    def _keep_proxies(self, checkpoints: Path) -> None:
        """Move the checkpoints beside the scores that were made with them."""
        target = self.dir / "proxies"
        if checkpoints.exists():
            if target.exists():
                shutil.rmtree(target)  # left by a score stage whose record the user removed
            os.replace(checkpoints, target)

    def _select(self, inputs: StageInputs) -> tuple[list[Path], dict[str, Any]]:
        scores, path = self.dir / "scores.parquet", self.dir / "manifest.parquet"
        about, criterion = score_table.facts(scores), score_columns(self.config.criterion)
        low = {name: end == "low" for name, end in about["useful"].items()}
        minimum, seed = self.config.min_per_class, self.config.select_seed
        with manifest.writing(path) as out:
            chosen = static.select(scores, out, self.config.select, criterion, low, minimum, seed)
            distill.check_inputs(self.config, PreparedDataset(self.dir / "prepared"), chosen["kept_per_class"])
            chosen["warnings"] = self._doubts(criterion, about, chosen["reached"])
            if self.asked.select.keep == "auto":
                chosen["asked"] = {"keep": "auto", "found": self.config.select.rate}
            out.facts = chosen | {"scores": self.dir.content("score"), "fingerprint": inputs.fingerprint}
        self.display.say(f"  kept {chosen['kept']} of {chosen['of']} samples ({chosen['reached']:.4%})")
        if raised := chosen["raised_to_minimum"]:
            self.display.say(f"  {len(raised)} classes were raised to min_per_class = {minimum}")
        for line in chosen["warnings"]:
            self.display.say(f"  warning: {line}")
        return [path], {key: chosen[key] for key in ("kept", "of", "reached")}

    def _doubts(self, criterion: str | dict[str, float], about: dict[str, Any], kept: float) -> list[str]:
        """What is known against a selection; see pruning/checks.py."""
        names = [criterion] if isinstance(criterion, str) else list(criterion)
        folders = [self.dir.path] if self.dir.reuse is None else [self.dir.path, self.dir.reuse.path]
        sampled = checks.monte_carlo_facts(self.dir / extra_columns.TABLE)
        return checks.selection_warnings(names, about, kept, checks.measured_break_point(folders), sampled)

    def _distill(self, inputs: StageInputs) -> tuple[list[Path], dict[str, Any]]:
        facts = manifest.facts(self.dir / "manifest.parquet")
        data = PreparedDataset(self.dir / "prepared")
        validate.check_networks(self.config, data)
        distill.check_inputs(self.config, data, facts["kept_per_class"])
        work = self.dir.work("distill", inputs)
        places = networks.places_of(self.config, self.dir, work)
        if reason := distill.runtime_card(self.config).get("reason"):
            self.display.say(f"  runtime pruning is not applicable: {reason}; distilling without")
        networks.prepare(self.config, data, places, self.executor, self.display)
        if places.state.exists():
            self.display.say("  going on from the last checkpoint")
        executor = self.executor
        with self.display.meter("distill", distill.step_count(self.config), "steps") as meter:
            log = DistillationLog(self.observers.emit, meter, self.display.say)

            def show(line: dict[str, Any]) -> None:
                log(line)
                if self.watch is not None:
                    self.watch(line)

            tasks.distill(executor, self.config, places, show)
        records = {stage: self.dir.record(stage) or {} for stage in ("ingest", "score", "select")}
        earlier = {stage: record.get("fingerprint") for stage, record in records.items()}
        fingerprints = {**earlier, "distill": inputs.fingerprint}
        result = synthetic_set.publish_in_run(work / "synthetic", self.dir / "synthetic", fingerprints)
        return [self.dir / "synthetic"], {"images": len(result.labels), "steps": distill.step_count(self.config)}

    def _evaluate(self, inputs: StageInputs) -> tuple[list[Path], dict[str, Any]]:
        data = PreparedDataset(self.dir / "prepared")
        evaluate.require_test_split(data)
        validate.check_networks(self.config, data)
        finished = _Rows(self.dir.work("evaluate", inputs) / "rows.jsonl")
        todo = [job for job in evaluate.jobs(self.config) if job not in finished.jobs]
        folders = (self.dir / "prepared", self.dir / "synthetic", self.dir / "manifest.parquet")
        executor, old = self.executor, len(finished.rows)
        with self.display.meter("evaluate", old + len(todo), "networks", old) as meter:
            meter.advance(old)

            def done(row: dict[str, Any]) -> None:
                finished.add(row)
                self.observers.emit(instant("result", "network", row))
                meter.advance(1, f"{row['set']} {row['top1']:.3f}")

            for row in finished.rows:
                self.observers.emit(instant("result", "network", row))
            tasks.evaluate(executor, self.config, todo, folders, done)
        order = {job: place for place, job in enumerate(evaluate.jobs(self.config))}
        rows = sorted(finished.rows, key=lambda row: order[_job(row)])
        path = self.dir / "evaluation.json"
        write_json(path, {"rows": rows, "summary": evaluate.summarize(rows), "fingerprint": inputs.fingerprint})
        return [path], {}

    def _report(self, inputs: StageInputs) -> tuple[list[Path], dict[str, Any]]:
        run_report.write(self.dir, self.config)
        return [self.dir / "report.html"], {}

    def _write_run_json(self) -> None:
        stages = {stage: record["seconds"] for stage in STAGES if (record := self.dir.record(stage))}
        write_json(self.dir / "run.json", {"config": self._shown_config(), **self.environment, "seconds": stages})

    def _shown_config(self) -> dict[str, Any]:
        """The configuration without credentials that its paths may hold."""
        values = self.asked.model_dump()
        for key in ("dir", "reuse"):
            if values["run"][key] is not None:
                values["run"][key] = shown(values["run"][key])
        for key in ("path", "val_labels", "synsets"):
            if values["data"][key] is not None:
                values["data"][key] = shown(values["data"][key])
        if (mlflow := values["track"]["mlflow"]) and mlflow["tracking_uri"]:
            mlflow["tracking_uri"] = shown(mlflow["tracking_uri"])
        return values


class _Rows:
    """The finished rows of an evaluation, kept as they come."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    self.rows.append(json.loads(line))
                except ValueError:
                    break  # a line cut short when the run was interrupted
            write = "".join(json.dumps(row) + "\n" for row in self.rows)
            path.write_text(write)

    @property
    def jobs(self) -> set[evaluate.EvaluationJob]:
        return {_job(row) for row in self.rows}

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with open(self.path, "a") as log:
            log.write(json.dumps(row) + "\n")


def _job(row: dict[str, Any]) -> evaluate.EvaluationJob:
    return evaluate.EvaluationJob(row["set"], row["network"], row["seed"])
