"""Stage ingest: decode the source once into the prepared format; rejected samples are listed with their reason."""

from __future__ import annotations

import json
import shutil
from typing import Any

from distill_at_scale.config.fields import result_values
from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import Unreachable
from distill_at_scale.data.codecs.clip import decoders_for, describe_decoders
from distill_at_scale.data.ingest import derived_splits
from distill_at_scale.data.ingest import plan as ingest_plan
from distill_at_scale.data.ingest.chunks import is_finished, part_path
from distill_at_scale.data.ingest.merge import merge
from distill_at_scale.data.sources.class_subsets import class_list
from distill_at_scale.pipeline import validate
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.stages.context import RunContext, StageOutput
from distill_at_scale.pruning.scoring import imported
from distill_at_scale.storage.stage_record import StageInputs

TRANSFORM_KEYS = ("imbalance", "copies", "variance_classes")  # of no effect without data.transform
CLIP_KEYS = ("frames", "sampling", "stride", "decoder", "seek", "short", "time_limit", "max_seconds", "fold")


def config_values(config: Config) -> dict[str, Any]:
    """The configuration that decides the prepared data; the seed only if it splits them or draws their frames."""
    section = config.data
    unused = {*(CLIP_KEYS if section.frames is None else ()), *(TRANSFORM_KEYS if section.transform == "none" else ())}
    values = {k: v for k, v in result_values(section, "data.").items() if k.removeprefix("data.") not in unused}
    if section.frames is not None:
        values["data.decoder"] = list(decoders_for(section))
    if section.classes is not None:
        values["data.classes"] = class_list(section.classes)
    if section.holdout or (section.frames and section.sampling != "uniform") or section.transform != "none":
        values["run.seed"] = config.run.seed
    return values


def inputs(context: RunContext) -> StageInputs:
    """Lists the source; where it cannot be reached, what was ingested before counts."""
    values = config_values(context.config)
    try:
        context.plan = ingest_plan.plan(context.config)
    except Unreachable as error:
        record = context.dir.record("ingest")
        if record is None or record["config"] != json.loads(json.dumps(values)):
            raise
        context.display.say(f"ingest: the source cannot be read now ({error}); using what was ingested before")
        return StageInputs(values, record["content"])
    return StageInputs(values, {"source": context.plan.source})


def run(context: RunContext, inputs: StageInputs) -> StageOutput:
    config, run_dir, say = context.config, context.dir, context.display.say
    validate.check_networks(config, validate.planned(config, context.plan))
    imported.check(config, context.plan)
    parts = run_dir.work("ingest", inputs) / "pieces"
    parts.mkdir(exist_ok=True)
    describe(context)
    plan = context.plan.on_disk(parts)
    finished = sum(
        rows.num_rows
        for split, index, rows in plan.chunks(config.data.chunk)
        if is_finished(part_path(parts, split, index), check=False)
    )
    executor = context.executor
    with context.display.meter("decode", plan.samples, "samples", finished) as meter:
        tasks.ingest(executor, config, plan, parts, meter.advance)
    meta = merge(plan, parts, run_dir / "prepared", config.data, config.run.seed)
    if "transform" in meta:
        say(f"  {derived_splits.describe(meta)}")
    if "decoders" in meta:
        say("  " + ", ".join(f"{name} decoded {count} clips" for name, count in meta["decoders"].items()))
    if rejected := meta["rejected"]:
        say(f"  {rejected} of {plan.known} samples were rejected; see {run_dir.place('rejected.parquet')}")
    samples = sum(map(sum, meta["counts"].values()))
    return [run_dir / "prepared", run_dir / "rejected.parquet"], {"samples": samples, "rejected": rejected}


def describe(context: RunContext) -> None:
    """Say which data the source holds, which decoders are used, and how much disk space an ingest takes."""
    for line in (context.plan.describe(), *context.plan.notes):
        context.display.say(f"  {line}")
    if context.config.data.frames:
        context.display.say(f"  clips are decoded by {describe_decoders(decoders_for(context.config.data))}")
    planned = validate.planned(context.config, context.plan)
    context.warn_of_data(planned.class_names, planned.counts, planned.has_test())
    context.display.say(validate.space(context.config, context.plan, shutil.disk_usage(context.dir.path).free))
