"""A machine, made-up data, and planners that measure them."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
from conftest import tiny_config

from distill_at_scale.core.environment import Machine
from distill_at_scale.data.prepared import format as shards
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline.executors.layout import Layout
from distill_at_scale.pipeline.planning import dry_run
from distill_at_scale.pipeline.planning import plan as plans
from distill_at_scale.pipeline.planning.dry_run import DryRun
from distill_at_scale.pipeline.planning.estimates import Planner
from distill_at_scale.pipeline.validate import PlannedDataset

GB = 10**9
MACHINE = Machine(cores=4, memory=16 * GB, gpus=0, gpu_memory=0, disk=100 * GB)
NAMES = ["a", "b", "c"]
FACTS = PlannedDataset((1, 8, 8), NAMES, NAMES, [30] * 3, 12, "images", [6] * 3)


def measure_quickly(monkeypatch) -> None:
    """Measurements of a few milliseconds in one process: the tests do not look at how good they are."""
    monkeypatch.setattr(dry_run, "SECONDS", 0.01)
    monkeypatch.setattr(dry_run, "PROCESSES", 1)
    monkeypatch.setattr(plans, "LOOK", 0.01)


@contextmanager
def planners(place: Path):
    """Planners of configurations, on prepared data of made-up samples in the shape of their facts."""
    made = []

    def make(config, facts: PlannedDataset = FACTS, **options) -> Planner:
        folder = place / f"data{len(made)}"
        write_samples(folder, facts)
        made.append(DryRun(config, facts, layout(config), PreparedDataset(folder), **options))
        return Planner(config, facts, layout(config), made[-1])

    yield make
    for measured in made:
        measured.close()


def write_samples(folder: Path, facts: PlannedDataset) -> None:
    tensors, each = facts.kind == "tensors", 8
    pixels = np.random.default_rng(0).integers(0, 255, (each * facts.classes, *facts.shape), np.uint8)
    pixels = pixels.astype(np.float32) if tensors else pixels
    labels = np.repeat(np.arange(facts.classes), each)
    table = shards.to_table([f"{k:06d}" for k in range(len(labels))], labels, pixels)
    splits = ("train", "test") if facts.tests else ("train",)
    for split in splits:
        shards.write_shards(folder / split, [table], table.schema, 4)
    channels = NetworkSpec("", facts.shape, 2, kind=facts.kind).channel_shape[0]
    counts = {split: [each] * facts.classes for split in splits}
    meta = {"class_names": facts.class_names, "shape": list(facts.shape), "counts": counts, "kind": facts.kind,
            "mean": [0.5] * channels, "std": [0.25] * channels, "chunk": 16}  # fmt: skip
    shards.write_meta(folder, meta, "made up")


def layout(config=None, machine: Machine = MACHINE) -> Layout:
    return Layout(config or tiny_config("x", cluster__address=None), machine)
