"""`data.transform`: derives a harder training split on purpose, to study how selection copes with it.

long_tail, near_duplicates (near_duplicates.py) and low_variance / high_variance (see `data/README.md`). A choice by variance
renumbers the labels and drops classes from the test split too; the others leave it unchanged. It runs once, at the end of
ingest, on the prepared shards: one process, class by class, some MB at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core import rng
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.ingest.channel_stats import ChannelSums, mean_and_std
from distill_at_scale.data.ingest.near_duplicates import duplicated
from distill_at_scale.data.prepared import format as shards
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import Array

MEASURED = 200  # samples per class that measure its variance
READ_BYTES = 32 * 2**20  # of samples in memory at once
BY_VARIANCE = ("low_variance", "high_variance")


@dataclass(frozen=True)
class DerivedCounts:
    """What a transform will leave of the listed classes; for a choice by variance, the largest classes stand in."""

    classes: list[int]  # their numbers in the source's order
    counts: list[int]  # of their training samples


def derived_counts(data: DataSection, counts: Sequence[int], seed: int) -> DerivedCounts:
    """Predicts the result from the counts of listed training samples [C]. Raises UserError for too few classes."""
    classes = list(range(len(counts)))
    if data.transform == "long_tail":
        return DerivedCounts(classes, long_tail_counts(data, counts, seed))
    if data.transform == "near_duplicates":
        return DerivedCounts(classes, [count * data.copies for count in counts])
    if data.transform in BY_VARIANCE:
        largest = sorted(classes, key=lambda label: -counts[label])[: variance_class_count(data, len(counts))]
        return DerivedCounts(sorted(largest), [counts[label] for label in sorted(largest)])
    return DerivedCounts(classes, list(counts))


def derive(folder: Path, data: DataSection, seed: int) -> dict[str, Any]:
    """Replace the shards of a prepared set in `folder`, which is not yet published; returns its new metadata.

    Raises UserError for fewer classes than the transform needs, and if near-duplicates would repeat an id.
    """
    before = PreparedDataset(folder)
    sums, names = ChannelSums(before.shape, before.kind == "tensors"), before.class_names

    def summed(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        for table in tables:
            sums.add(shards.pixels_of(table, os.cpu_count() or 1))
            yield table

    if data.transform in BY_VARIANCE:
        classes, facts = _classes_by_variance(before, data, seed)
        labels = {old: new for new, old in enumerate(classes)}
        for split in before.meta["counts"]:
            rows = _rows(before, split, labels)
            _rewrite(before, split, summed(rows) if split == "train" else rows, data)
        names = [names[label] for label in classes]
    elif data.transform == "long_tail":
        kept: dict[int, Array] = {}
        counts = before.counts("train")
        for label, keep in enumerate(long_tail_counts(data, counts, seed)):
            kept[label] = np.zeros(counts[label], bool)
            kept[label][rng.numpy_generator(seed, "long tail", label).permutation(counts[label])[:keep]] = True
        _rewrite(before, "train", summed(_rows(before, "train", {label: label for label in kept}, kept)), data)
        facts = {"imbalance": data.imbalance}
    else:
        _rewrite(before, "train", summed(duplicated(before, data, seed)), data)
        facts = {"copies": data.copies}
    facts = {"name": data.transform, **facts, "seed": seed, "counts_before": before.meta["counts"]}
    mean, std = mean_and_std(sums.sums, sums.tensors)
    after = {}
    for split in before.meta["counts"]:
        tables = (pq.ParquetFile(path).read(["label"]) for path in sorted((folder / split).glob("shard-*.parquet")))
        counted = [np.bincount(table["label"].to_numpy(), minlength=len(names)) for table in tables]
        after[split] = sum(counted, np.zeros(len(names), np.int64)).tolist()
    meta = {**before.meta, "class_names": names, "counts": after, "mean": mean, "std": std, "transform": facts}
    meta.pop("fingerprint")
    shards.write_meta(folder, meta)
    return meta


def long_tail_counts(data: DataSection, counts: Sequence[int], seed: int) -> list[int]:
    """How many samples of each class [C] a long tail keeps. Raises UserError for a single class."""
    classes = len(counts)
    if classes < 2:
        raise UserError(f"data.transform = long_tail needs at least 2 classes, the data have {classes}; leave it out")
    ranks = rng.numpy_generator(seed, "long tail order").permutation(classes)
    sizes = max(counts) * data.imbalance ** (-ranks / (classes - 1))
    return np.maximum(1, np.minimum(counts, np.floor(sizes + 0.5))).astype(int).tolist()


def variance_class_count(data: DataSection, classes: int) -> int:
    """How many of `classes` a choice by variance keeps. Raises UserError if there are too few."""
    wanted = data.variance_classes or max(2, classes // 2)
    if wanted > classes:
        asked = f"data.variance_classes = {wanted}" if data.variance_classes else "at least 2 classes"
        problem = f"data.transform = {data.transform} is to choose {asked}, but the data have {classes}"
        raise UserError(f"{problem}; ask for fewer, or leave the transform out")
    return wanted


def _rows(
    prepared: PreparedDataset, split: str, labels: Mapping[int, int], kept: Mapping[int, Array] | None = None
) -> Iterator[pa.Table]:
    """Rows of the classes in `labels` (old -> new), in order; `kept`: mask over the samples of each class."""
    places = dict.fromkeys(labels, 0)
    for group in prepared.groups(split):
        if group.label not in labels:
            continue
        table, first = prepared.read(group, split), places[group.label]
        places[group.label] += group.rows
        if kept is not None:
            table = table.filter(pa.array(kept[group.label][first : first + group.rows]))
        new = pa.array(np.full(table.num_rows, labels[group.label], np.int32))
        yield table.set_column(1, table.schema.field("label"), new)


def _classes_by_variance(prepared: PreparedDataset, data: DataSection, seed: int) -> tuple[list[int], dict[str, Any]]:
    """The classes of the smallest or largest variance, ascending, and the facts for dataset.json.

    The variance of a class is that around its mean sample, averaged over pixels (on the scale 0..1; of tensors, in units of
    the training values' variance), from at most MEASURED samples.
    """
    wanted = variance_class_count(data, len(prepared.class_names))
    at_once = max(1, READ_BYTES // (8 * prepared.sample_bytes))
    scale = np.array(prepared.std).reshape(-1, *(1,) * (len(prepared.shape) - 1)) if prepared.kind == "tensors" else 255
    variances = []
    for label, count in enumerate(prepared.counts("train")):
        places = np.sort(rng.numpy_generator(seed, "class variance", label).permutation(count)[:MEASURED])
        total, squares = np.zeros(prepared.shape), np.zeros(prepared.shape)
        for start in range(0, len(places), at_once):
            samples = prepared.take("train", label, places[start : start + at_once]).astype(np.float64)
            total += samples.sum(0)
            squares += (samples * samples).sum(0)
        variance = np.maximum(squares / len(places) - (total / len(places)) ** 2, 0)
        variances.append(float((variance / scale**2).mean()))
    sign = 1 if data.transform == "low_variance" else -1
    ranked = sorted(range(len(variances)), key=lambda label: (sign * variances[label], label))
    named = {name: float(f"{v:.6g}") for name, v in zip(prepared.class_names, variances, strict=True)}
    facts = {"variance_classes": wanted, "variances": named, "changes": list(prepared.meta["counts"])}
    return sorted(ranked[:wanted]), facts


def _rewrite(prepared: PreparedDataset, split: str, tables: Iterable[pa.Table], data: DataSection) -> None:
    old, new = prepared.folder / split, prepared.folder / f"{split}.derived"
    if not prepared.groups(split):
        return
    kind = pq.read_schema(next(iter(sorted(old.glob("*.parquet"))))).remove_metadata()
    group = shards.group_rows(prepared.shape, "jpeg" in kind.names, data.chunk, prepared.dtype.itemsize)
    shards.write_shards(new, tables, kind, group)
    shutil.rmtree(old)
    os.replace(new, old)


def describe(meta: Mapping[str, Any]) -> str:
    """One sentence about the transform of a prepared set, from its metadata."""
    facts, before, after = meta["transform"], meta["transform"]["counts_before"]["train"], meta["counts"]["train"]
    how = {
        "long_tail": f"a long tail, its classes down to 1 / {facts.get('imbalance', 1):g} of the largest",
        "near_duplicates": f"near-duplicates, {facts.get('copies', 1)} of every sample",
        "low_variance": f"the {len(after)} classes of {len(before)} that vary least",
        "high_variance": f"the {len(after)} classes of {len(before)} that vary most",
    }[facts["name"]]
    return f"the training split was changed on purpose ({how}): {sum(after):,} samples of {sum(before):,}"
