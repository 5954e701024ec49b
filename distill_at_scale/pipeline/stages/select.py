"""Stage select: rank the samples of each class by their scores and mark those that are kept."""

from __future__ import annotations

from distill_at_scale.config.fields import result_values
from distill_at_scale.config.load import Config
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import engine
from distill_at_scale.pipeline.stages.context import RunContext, StageOutput
from distill_at_scale.pruning.scoring import extra_columns, score_table
from distill_at_scale.pruning.selection import checks
from distill_at_scale.pruning.selection import select as selection
from distill_at_scale.pruning.selection.ranking import score_columns
from distill_at_scale.storage.run_dir import RunDir
from distill_at_scale.storage.stage_record import StageInputs


def inputs(config: Config, run: RunDir) -> StageInputs:
    resolved = {"criterion": config.criterion, "min_per_class": config.min_per_class, "seed": config.select_seed}
    idle = {f"select.{key}" for key in config.select.idle_keys} - {"select.stratum_start"}  # earlier runs hold that one
    unread = {*engine.REFRESH_KEYS, *idle}
    values = {k: v for k, v in result_values(config.select, "select.").items() if k not in unread}
    values |= {f"select.{key}": value for key, value in resolved.items()}
    values |= {"run.seed": config.run.seed} if config.select.held_out else {}
    return StageInputs(values, {"score": run.content("score")})


def run(context: RunContext, inputs: StageInputs) -> StageOutput:
    config, run_dir, say = context.config, context.dir, context.display.say
    scores, path = run_dir / "scores.parquet", run_dir / "manifest.parquet"
    table, criterion = score_table.facts(scores), score_columns(config.criterion)
    low_is_useful = {name: end == "low" for name, end in table["useful"].items()}
    with manifest.writing(path) as out:
        facts = selection.select(
            scores,
            out,
            config.select,
            criterion,
            low_is_useful,
            config.min_per_class,
            config.select_seed,
            config.run.seed,
        )
        engine.check_inputs(config, PreparedDataset(run_dir / "prepared"), facts["kept_per_class"])
        folders = [run_dir.path] if run_dir.reuse is None else [run_dir.path, run_dir.reuse.path]
        facts["warnings"] = checks.selection_warnings(
            [criterion] if isinstance(criterion, str) else list(criterion),
            table,
            facts["reached"],
            checks.measured_break_point(folders),
            checks.monte_carlo_facts(run_dir / extra_columns.TABLE),
        )
        if context.requested.select.keep == "auto":
            facts["asked"] = {"keep": "auto", "found": facts["asked"]}
        out.facts = facts | {"scores": run_dir.content("score"), "fingerprint": inputs.fingerprint}
    say(f"  kept {facts['kept']} of {facts['of']} samples ({facts['reached']:.4%})")
    if raised := facts["raised_to_minimum"]:
        say(f"  {len(raised)} classes were raised to min_per_class = {config.min_per_class}")
    for line in facts["warnings"]:
        say(f"  warning: {line}")
    return [path], {key: facts[key] for key in ("kept", "of", "reached")}
