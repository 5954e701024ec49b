"""Stage report: one HTML page about the whole run."""

from __future__ import annotations

from distill_at_scale.config.load import Config
from distill_at_scale.core.atomic_files import file_digest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation.evaluate import can_test
from distill_at_scale.pipeline.report import run_report
from distill_at_scale.pipeline.stages.context import RunContext, StageOutput
from distill_at_scale.storage.run_dir import RunDir
from distill_at_scale.storage.stage_record import StageInputs


def inputs(config: Config, run: RunDir) -> StageInputs:
    stages = ["ingest", "score", "select", "distill"]
    if run.record("evaluate") is not None or can_test(config, PreparedDataset(run / "prepared")):
        stages.append("evaluate")
    content = {**{stage: run.content(stage) for stage in stages}, "page": str(run_report.VERSION)}
    if (compared := run / "compare" / "compare.json").exists():
        content["compare"] = str(file_digest(compared))
    return StageInputs({}, content)


def run(context: RunContext, inputs: StageInputs) -> StageOutput:
    run_report.write(context.dir, context.config)
    return [context.dir / "report.html"], {}
