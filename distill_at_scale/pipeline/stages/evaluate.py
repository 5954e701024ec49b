"""Stage evaluate: train fresh networks on the synthetic set and on its controls, and test them."""

from __future__ import annotations

import json
import time
from typing import Any

from distill_at_scale.config.fields import result_values
from distill_at_scale.config.load import Config
from distill_at_scale.core.atomic_files import resume_log, write_json
from distill_at_scale.core.events import instant
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import evaluate as evaluation
from distill_at_scale.distillation.evaluate import EvaluationJob
from distill_at_scale.distillation.summary import differences, summarize
from distill_at_scale.pipeline import validate
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.stages import controls
from distill_at_scale.pipeline.stages.context import RunContext, StageOutput
from distill_at_scale.storage.run_dir import RunDir
from distill_at_scale.storage.stage_record import StageInputs


def inputs(config: Config, run: RunDir) -> StageInputs:
    values = {f"distill.{key}": getattr(config.distill, key) for key in ("ipc", "width", "depth")}
    values |= result_values(config.evaluate, "evaluate.") | {"run.seed": config.run.seed}
    return StageInputs(values, {stage: run.content(stage) for stage in ("ingest", "select", "distill")})


def run(context: RunContext, inputs: StageInputs) -> StageOutput:
    config, run_dir = context.config, context.dir
    data = PreparedDataset(run_dir / "prepared")
    evaluation.require_samples_to_test(config, data)
    validate.check_networks(config, data)
    work = run_dir.work("evaluate", inputs)
    log = work / "rows.jsonl"
    rows = resume_log(log, context.display.say)  # the finished ones, which are kept in the log as they come

    began = time.perf_counter()
    distilled = {control.name: control for control in controls.distil(context, data)}
    control_seconds = round(time.perf_counter() - began, 3)
    jobs = evaluation.jobs(config, list(distilled))
    finished = {_job_of(row) for row in rows}
    missing = [job for job in jobs if job not in finished]
    folders = (run_dir / "prepared", run_dir / "synthetic", run_dir / "manifest.parquet", work)
    executor = context.executor
    with context.display.meter("evaluate", len(rows) + len(missing), "networks", len(rows)) as meter:
        meter.advance(len(rows))
        for row in rows:
            context.observers.emit(instant("result", "network", row))

        def done(row: dict[str, Any]) -> None:
            rows.append(row)
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            context.observers.emit(instant("result", "network", row))
            meter.advance(1, f"{row['set']} {row['top1']:.3f}")

        sets = {control.name: control.folder for control in distilled.values()}
        tasks.evaluate(executor, config, missing, folders, done, sets, lambda text: meter.advance(0, text))
    rows.sort(key=lambda row: jobs.index(_job_of(row)))
    path = run_dir / "evaluation.json"
    summary = summarize(rows)
    results = {"rows": rows, "summary": summary, "differences": differences(summary)}
    facts = {
        "tested": evaluation.tested(config, data, run_dir / "manifest.parquet"),
        "distillations": 1,
        "controls": {control.name: control.facts for control in distilled.values()},
    }
    write_json(path, {**results, **facts, "fingerprint": inputs.fingerprint})
    return [path], {"control_seconds": control_seconds} if distilled else {}


def _job_of(row: dict[str, Any]) -> EvaluationJob:
    return EvaluationJob(row["set"], row["network"], row["seed"])
