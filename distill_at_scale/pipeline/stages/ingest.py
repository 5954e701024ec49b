"""Stage ingest: decode the source once into the prepared format; rejected samples are listed with their reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_at_scale.config.fields import result_values
from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import OtherConfiguration, Unreachable, UserError
from distill_at_scale.data.codecs.clip import decoders_for, describe_decoders
from distill_at_scale.data.ingest import contents, derived_splits
from distill_at_scale.data.ingest import plan as ingest_plan
from distill_at_scale.data.ingest.chunks import is_finished, part_path, rejected_path
from distill_at_scale.data.ingest.merge import merge, unused
from distill_at_scale.data.sources.class_subsets import class_list
from distill_at_scale.pipeline import validate
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.stages.context import RunContext, StageOutput
from distill_at_scale.pruning.scoring import imported
from distill_at_scale.storage.run_dir import CONTENTS, RunDir
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
        reuse = context.dir.reuse
        record = context.dir.record("ingest") or (reuse.record("ingest") if reuse else None)
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
    times = drop_outdated(context, parts)
    finished = sum(
        rows.num_rows
        for split, index, rows in plan.chunks(config.data.chunk)
        if is_finished(part_path(parts, split, index), check=False)
    )
    executor = context.executor
    with context.display.meter("decode", plan.samples, "samples", finished) as meter:
        tasks.ingest(executor, config, plan, parts, meter.advance)
    contents.write(run_dir / CONTENTS, plan, times, parts, config.data.chunk)
    meta = merge(plan, parts, run_dir / "prepared", config.data, config.run.seed)
    if "transform" in meta:
        say(f"  {derived_splits.describe(meta)}")
    if "decoders" in meta:
        say("  " + ", ".join(f"{name} decoded {count} clips" for name, count in meta["decoders"].items()))
    if rejected := meta["rejected"]:
        say(f"  {rejected} of {plan.known} samples were rejected; see {run_dir.place('rejected.parquet')}")
        for line in validate.reasons(unused(pq.read_table(run_dir / "rejected.parquet"))):
            say(line)
    samples = sum(map(sum, meta["counts"].values()))
    outputs = [run_dir / "prepared", run_dir / "rejected.parquet", run_dir / CONTENTS]
    return outputs, {"samples": samples, "rejected": rejected}


def drop_outdated(context: RunContext, parts: Path, check: bool = False) -> contents.Array:
    """Removes parts of interrupted work whose files changed since; returns the times of all files, int64 [samples]."""
    plan, chunk, source = context.plan, context.config.data.chunk, ingest_plan.open_source(context.config.data)
    times = contents.modified_times(source, contents.all_rows(plan))
    outdated = contents.outdated(source, plan, times, parts, chunk, check)
    for part in outdated:
        for path in (part, rejected_path(part)):
            context.dir.drop(path.relative_to(context.dir.path).as_posix())
    if outdated:
        context.display.say(f"  files changed since this was interrupted; chunks to read again: {len(outdated)}")
    return times


def compare_contents(context: RunContext, run_dir: RunDir, inputs: StageInputs) -> str:
    """What a run folder ingested against the files as they are now, by their times; a line for the user, or "".

    Raises OtherConfiguration if a file has another content.
    """
    record, path = run_dir.record("ingest"), run_dir / CONTENTS
    if not hasattr(context, "plan") or record is None or record["fingerprint"] != inputs.fingerprint:
        return ""  # the source cannot be read now, or there is nothing to compare
    source, rows = ingest_plan.open_source(context.config.data), contents.all_rows(context.plan)
    times = contents.modified_times(source, rows)
    if not path.exists():
        unknown = bool((times == contents.UNKNOWN).all())
        return "" if unknown else "contents were not compared: this ingest is of an earlier version without hashes"
    recorded = pq.read_table(path)
    touched = np.flatnonzero(recorded["modified"].to_numpy() != times)
    if not len(touched):
        return ""
    compared, changed = contents.changed(source, rows, recorded["hash"], touched)
    if changed.num_rows:
        raise changed_data(run_dir, contents.place(source, changed), changed.num_rows, compared)
    return f"{len(touched):,} samples lie in files with another time of change; {compared:,} were compared: unchanged"


def recorded_hashes(context: RunContext) -> pa.ChunkedArray:
    """The hashes of all samples when they were ingested into this run folder, binary [samples].

    Raises UserError if it holds no ingest of this configuration and data.
    """
    record, path = context.dir.record("ingest"), context.dir / CONTENTS
    inputs = StageInputs(config_values(context.config), {"source": context.plan.source})
    if record is None or record["fingerprint"] != inputs.fingerprint or not path.exists():
        problem = f"{context.dir.named} holds no ingest of this configuration and data, with which --contents compares"
        raise UserError(f"{problem}; run `distill-at-scale ingest CONFIG` first, or leave --contents out")
    return pq.read_table(path, columns=["hash"])["hash"]


def compare_all(context: RunContext, before: pa.ChunkedArray, parts: Path) -> str:
    """A line for the user that all contents are as they were; raises UserError with the first one that is not."""
    numbered = context.plan.chunks(context.config.data.chunk)
    hashes = [contents.hashes_of(part_path(parts, split, i), rows.num_rows) for split, i, rows in numbered]
    different = contents.differing(before, pa.chunked_array(hashes, before.type))
    if len(different):
        first = contents.all_rows(context.plan).slice(int(different[0]), 1)
        place = contents.place(ingest_plan.open_source(context.config.data), first)
        problem = changed_data(context.dir, place, len(different), len(before))
        raise UserError(f"{problem} `distill-at-scale ingest CONFIG run.redo=ingest` ingests the data as it is now.")
    return f"the contents of all {len(before):,} samples are those that were ingested"


def changed_data(run_dir: RunDir, place: str, count: int, compared: int) -> OtherConfiguration:
    difference = f"{place} has another content than when it was ingested, though name and size are the same"
    share = f"{count:,} of {compared:,} compared samples differ"
    problem = f"{run_dir.named} holds the output of ingest for other data: {difference} ({share})."
    return OtherConfiguration(problem, [difference])


def describe(context: RunContext) -> None:
    """Say which data the source holds, which decoders are used, and how much disk space an ingest takes."""
    for line in (context.plan.describe(), *context.plan.notes):
        context.display.say(f"  {line}")
    if context.config.data.frames:
        context.display.say(f"  clips are decoded by {describe_decoders(decoders_for(context.config.data))}")
    planned = validate.planned(context.config, context.plan)
    context.warn_of_data(planned.class_names, planned.counts, planned.tests)
    context.display.say(validate.space(context.config, context.plan, shutil.disk_usage(context.dir.path).free))
