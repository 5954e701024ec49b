"""Configurations of small data, and how they become prepared data without a pipeline."""

from __future__ import annotations

from pathlib import Path

from conftest import TINY

from distill_at_scale.config import load as configuration
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.ingest.chunks import ingest_chunk, part_path, recipe_of
from distill_at_scale.data.ingest.merge import merge
from distill_at_scale.data.prepared.dataset import PreparedDataset


def folder_config(root: Path, **data) -> configuration.Config:
    return configuration.validate({"data": {"source": "imagefolder", "path": str(root), "size": 8, "chunk": 4, **data}})


def digits_config(seed: int = 0, **data) -> configuration.Config:
    return configuration.validate({"run": {"seed": seed}, "data": {**TINY["data"], **data}})


def decode(
    plan: ingest.IngestPlan, config: configuration.Config, parts: Path, backwards: bool = False
) -> tuple[int, int]:
    """Ingest each chunk into its part file; returns (used, rejected)."""
    parts.mkdir(parents=True, exist_ok=True)
    source, counts = ingest.open_source(config.data), []
    for split, index, rows in plan.chunks(config.data.chunk)[:: -1 if backwards else 1]:
        counts.append(ingest_chunk(source, recipe_of(config), rows, part_path(parts, split, index)))
    return sum(used for used, _ in counts), sum(bad for _, bad in counts)


def prepare(config: configuration.Config, folder: Path, backwards: bool = False) -> PreparedDataset:
    plan = ingest.plan(config)
    decode(plan, config, folder / "pieces", backwards)
    merge(plan, folder / "pieces", folder / "prepared", config.data)
    return PreparedDataset(folder / "prepared")
