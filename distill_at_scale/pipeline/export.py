"""The command `export`: what a finished run holds, written to files for other programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.progress import Display
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.pipeline.executors.local import LocalExecutor
from distill_at_scale.pipeline.pipeline import Pipeline
from distill_at_scale.pruning import export as exported
from distill_at_scale.storage.redact import next_command
from distill_at_scale.storage.run_dir import OUTPUTS

OWN = {"run.json", "stages", "networks", "timeline.jsonl", *(name for names in OUTPUTS.values() for name in names)}

# how the synthetic set in each format is used
USES = {
    "imagefolder": "torchvision.datasets.ImageFolder({path!r}); {path}/README.md has the normalisation and an example",
    "videofolder": "{path}/README.md has the normalisation and an example",
    "parquet": "datasets.load_dataset({path!r}, split='train'); {path}/README.md has the normalisation and an example",
    "parquet file": "datasets.load_dataset('parquet', data_files={path!r}, split='train')",
    "pt": "torch.load({path!r}, weights_only=True); its images are normalised already",
}


def export(
    config: Config, scores: Sequence[Path], kept: Sequence[Path], sets: Mapping[str, Sequence[Path]], display: Display
) -> None:
    """Write what this configuration's run holds to files: scores, the list of kept samples, and the synthetic set.

    `sets` maps formats of `USES` to the folders or files to write.

    Raises:
        UserError: no file is named, a target cannot be written, or the run folder lacks the output of this configuration.
    """
    distilled = [(kind, path) for kind, paths in sets.items() for path in paths]
    if not scores and not kept and not distilled:
        raise UserError(
            "nothing to export; add --imagefolder DIR, --videofolder DIR, --parquet DIR, --pt FILE, --scores FILE or "
            "--kept FILE"
        )
    pipeline = Pipeline(config, LocalExecutor, display)
    run = pipeline.dir
    for path in (*scores, *kept):
        exported.check(path)
    for path in (*scores, *kept, *(path for kind, path in distilled if kind == "pt")):
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a file to write")
    for path in (*scores, *kept, *(path for _, path in distilled)):
        _check_target(path, run.path)
    pipeline.take_over("evaluate")
    run.fetch()
    for stage, paths in (("score", scores), ("select", kept), ("distill", distilled)):
        if paths and not (run.record(stage) and run.valid(stage, pipeline.inputs(stage))):
            raise UserError(f"{run.named} has no output of {stage} yet; run this first:\n  {next_command(stage)}")
    for path in scores:
        display.say(f"{path}: {exported.scores(path, run / 'scores.parquet', config)} scores")
    for path in kept:
        display.say(f"{path}: {exported.kept(path, run / 'manifest.parquet', config)} kept samples")
    synthetic = synthetic_set.load(run.path) if distilled else None
    for kind, path in distilled:
        getattr(synthetic, f"export_{kind}")(path)
        use = USES["parquet file" if kind == "parquet" and path.suffix.lower() == ".parquet" else kind]
        assert synthetic is not None
        what = f"{len(synthetic)} {synthetic.kind} of {len(synthetic.class_names)} classes"
        display.say(f"{path}: {what}\n  use: {use.format(path=str(path))}")


def _check_target(path: Path, run: Path) -> None:
    """Raise UserError for a target that would replace the run's own files."""
    place, folder = path.resolve(), run.resolve()
    if folder.is_relative_to(place) or (place.is_relative_to(folder) and place.relative_to(folder).parts[0] in OWN):
        raise UserError(f"{path} belongs to the run folder {run}; export to another place")
