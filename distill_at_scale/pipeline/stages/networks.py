"""What a method needs before its first step: experts or a teacher, and ranked patches of real images.

They lie in `networks/<fingerprint>/` of the run folder, where the fingerprint covers whatever decides them, so that they are
never used for another configuration; what is there is not made again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from distill_at_scale.config.load import Config
from distill_at_scale.core.progress import Display
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import engine as distill
from distill_at_scale.distillation.engine import DistillPaths
from distill_at_scale.distillation.methods.shared import patch_ranking
from distill_at_scale.pipeline import fingerprints
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.executors.base import Executor
from distill_at_scale.pruning.scoring.scorer import score_part_path
from distill_at_scale.storage.run_dir import RunDir


def places_of(config: Config, run: RunDir, work: Path) -> DistillPaths:
    """Where the distillation of a run reads and writes."""
    folder = run / "networks" / fingerprints.networks(config, run).fingerprint[:16]
    folder.mkdir(parents=True, exist_ok=True)
    run.take_over_files(folder.relative_to(run.path).as_posix())
    return DistillPaths(run / "prepared", run / "manifest.parquet", work, run / "metrics.jsonl", folder)


def prepare(config: Config, data: PreparedDataset, places: DistillPaths, executor: Executor, display: Display) -> None:
    """Make what is missing."""
    if missing := distill.missing_networks(config, places):
        with display.meter("networks", len(missing), "networks") as meter:
            tasks.make_networks(executor, config, places, missing, meter.advance)
    if distill.method_class(config).ranks_patches:
        _rank_patches(config, data, places, executor, display)


def _rank_patches(
    config: Config, data: PreparedDataset, places: DistillPaths, executor: Executor, display: Display
) -> None:
    """The table of ranked patches, beside the teacher."""
    target, pieces = (make(places.networks, config) for make in (patch_ranking.table_path, patch_ranking.parts_folder))
    section = config.distill.rded
    if not target.exists():
        pieces.mkdir(parents=True, exist_ok=True)
        candidates, chunks = patch_ranking.draw_candidates(places.manifest, config, pieces), data.chunks("train")
        before = sum(chunk.rows for chunk in chunks if score_part_path(pieces, chunk).exists())
        with display.meter("rank", sum(chunk.rows for chunk in chunks), "samples", before) as meter:
            tasks.rank_patches(executor, config, places, chunks, meter.advance)
        patch_ranking.merge([score_part_path(pieces, chunk) for chunk in chunks], candidates, section.crops, target)
        shutil.rmtree(pieces)
    wanted = config.distill.ipc * section.factor**2
    if few := sum(kept < wanted for kept in patch_ranking.images_per_class(target, section.crops)):
        display.say(f"  {few} classes have fewer than {wanted} candidates: further crops of these are used")
