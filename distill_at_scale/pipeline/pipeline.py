"""The stages in order. Each reads artefacts and writes one; it is skipped if its valid output exists, and resumes."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from distill_at_scale.config.load import Config
from distill_at_scale.core.atomic_files import write_json
from distill_at_scale.core.command_line import runs_points
from distill_at_scale.core.environment import environment, this_machine
from distill_at_scale.core.errors import Damaged, OtherConfiguration, UserError
from distill_at_scale.core.events import Event, instant
from distill_at_scale.core.progress import Display
from distill_at_scale.data.ingest import plan as ingest_plan
from distill_at_scale.data.ingest.merge import unused, write_rejected
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import engine
from distill_at_scale.distillation.evaluate import can_test
from distill_at_scale.pipeline import validate
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.executors.base import Executor, Report
from distill_at_scale.pipeline.planning import plan as plans
from distill_at_scale.pipeline.planning.plan import RunPlan
from distill_at_scale.pipeline.stages import distill, evaluate, ingest, report, score, select
from distill_at_scale.pipeline.stages.context import MakeObservers, RunContext, no_observers
from distill_at_scale.pruning.scoring import imported
from distill_at_scale.storage.filesystem import redact_uri
from distill_at_scale.storage.redact import next_command
from distill_at_scale.storage.run_dir import REPLACED, STAGES, RunDir, next_folder
from distill_at_scale.storage.stage_record import StageInputs

STAGE_MODULES: dict[str, Any] = dict(zip(STAGES, (ingest, score, select, distill, evaluate, report), strict=True))


class Pipeline:
    """One run. `find_selection` decides select: auto once the scores exist."""

    def __init__(
        self,
        config: Config,
        executor: Callable[[], Executor],
        display: Display,
        find_selection: Callable[[Pipeline], Mapping[str, Any]] | None = None,
        watch: Report | None = None,
        observers: MakeObservers = no_observers,
    ):
        self.context = RunContext(config, executor, display, watch, observers)
        self.display, self._find_selection, self._environment = display, find_selection, cache(environment)
        self._wanted: Sequence[str] = STAGES

    @property
    def config(self) -> Config:
        return self.context.config

    @property
    def dir(self) -> RunDir:
        return self.context.dir

    @property
    def executor(self) -> Executor:
        return self.context.executor

    def run(self, stages: Sequence[str] = STAGES) -> None:
        """Run stages in order, after taking over earlier ones from run.reuse. Raises UserError if an input is missing or
        the output is of another configuration.
        """
        self._wanted = stages
        with self._working():
            self._take_over_before(stages[0])
            for stage in stages:
                if stage in ("score", "select", "distill") and self.dir.record("ingest"):
                    self.dir.content("ingest")
                    prepared = PreparedDataset(self.dir / "prepared")
                    self.context.warn_of_data(prepared.class_names, prepared.counts(), sum(prepared.counts("test")))
                tested = stage != "evaluate" or can_test(self.config, PreparedDataset(self.dir / "prepared"))
                if not tested and len(stages) > 1:
                    self.display.say("evaluate: skipped, the data set has no test split")
                    continue
                if stage == "select" and self.config.select.keep == "auto":
                    assert self._find_selection is not None, "select: auto needs find_selection"
                    self.dir.content("score")
                    self.context.config = with_selection(self.config, self._find_selection(self))
                self._run_stage(stage)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """The run folder is locked meanwhile; afterwards observers and executor are closed."""
        validate.check_names(self.config)
        self.dir.create()
        with self.dir.lock():
            try:
                yield
            finally:
                self.context.close()

    def _run_stage(self, stage: str) -> None:
        context, say = self.context, self.display.say
        if self.dir.redoes(stage):
            try:
                self.dir.record(stage)
            except Damaged as error:
                say(f"{stage}: {error.reason}; the output here was moved to {self.dir.set_aside(stage)}")
        inputs = self.inputs(stage)
        if self._is_done(stage, inputs) or self._take_over(stage, inputs):
            context.observers.emit(instant("stage", "skipped", stage=stage))
            return
        began, clock, outcome = time.time(), time.perf_counter(), "failed"
        context.observers.stage = stage
        context.observers.emit(instant("stage", "started"))
        try:
            say(f"{stage}: started")
            self.dir.sweep()
            self.dir.withdraw(stage)
            self._write_run_json()
            outputs, facts = STAGE_MODULES[stage].run(context, inputs)
            self.dir.complete(stage, inputs, outputs, time.perf_counter() - clock, **facts)
            self._write_run_json()
            shutil.rmtree(self.dir.work(stage, inputs))
            say(f"{stage}: finished in {time.perf_counter() - clock:.1f} s")
            outcome = "finished"
        finally:
            context.observers.emit(Event("stage", outcome, began, time.time()))

    def _is_done(self, stage: str, inputs: StageInputs) -> bool:
        """Whether the stage's valid output is in the run folder; what run.redo allows to replace is moved aside."""
        try:
            if done := self.dir.valid(stage, inputs):
                remark = ingest.compare_contents(self.context, self.dir, inputs) if stage == "ingest" else ""
                self.display.say(f"{stage}: already done for this configuration, skipped ({self.dir.named})")
                if remark:
                    self.display.say(f"  {remark}")
            return done
        except OtherConfiguration as error:
            if stage == "report":  # always written again
                return False
            if not self.dir.redoes(stage):
                raise OtherConfiguration(self._explained(stage, str(error)), error.difference) from None
            reason = "is of another configuration or other data"
        except Damaged as error:
            if stage == "report":
                return False
            if not self.dir.redoes(stage):
                raise
            reason = f"is damaged ({error.reason})"
        self.display.say(f"{stage}: the output here {reason} and was moved to {self.dir.set_aside(stage)}")
        return False

    def _explained(self, stage: str, problem: str) -> str:
        """The error for output of another configuration: what can be kept, and the command that keeps it."""
        place, lines = STAGES.index(stage), [problem, "Nothing was changed."]
        if not runs_points():
            kept, old = list(filter(self._agrees, STAGES[:place])), redact_uri(self.config.run.dir)
            reused = f"reuses {', '.join(kept)} and " if kept else ""
            computed = [later for later in STAGES[place:] if later in self._wanted]
            lines.append(f"In a new folder this command {reused}computes {', '.join(computed)}:")
            reuse = {"reuse": old} if kept else {}
            lines.append(f"  {next_command(dir=next_folder(old), **reuse)}")
        lines.append(f"In this folder, after moving the present output of {stage} to {REPLACED}/:")
        return "\n".join([*lines, f"  {next_command(redo=stage)}"])

    def _agrees(self, stage: str) -> bool:
        """Whether the run folder has the output of a stage for this configuration."""
        try:
            return self.dir.valid(stage, self.inputs(stage))
        except UserError:
            return False

    def _take_over(self, stage: str, inputs: StageInputs) -> bool:
        """Link the stage's output from run.reuse, and say so or why not."""
        if (other := self.dir.reuse) is None or stage == "report":
            return False
        try:
            remark = ingest.compare_contents(self.context, other, inputs) if stage == "ingest" else ""
            if taken := self.dir.take_over(stage, inputs):
                self.display.say(f"{stage}: taken over from {other.named}{f' ({remark})' if remark else ''}")
            return taken
        except UserError as error:
            self.display.say(f"{stage}: not taken over from {other.named}: {error}")
            return False

    def take_over(self, before: str) -> None:
        """Take over from run.reuse, if it is set, the stages before this one that the run folder lacks."""
        if self.dir.reuse:
            self.dir.create()
            with self.dir.lock():
                self._take_over_before(before)

    def _take_over_before(self, stage: str) -> None:
        for earlier in STAGES[: STAGES.index(stage)] if self.dir.reuse else ():
            if self.dir.record(earlier) is None and not self._take_over(earlier, self.inputs(earlier)):
                return

    def inputs(self, stage: str) -> StageInputs:
        """What decides a stage's output. Raises UserError if an earlier stage's output is missing or not whole."""
        return ingest.inputs(self.context) if stage == "ingest" else STAGE_MODULES[stage].inputs(self.config, self.dir)

    def _write_run_json(self) -> None:
        """The requested configuration without credentials of its paths, the environment, and seconds per stage."""
        values = self.context.requested.model_dump()
        for section, keys in {"run": ("dir", "reuse"), "data": ("path", "val_labels", "synsets")}.items():
            for key in keys:
                if values[section][key] is not None:
                    values[section][key] = redact_uri(values[section][key])
        if (mlflow := values["track"]["mlflow"]) and mlflow["tracking_uri"]:
            mlflow["tracking_uri"] = redact_uri(mlflow["tracking_uri"])
        seconds = {}
        for stage in STAGES:
            with suppress(Damaged):  # of a later stage
                if record := self.dir.record(stage):
                    seconds[stage] = record["seconds"]
        write_json(self.dir / "run.json", {"config": values, **self._environment(), "seconds": seconds})

    def validate(self, compare: bool = False) -> int:
        """Check the configuration and decode each sample of the source; list rejected ones in validation.parquet.
        Returns the number of unusable samples. Raises UserError for whatever would stop a run, and with `compare` if the
        content of a sample is not what this run folder ingested.
        """
        with self._working():
            context, config, say = self.context, self.config, self.display.say
            context.observers.stage = "validate"
            context.plan = plan = ingest_plan.plan(config)
            planned = validate.planned(config, plan)
            validate.check_networks(config, planned)
            validate.check_scoring(config, planned)
            validate.check_weights(config, planned)
            imported.check(config, plan)
            engine.check_inputs(config, planned, planned.counts)
            work = self.dir.work("validate", StageInputs(ingest.config_values(config), {"source": plan.source}))
            before = ingest.recorded_hashes(context) if compare else None
            ingest.describe(context)
            if config.data.transform != "none":
                samples = f"about {sum(planned.counts)} training samples of {len(planned.counts)} classes"
                say(f"  data.transform = {config.data.transform} will turn them into {samples}")
            plan, executor = plan.on_disk(work), context.executor
            ingest.drop_outdated(context, work, check=True)
            with self.display.meter("decode", plan.samples, "samples") as meter:
                tasks.ingest(executor, config, plan, work, meter.advance, check=True)
            if before is not None:
                say(f"  {ingest.compare_all(context, before, work)}")
            listed = write_rejected(plan, work, self.dir / "validation.parquet", config.data.chunk)
            shutil.rmtree(work)
            for line in validate.summary(plan, listed, self.dir / "validation.parquet"):
                say(line)
            return unused(listed).num_rows

    def forecast(self) -> RunPlan:
        """Estimate what each stage takes, from a dry run of a few units; published as plan.json and returned. Raises
        UserError for what no stage could do; what does not fit is among the problems of the plan.
        """
        validate.check_names(self.config)
        self.dir.create()
        self.take_over("report")
        self.dir.fetch()
        finished: dict[str, dict[str, Any]] = {}  # records of stages that a run would skip; the source is not listed
        for stage in STAGES:
            if (record := self.dir.record(stage)) is None:
                break
            if stage == "ingest":
                same = record["config"] == json.loads(json.dumps(ingest.config_values(self.config)))
            else:
                same = record["fingerprint"] == self.inputs(stage).fingerprint
            if not same:
                self.display.say(f"  {self.dir.named} holds the output of {stage} for another configuration")
                break
            finished[stage] = record
        prepared = None
        if "ingest" in finished:
            prepared = PreparedDataset(self.dir / "prepared")
            chosen = self.dir / "manifest.parquet" if "select" in finished else None
            facts = validate.known(self.config, prepared, chosen)
        else:
            listing = ingest_plan.plan(self.config)
            for line in (listing.describe(), *listing.notes):
                self.display.say(f"  {line}")
            facts = validate.planned(self.config, listing)
        validate.check_networks(self.config, facts)
        if "score" not in finished:
            validate.check_scoring(self.config, facts)
        self.context.warn_of_data(facts.class_names, facts.counts, facts.tests)
        with self.display.meter("measure", len(STAGES) - 1 + can_test(self.config, facts), "stages") as meter:
            path, machine = self.dir / "plan.json", this_machine(self.dir.path)
            plan = plans.make(
                self.config, facts, machine, path, finished, lambda name: meter.advance(1, name), prepared
            )
        self.dir.keep(path.name)
        return plan


def with_selection(config: Config, keys: Mapping[str, Any]) -> Config:
    """A configuration with select: auto, with the keys of a candidate in its place."""
    found = {"per_class": None, "keep": 1.0, **keys}
    return config.model_copy(update={"select": config.select.model_copy(update=found)})
