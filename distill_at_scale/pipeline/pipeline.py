"""The stages in order. Each reads one artefact and writes one, is skipped where its valid output is there, and resumes.

This file says when a stage runs and what it depends on; what it calls and publishes is in `pipeline/stages.py`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import Unreachable
from distill_at_scale.core.events import Event, instant
from distill_at_scale.core.progress import Display
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.ingest.merge import unused, write_rejected
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import engine as distill
from distill_at_scale.pipeline import fingerprints, validate
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.executors.base import Executor
from distill_at_scale.pipeline.planning import facts as known
from distill_at_scale.pipeline.planning import forecast
from distill_at_scale.pipeline.planning.machine import here
from distill_at_scale.pipeline.planning.plan import RunPlan
from distill_at_scale.pipeline.stages.stages import MakeObservers, Stages, nobody
from distill_at_scale.pruning.scoring import imported
from distill_at_scale.storage.run_dir import STAGES
from distill_at_scale.storage.stage_record import StageInputs


class Pipeline(Stages):
    """One run; `find_rate` decides select.keep: auto, once the scores are there."""

    def __init__(
        self,
        config: Config,
        executor: Callable[[], Executor],
        display: Display,
        find_rate: Callable[[Pipeline], float] | None = None,
        watch: Callable[[dict[str, Any]], None] | None = None,
        observers: MakeObservers = nobody,
    ):
        super().__init__(config, executor, display, watch, observers)
        self._find_rate = find_rate

    def run(self, stages: Sequence[str] = STAGES) -> None:
        """Run stages in order.

        Raises UserError where an input is missing or the folder holds the output of another configuration.
        """
        validate.check_names(self.config)
        self.dir.create()
        with self.dir.lock():
            try:
                for stage in stages:
                    if (
                        stage == "evaluate"
                        and len(stages) > 1
                        and not PreparedDataset(self.dir / "prepared").has_test()
                    ):
                        self.display.say("evaluate: left out, the data set has no test split (data.holdout makes one)")
                        continue
                    if stage == "select" and self.config.select.keep == "auto":
                        self._decide()
                    self._stage(stage)
            finally:
                self.observers.close()
                if self._executor is not None:
                    self._executor.close()

    def _decide(self) -> None:
        """Replace select.keep: auto by the rate that is found; what comes after is as if it had been given."""
        assert self._find_rate is not None, "nobody decides select.keep: auto"
        self.dir.content("score")
        self.config = decided(self.config, self._find_rate(self))

    def validate(self) -> int:
        """Look at the configuration and at every sample of the source; lists what would be rejected in validation.parquet.

        Returns the number of such samples. Raises UserError for whatever would stop a run.
        """
        validate.check_names(self.config)
        self.dir.create()
        with self.dir.lock():
            try:
                self.observers.stage = "validate"
                return self._validate()
            finally:
                self.observers.close()
                if self._executor is not None:
                    self._executor.close()

    def _validate(self) -> int:
        plan = ingest.plan(self.config)
        planned = validate.planned(self.config, plan)
        validate.check_networks(self.config, planned)
        validate.check_weights(self.config, planned)
        imported.check(self.config, plan)
        distill.check_inputs(self.config, planned, planned.counts)
        inputs = StageInputs(fingerprints.data(self.config), {"source": plan.source})
        work = self.dir.work("validate", inputs)
        self._say_plan(plan)
        if self.config.data.transform != "none":
            about = f"about {sum(planned.counts)} training samples of {len(planned.counts)} classes"
            self.display.say(f"  data.transform = {self.config.data.transform} will make of them {about}")
        plan = plan.on_disk(work)
        with self.display.meter("look", plan.samples, "samples") as meter:
            tasks.ingest(self.executor, self.config, plan, work, meter.advance, check=True)
        listed = write_rejected(plan, work, self.dir / "validation.parquet", self.config.data.chunk)
        shutil.rmtree(work)
        if "test" not in plan.listings:
            self.display.say("  there is no test split, so nothing will be evaluated (data.holdout makes one)")
        for line in validate.summary(plan, listed, self.dir / "validation.parquet"):
            self.display.say(line)
        return unused(listed).num_rows

    def forecast(self) -> RunPlan:
        """What every stage will take, from a few measured micro-steps; published as plan.json and returned.

        Raises UserError for what no stage could do; what does not fit is among the outcome's problems.
        """
        validate.check_names(self.config)
        self.dir.create()
        self.dir.fetch()
        finished = self._finished()
        if "ingest" in finished:
            chosen = self.dir / "manifest.parquet" if "select" in finished else None
            facts = known.of_prepared(self.config, PreparedDataset(self.dir / "prepared"), chosen)
        else:
            facts = known.of_listing(self.config, ingest.plan(self.config))
        validate.check_networks(self.config, facts)
        with self.display.meter("measure", len(STAGES) - 1 + facts.has_test(), "stages") as meter:
            path, machine = self.dir / "plan.json", here(self.dir.path)
            made = forecast.make(self.config, facts, machine, path, finished, lambda name: meter.advance(1, name))
        self.dir.keep(path.name)
        return made

    def _finished(self) -> dict[str, dict[str, Any]]:
        """Records of the stages that a run with this configuration would skip; the source is not looked at."""
        found: dict[str, dict[str, Any]] = {}
        for stage in STAGES:
            record = self.dir.record(stage)
            if record is None:
                break
            if stage == "ingest":
                same = record["config"] == json.loads(json.dumps(fingerprints.data(self.config)))
            else:
                same = record["fingerprint"] == self.inputs(stage).fingerprint
            if not same:
                self.display.say(f"  {self.dir.named} holds the output of {stage} for another configuration")
                break
            found[stage] = record
        return found

    def _stage(self, stage: str) -> None:
        inputs = self.inputs(stage)
        if self.dir.valid(stage, inputs, redo=stage == "report"):
            self.display.say(f"{stage}: already done for this configuration, skipped ({self.dir.named})")
            self.observers.emit(instant("stage", "skipped", stage=stage))
            return
        with self._observed(stage):
            self._carry_out(stage, inputs)

    @contextmanager
    def _observed(self, stage: str) -> Iterator[None]:
        """Tell the observers how it begins and ends."""
        began, ended = time.time(), "failed"
        self.observers.stage = stage
        self.observers.emit(instant("stage", "started"))
        try:
            yield
            ended = "finished"
        finally:
            self.observers.emit(Event("stage", ended, began, time.time()))

    def _carry_out(self, stage: str, inputs: StageInputs) -> None:
        self.display.say(f"{stage}: started")
        self.dir.sweep()
        self.dir.withdraw(stage)
        self._write_run_json()
        began = time.perf_counter()
        outputs, facts = getattr(self, f"_{stage}")(inputs)
        self.dir.complete(stage, inputs, outputs, time.perf_counter() - began, **facts)
        self._write_run_json()
        shutil.rmtree(self.dir.work(stage, inputs))
        self.display.say(f"{stage}: finished in {time.perf_counter() - began:.1f} s")

    def inputs(self, stage: str) -> StageInputs:
        """The configuration values and contents that a stage depends on."""
        return self._ingest_inputs() if stage == "ingest" else fingerprints.inputs(stage, self.config, self.dir)

    def _ingest_inputs(self) -> StageInputs:
        config = fingerprints.data(self.config)
        try:
            self.plan = ingest.plan(self.config)
        except Unreachable as error:
            record = self.dir.record("ingest")
            if record is None or record["config"] != json.loads(json.dumps(config)):
                raise
            self.display.say(f"ingest: the source cannot be read now ({error}); what was ingested before is used")
            return StageInputs(config, record["content"])
        return StageInputs(config, {"source": self.plan.source})


def decided(config: Config, rate: float) -> Config:
    """A configuration with select.keep: auto, as if the rate had been given."""
    return config.model_copy(update={"select": config.select.model_copy(update={"keep": rate})})
