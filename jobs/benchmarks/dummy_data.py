"""Synthetic prepared sets: random pixels in the shape of the real data, to time the stages' own code.

A set names all classes of the real one and holds samples of some of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from distill_at_scale.core import safetensors_io
from distill_at_scale.data.codecs.image import encode
from distill_at_scale.data.prepared import format as shards
from distill_at_scale.data.prepared import manifest
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pipeline.validate import PlannedDataset
from distill_at_scale.pruning.proxies.train import checkpoint_path

DISTINCT = 16  # images that are encoded; the others repeat them


@dataclass(frozen=True)
class DummySet:
    """A prepared set, and a manifest that keeps all of it."""

    folder: Path

    @property
    def prepared(self) -> Path:
        return self.folder / "prepared"

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.parquet"


def write(
    folder: Path,
    facts: PlannedDataset,
    labels: Sequence[int],
    each: int,
    group: int | None = None,
    names: int | None = None,
) -> DummySet:
    """Write `each` samples of every label (ascending) in row groups of at most `group`; `names` limits the class names."""
    result, class_names = DummySet(folder), facts.class_names[:names]
    ids = [f"{label:06d}/{k:06d}" for label in labels for k in range(each)]
    column = np.repeat(np.asarray(labels, np.int32), each)
    if facts.kind == "tensors":
        pixels = images(facts.shape, len(ids)).astype(np.float32) / 64 - 2
        table = shards.to_table(ids, column.tolist(), pixels)
    elif facts.jpeg:
        encoded = [encode(shards.stack_frames(image), 90) for image in images(facts.shape, min(len(ids), DISTINCT))]
        repeated = [encoded[k % len(encoded)] for k in range(len(ids))]
        table = shards.to_jpeg_table(ids, column.tolist(), repeated, facts.shape)
    else:
        table = shards.to_table(ids, column.tolist(), images(facts.shape, len(ids)))
    group = group or shards.group_rows(facts.shape, facts.jpeg, max(1, each))
    shards.write_shards(result.prepared / "train", [table], table.schema, group)
    counts = np.bincount(column, minlength=len(class_names)).tolist()
    channels = NetworkSpec("", facts.shape, len(class_names), kind=facts.kind).channel_shape[0]
    meta = {"class_names": class_names, "shape": list(facts.shape), "counts": {"train": counts}, "kind": facts.kind,
            "mean": [0.5] * channels, "std": [0.25] * channels, "chunk": len(ids), "jpeg": facts.jpeg}  # fmt: skip
    shards.write_meta(result.prepared, meta, "made up")
    columns = [pa.array(ids), column, np.zeros(len(ids)), np.zeros(len(ids), np.int32), np.ones(len(ids), bool)]
    kept = pa.table([pa.array(values) for values in columns], names=manifest.SCHEMA.names).cast(manifest.SCHEMA)
    manifest.write(result.manifest, kept, {"kept_per_class": counts})
    return result


def images(shape: Sequence[int], count: int) -> np.ndarray:
    """uint8 [count, *shape]: coarse random patterns; a few different ones repeat."""
    generator = np.random.default_rng(0)
    height, width = (1, *shape)[-2:]
    coarse = generator.integers(40, 216, (min(count, DISTINCT), *shape[:-2], -(-height // 8), -(-width // 8)))
    distinct = coarse.repeat(8, -2).repeat(8, -1)[..., :height, :width].astype(np.uint8)
    return distinct[np.arange(count) % len(distinct)].reshape(count, *shape)


def write_checkpoints(folder: Path, spec: NetworkSpec, count: int) -> None:
    """Untrained proxy checkpoints of trial 0."""
    weights = {f"weight.{key}": value for key, value in spec.build(0).state_dict().items()}
    for epoch in range(count):
        safetensors_io.save(checkpoint_path(folder, 0, epoch), weights, {})


def training_images(shape: Sequence[int], count: int) -> torch.Tensor:
    """float32 [count, *shape], like the images of a synthetic set."""
    return torch.from_numpy(images(shape, count)).float() / 64 - 2
