"""Stage distill: distil the kept samples into a synthetic set.

What a method needs before its first step (experts or a teacher, ranked patches) is in `networks/<fingerprint>/` of the run
folder. The fingerprint covers all that decides it, so it is reused for the same configuration and no other.
"""

from __future__ import annotations

import shutil
from typing import Any

from distill_at_scale.config.fields import Section, flatten, result_values
from distill_at_scale.config.load import Config
from distill_at_scale.config.methods import DistillSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import engine, result_checks, synthetic_set
from distill_at_scale.distillation.engine import DistillPaths
from distill_at_scale.distillation.methods.shared import patch_ranking
from distill_at_scale.pipeline import validate
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.monitoring.distillation_log import DistillationLog
from distill_at_scale.pipeline.stages.context import RunContext, StageOutput
from distill_at_scale.pruning.scoring.scorer import score_part_path
from distill_at_scale.storage.run_dir import RunDir
from distill_at_scale.storage.stage_record import StageInputs

METHODS = tuple(name for name, field in DistillSection.model_fields.items() if isinstance(field.default, Section))
ITE_KEYS = ("runtime.probes", "runtime.decay")  # that only runtime.rule = ite reads


def inputs(config: Config, run: RunDir) -> StageInputs:
    method = config.distill.method
    section = getattr(config.distill, method, None)
    values = {k: v for k, v in result_values(config.distill, "distill.").items() if k.split(".")[1] not in METHODS}
    values |= result_values(section, f"distill.{method}.") if section else {}
    values.pop(f"distill.{method}.teacher_weights", None)  # their location; their content is hashed
    values |= {"distill.steps": engine.step_count(config), "distill.seed": config.distill_seed}
    if not engine.prunes(config):
        values["runtime.rule"] = "none"
    else:
        both_tails = engine.method_class(config).both_tails
        unused = () if config.runtime.rule == "ite" else ITE_KEYS if both_tails else ("runtime.tail", *ITE_KEYS)
        values |= {k: v for k, v in result_values(config.runtime, "runtime.").items() if k not in unused}
    if config.select.refresh:
        values |= {key: value for key, value in flatten(config.select, "select.").items() if key in engine.REFRESH_KEYS}
    content = {stage: run.content(stage) for stage in ("ingest", "select")}
    try:  # the hash of a teacher's ready-made weights; where the file is gone, that of the finished stage
        digest = engine.method_class(config).network_options(config).get("teacher_weights")
    except UserError:
        if (record := run.record("distill")) is None or "teacher weights" not in record["content"]:
            raise
        digest = record["content"]["teacher weights"]
    return StageInputs(values, content | ({"teacher weights": digest} if digest else {}))


def network_inputs(config: Config, run: RunDir) -> StageInputs:
    """What decides the weights of a method's experts or teacher."""
    options = engine.method_class(config).network_options(config)
    content = {stage: run.content(stage) for stage in ("ingest", "select")}
    precision = {k: v for k, v in result_values(config.distill, "distill.").items() if k == "distill.precision"}
    return StageInputs({**options, "distill.seed": config.distill_seed, **precision}, content)


def run(context: RunContext, inputs: StageInputs) -> StageOutput:
    config, run_dir, display = context.config, context.dir, context.display
    data = PreparedDataset(run_dir / "prepared")
    validate.check_networks(config, data)
    engine.check_inputs(config, data, manifest.facts(run_dir / "manifest.parquet")["kept_per_class"])
    networks = run_dir / "networks" / network_inputs(config, run_dir).fingerprint[:16]
    networks.mkdir(parents=True, exist_ok=True)
    run_dir.take_over_files(networks.relative_to(run_dir.path).as_posix())
    work = run_dir.work("distill", inputs)
    paths = DistillPaths(run_dir / "prepared", run_dir / "manifest.parquet", work, run_dir / "metrics.jsonl", networks)
    if reason := engine.runtime_card(config).get("reason"):
        display.say(f"  runtime pruning is not applicable: {reason}; distilling without")
    prepare(context, config, data, paths)
    with display.meter("distill", engine.step_count(config), "steps") as meter:
        log = DistillationLog(context.observers.emit, meter, display.say)

        def report(line: dict[str, Any]) -> None:
            log(line)
            if context.watch is not None:
                context.watch(line)

        tasks.distill(context.executor, config, paths, report)
    records = {stage: run_dir.record(stage) or {} for stage in ("ingest", "score", "select")}
    earlier = {stage: record.get("fingerprint") for stage, record in records.items()}
    card: dict[str, Any] = {"fingerprints": {**earlier, "distill": inputs.fingerprint}}
    synthetic, facts = synthetic_set.load(work / "synthetic"), dict[str, Any](steps=engine.step_count(config))
    facts["start_seconds"] = log.start_seconds
    if warnings := result_checks.warnings(config, synthetic, data, paths.manifest, paths.log):
        card["warnings"] = facts["warnings"] = warnings
    if engine.prunes(config) and (dropped := result_checks.dropped_share(paths.log)) is not None:
        facts["dropped_share"] = round(dropped, 4)
        asked = f"runtime.drop: {config.runtime.drop:.1%}"
        display.say(f"  runtime pruning left out {dropped:.1%} of the real batches ({asked})")
    if every := config.select.refresh:
        renewed, times = result_checks.logged(paths.log, "renewed")[-1], (engine.step_count(config) - 1) // every
        card["refresh"] = facts["refresh"] = {"every": every, "times": times, "renewed_share": round(renewed, 4)}
        display.say(f"  the kept samples were renewed {times} times; {renewed:.1%} of them are not in the first set")
    for line in warnings:
        display.say(f"  warning: {line}")
    synthetic_set.publish_in_run(synthetic, run_dir / "synthetic", card)
    return [run_dir / "synthetic"], {"images": len(synthetic.labels), **facts}


def prepare(context: RunContext, config: Config, data: PreparedDataset, paths: DistillPaths) -> None:
    """Make what the method needs before its first step: experts or a teacher, and ranked patches."""
    if missing := engine.missing_networks(config, paths):
        for line in validate.check_weights_on_data(config, data, teacher_only=True):
            context.display.say(line)
        samples = engine.method_class(config).network_epochs(config) * manifest.facts(paths.manifest)["kept"]
        unit = "samples" if samples else "networks"
        name = "1 network" if len(missing) == 1 else f"{len(missing)} networks"
        with context.display.meter(name, len(missing) * (samples or 1), unit) as meter:
            tasks.make_networks(context.executor, config, paths, missing, samples, meter.advance)
    if engine.method_class(config).ranks_patches:
        _rank_patches(context, config, data, paths)
    if paths.state.exists():
        context.display.say("  resuming from the last checkpoint")


def _rank_patches(context: RunContext, config: Config, data: PreparedDataset, paths: DistillPaths) -> None:
    """Publish the table of ranked patches next to the teacher."""
    section = config.distill.rded
    target = patch_ranking.table_path(paths.networks, config)
    if not target.exists():
        parts = patch_ranking.parts_folder(paths.networks, config)
        parts.mkdir(parents=True, exist_ok=True)
        candidates = patch_ranking.draw_candidates(paths.manifest, config, parts)
        chunks = data.chunks("train")
        files = [score_part_path(parts, chunk) for chunk in chunks]
        finished = sum(chunk.rows for chunk, file in zip(chunks, files, strict=True) if file.exists())
        with context.display.meter("rank", sum(chunk.rows for chunk in chunks), "samples", finished) as meter:
            tasks.rank_patches(context.executor, config, paths, chunks, meter.advance)
        patch_ranking.merge(files, candidates, section.crops, target)
        shutil.rmtree(parts)
    needed = config.distill.ipc * section.factor**2
    if few := sum(images < needed for images in patch_ranking.images_per_class(target, section.crops)):
        context.display.say(f"  {few} classes have fewer than {needed} candidates: further crops of these are used")
