"""The controls of `evaluate.controls`: the run's distillation again, without pruning or on samples kept at random.

A control has the method, steps and seed of the run. Its set is in `controls/<name>-<fingerprint>/` of the run folder. The
fingerprint covers all that decides the set, so it is not distilled again for other settings of `evaluate`, nor in a run that
reuses this one.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill_at_scale.config.load import Config
from distill_at_scale.core import rng
from distill_at_scale.core.atomic_files import write_json
from distill_at_scale.core.events import Event
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import engine, synthetic_set
from distill_at_scale.distillation.engine import DistillPaths
from distill_at_scale.distillation.evaluate import UNPRUNED
from distill_at_scale.pipeline.executors import tasks
from distill_at_scale.pipeline.monitoring.distillation_log import DistillationLog
from distill_at_scale.pipeline.stages import distill
from distill_at_scale.pipeline.stages.context import RunContext
from distill_at_scale.storage.run_dir import RunDir
from distill_at_scale.storage.stage_record import StageInputs

FACTS = "control.json"  # written last: the control is finished


@dataclass(frozen=True)
class Control:
    """A distilled control: the folder of its set, and facts for evaluation.json (kept, of, steps, seconds)."""

    name: str
    folder: Path
    facts: dict[str, Any]


def applicable(config: Config, kept: int, of: int) -> list[str]:
    """The configured controls that differ from the run itself, which keeps `kept` of `of` training samples."""
    if engine.method_class(config).first_kept(config):  # of all samples, the first are the same
        return [name for name in config.evaluate.controls if name != UNPRUNED]
    return [name for name in config.evaluate.controls if kept < of or (name == UNPRUNED and engine.prunes(config))]


def distil(context: RunContext, data: PreparedDataset) -> list[Control]:
    """Distil the controls that are not finished. Says which ones are the run itself, and leaves them out."""
    kept, of = (manifest.facts(context.dir / "manifest.parquet")[key] for key in ("kept", "of"))
    names = applicable(context.config, kept, of)
    if left_out := [name for name in context.config.evaluate.controls if name not in names]:
        why = "the run keeps all training samples" if kept == of else "the run prunes nothing"
        if engine.method_class(context.config).first_kept(context.config):
            why = f"{context.config.distill.method} would take the same samples without pruning"
        context.display.say(f"  evaluate.controls: {', '.join(left_out)} left out, because {why}")
    return [_control(context, data, name) for name in names]


def control_config(config: Config, name: str) -> Config:
    """The configuration that a control is distilled with."""
    changes: dict[str, Any] = {"distill": config.distill.model_copy(update={"evaluate_every": 0})}
    changes["select"] = config.select.model_copy(update={"refresh": None})
    if name == UNPRUNED:
        changes["runtime"] = config.runtime.model_copy(update={"rule": "none"})
    return config.model_copy(update=changes)


def _control(context: RunContext, data: PreparedDataset, name: str) -> Control:
    config, run_dir, display = control_config(context.config, name), context.dir, context.display
    values, content = distill.inputs(config, run_dir).config, _content(run_dir, name)
    folder = run_dir / "controls" / f"{name}-{StageInputs(values, content).fingerprint[:16]}"
    run_dir.take_over_files(folder.relative_to(run_dir.path).as_posix())
    if (folder / FACTS).exists():
        display.say(f"  control {name}: already distilled")
        return Control(name, folder / synthetic_set.SET, json.loads((folder / FACTS).read_text(encoding="utf-8")))
    clock, network_values = time.perf_counter(), distill.network_inputs(config, run_dir).config
    networks = run_dir / "networks" / StageInputs(network_values, content).fingerprint[:16]
    files = folder / "manifest.parquet", folder / "work", folder / "metrics.jsonl"
    paths = DistillPaths(run_dir / "prepared", *files, networks)
    for path in (paths.work, networks):
        path.mkdir(parents=True, exist_ok=True)
    facts = write_manifest(run_dir / "manifest.parquet", paths.manifest, data, name, context.config.select_seed)
    display.say(f"  control {name}: distilling with {facts['kept']} of {facts['of']} samples")
    distill.prepare(context, config, data, paths)
    with display.meter(f"control {name}", engine.step_count(config), "steps") as meter:

        def emit(event: Event) -> None:
            if event.what != "log":  # the curves of the run are those of its own distillation
                context.observers.emit(event)

        tasks.distill(context.executor, config, paths, DistillationLog(emit, meter, display.say))
    (paths.work / synthetic_set.SET).replace(folder / synthetic_set.SET)
    for path in (paths.manifest, paths.state):
        run_dir.drop(path.relative_to(run_dir.path).as_posix())
    shutil.rmtree(paths.work)
    facts |= {"steps": engine.step_count(config), "seconds": round(time.perf_counter() - clock, 3)}
    write_json(folder / FACTS, facts)
    return Control(name, folder / synthetic_set.SET, facts)


def _content(run_dir: RunDir, name: str) -> dict[str, str]:
    """What a control depends on besides the configuration; an unpruned one does not depend on the selection."""
    stages: Sequence[str] = ("ingest",) if name == UNPRUNED else ("ingest", "select")
    return {"control": name, **{stage: run_dir.content(stage) for stage in stages}}


def write_manifest(source: Path, target: Path, data: PreparedDataset, name: str, seed: int) -> dict[str, Any]:
    """Write the manifest of a control; returns its facts. random_keep ranks each class at random and keeps as many as `source`;
    unpruned keeps all. Neither keeps samples that are held out.
    """
    ends, chosen = np.cumsum(data.counts("train"))[:-1], manifest.facts(source)["kept_per_class"]
    ranks = manifest.read(source, ["rank"])[0]["rank"].to_numpy().copy()
    masks = np.split(ranks != manifest.HELD_OUT, ends)
    total = int(sum(mask.sum() for mask in masks))
    if name != UNPRUNED:
        for label, (mask, own) in enumerate(zip(masks, np.split(ranks, ends), strict=True)):
            order = rng.numpy_generator(seed, "control random_keep", label).permutation(int(mask.sum()))
            own[mask], mask[mask] = order, order < chosen[label]
    counts = {"kept": int(sum(mask.sum() for mask in masks)), "of": total}
    facts = {"control": name, **counts, "kept_per_class": [int(mask.sum()) for mask in masks]}
    manifest.write_like(source, target, {"rank": ranks, "kept": np.concatenate(masks)}, facts)
    return counts
