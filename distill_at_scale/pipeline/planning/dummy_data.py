"""Made-up prepared sets: pixels that mean nothing in the shape of the real data, so that the stages' own code can be timed.

Such a set names all classes of the real one, and holds samples of some.
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
from distill_at_scale.pipeline.planning.facts import Facts
from distill_at_scale.pruning.proxies.train import checkpoint_path

DISTINCT = 16  # images that are encoded; the others repeat them


@dataclass(frozen=True)
class MadeUp:
    """A prepared set, and a manifest that keeps all of it."""

    folder: Path

    @property
    def prepared(self) -> Path:
        return self.folder / "prepared"

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.parquet"


def write(
    folder: Path, facts: Facts, labels: Sequence[int], each: int, group: int | None = None, names: int | None = None
) -> MadeUp:
    """`each` samples of every label, ascending, in row groups of at most `group`; `names` limits the classes named."""
    made, class_names = MadeUp(folder), facts.class_names[:names]
    ids = [f"{label:06d}/{k:06d}" for label in labels for k in range(each)]
    found = np.repeat(np.asarray(labels, np.int32), each)
    table = _table(facts, ids, found)
    group = group or shards.group_rows(facts.shape, facts.jpeg, max(1, each))
    shards.write_shards(made.prepared / "train", [table], table.schema, group)
    counts = np.bincount(found, minlength=len(class_names)).tolist()
    channels = NetworkSpec("", facts.shape, len(class_names), kind=facts.kind).columns[0]
    meta = {"class_names": class_names, "shape": list(facts.shape), "counts": {"train": counts}, "kind": facts.kind,
            "mean": [0.5] * channels, "std": [0.25] * channels, "chunk": len(ids), "jpeg": facts.jpeg}  # fmt: skip
    shards.write_meta(made.prepared, meta, "made up")
    _write_manifest(made.manifest, ids, found, counts)
    return made


def images(shape: Sequence[int], count: int) -> np.ndarray:
    """uint8 [count, *shape]: coarse random patterns, a few different ones over and over."""
    draw = np.random.default_rng(0)
    tall, wide = (1, *shape)[-2:]
    coarse = draw.integers(40, 216, (min(count, DISTINCT), *shape[:-2], -(-tall // 8), -(-wide // 8)))
    whole = coarse.repeat(8, -2).repeat(8, -1)[..., :tall, :wide].astype(np.uint8)
    return whole[np.arange(count) % len(whole)].reshape(count, *shape)


def _table(facts: Facts, ids: list[str], labels: np.ndarray) -> pa.Table:
    if facts.kind == "tensors":
        return shards.to_table(ids, labels.tolist(), images(facts.shape, len(ids)).astype(np.float32) / 64 - 2)
    if not facts.jpeg:
        return shards.to_table(ids, labels.tolist(), images(facts.shape, len(ids)))
    some = [encode(shards.as_image(image), 90) for image in images(facts.shape, min(len(ids), DISTINCT))]
    repeated = [some[k % len(some)] for k in range(len(ids))]
    return shards.to_jpeg_table(ids, labels.tolist(), repeated, facts.shape)


def _write_manifest(path: Path, ids: list[str], labels: np.ndarray, counts: list[int]) -> None:
    columns = [pa.array(ids), labels, np.zeros(len(ids)), np.zeros(len(ids), np.int32), np.ones(len(ids), bool)]
    table = pa.table([pa.array(column) for column in columns], names=manifest.SCHEMA.names).cast(manifest.SCHEMA)
    manifest.write(path, table, {"kept_per_class": counts})


def write_checkpoints(folder: Path, spec: NetworkSpec, count: int) -> None:
    """Proxies as trial 0 leaves them, untrained."""
    weights = {f"weight.{key}": value for key, value in spec.build(0).state_dict().items()}
    for epoch in range(count):
        safetensors_io.save(checkpoint_path(folder, 0, epoch), weights, {})


def training_images(shape: Sequence[int], count: int) -> torch.Tensor:
    """float32 [count, *shape], as a synthetic set holds them."""
    return torch.from_numpy(images(shape, count)).float() / 64 - 2
