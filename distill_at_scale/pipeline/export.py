"""The command `export`: what a finished run holds, written to files for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.progress import Display
from distill_at_scale.pipeline.stages import score, select
from distill_at_scale.pruning import export as exported
from distill_at_scale.storage.run_dir import RunDir


def export(config: Config, scores: Sequence[Path], kept: Sequence[Path], display: Display) -> None:
    """Write the scores and the list of kept samples of this configuration's run to files.

    Raises:
        UserError: no file is named, or the run folder lacks the output of this configuration.
    """
    if not scores and not kept:
        raise UserError("nothing to export; add --scores FILE, --kept FILE or both (*.parquet, *.csv or *.json)")
    run = RunDir.of(config.run)
    for path in (*scores, *kept):
        exported.check(path)
    run.fetch()
    for stage, paths, inputs in (("score", scores, score.inputs), ("select", kept, select.inputs)):
        if paths and not (run.record(stage) and run.valid(stage, inputs(config, run))):
            raise UserError(f"{run.named} has no output of {stage} yet; run `distill-at-scale {stage} CONFIG` first")
    for path in scores:
        display.say(f"{path}: {exported.scores(path, run / 'scores.parquet', config)} scores")
    for path in kept:
        display.say(f"{path}: {exported.kept(path, run / 'manifest.parquet', config)} kept samples")
