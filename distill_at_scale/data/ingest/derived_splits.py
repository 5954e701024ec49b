"""`data.transform`: a training split made harder on purpose, to see how selection bears it.

long_tail         the class of rank c of C keeps n_max * imbalance^(-c / (C - 1)) of its samples, at least one. The ranks
                  are a seeded permutation, the samples a seeded draw: a steeper tail keeps a part of a flatter one.
near_duplicates   every sample `copies` times: once as it is, the others jittered a little (near_duplicates.py); ids `<id>#1`...
low_variance, high_variance
                  the variance_classes classes whose samples differ least or most from each other, pixel by pixel. Labels
                  are renumbered and the class names follow. IN THIS CASE THE TEST SPLIT CHANGES TOO: it keeps these
                  classes only. By the others it stays as it is.

It is done once, at the end of ingest, on the prepared shards: one process, class by class, some MB at a time. Channel
statistics are those of the derived split. dataset.json says under `transform` what was done. No torch here.
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
from distill_at_scale.core.atomic_files import file_digests
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.ingest.channel_stats import Moments
from distill_at_scale.data.ingest.near_duplicates import duplicated
from distill_at_scale.data.prepared import format as shards
from distill_at_scale.data.prepared.dataset import PreparedDataset

MEASURED = 200  # samples of a class whose variance is measured
READ_BYTES = 32 * 2**20  # of samples in memory at once
BY_VARIANCE = ("low_variance", "high_variance")

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Forecast:
    """What will be left of the classes that a source lists; of a choice by variance the largest classes stand in."""

    classes: list[int]  # their numbers in the source's order
    counts: list[int]  # of their training samples


def forecast(data: DataSection, counts: Sequence[int], seed: int) -> Forecast:
    """Counts of the listed training samples [C] -> what the transform makes of them.

    Raises UserError for fewer classes than it needs.
    """
    every = list(range(len(counts)))
    if data.transform == "long_tail":
        return Forecast(every, tail(data, counts, seed))
    if data.transform == "near_duplicates":
        return Forecast(every, [count * data.copies for count in counts])
    if data.transform in BY_VARIANCE:
        largest = sorted(every, key=lambda label: -counts[label])[: wanted_classes(data, len(counts))]
        return Forecast(sorted(largest), [counts[label] for label in sorted(largest)])
    return Forecast(every, list(counts))


def derive(folder: Path, data: DataSection, seed: int) -> dict[str, Any]:
    """Replace the shards of a prepared set in `folder`, which nobody reads yet; returns its new metadata.

    Raises UserError for fewer classes than the transform needs, and for ids that those of near-duplicates would meet.
    """
    before = PreparedDataset(folder)
    moments, names = Moments(before.shape, before.kind == "tensors"), before.class_names
    if data.transform in BY_VARIANCE:
        names, about = _by_variance(before, data, seed, moments)
    elif data.transform == "long_tail":
        _rewrite(before, "train", _watched(_tailed(before, data, seed), moments), data)
        about = {"imbalance": data.imbalance}
    else:
        _rewrite(before, "train", _watched(duplicated(before, data, seed), moments), data)
        about = {"copies": data.copies}
    about = {"name": data.transform, **about, "seed": seed, "counts_before": before.meta["counts"]}
    mean, std = moments.mean_and_std()
    counts = {split: _counts(folder / split, len(names)) for split in before.meta["counts"]}
    meta = {**before.meta, "class_names": names, "counts": counts, "mean": mean, "std": std, "transform": about}
    meta.pop("fingerprint")
    write_meta(folder, meta)
    return meta


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """dataset.json, whose fingerprint covers the shards in `folder`."""
    written = file_digests(sorted(folder.rglob("*.parquet")))
    content = {path.relative_to(folder).as_posix(): entry["sha256"] for path, entry in written.items()}
    shards.write_meta(folder, meta, content)


def tail(data: DataSection, counts: Sequence[int], seed: int) -> list[int]:
    """How many samples of each class [C] a long tail keeps.

    Raises UserError for a single class.
    """
    if len(counts) < 2:
        raise UserError(
            f"data.transform = long_tail needs at least 2 classes, the data have {len(counts)}; leave it out"
        )
    ranks = rng.numpy_generator(seed, "long tail order").permutation(len(counts))
    sizes = max(counts) * data.imbalance ** (-ranks / (len(counts) - 1))
    return np.maximum(1, np.minimum(counts, np.floor(sizes + 0.5))).astype(int).tolist()


def wanted_classes(data: DataSection, classes: int) -> int:
    """How many classes a choice by variance leaves of `classes`.

    Raises UserError where there are fewer than asked.
    """
    wanted = data.variance_classes or max(2, classes // 2)
    if wanted > classes:
        asked = f"data.variance_classes = {wanted}" if data.variance_classes else "at least 2 classes"
        raise UserError(
            f"data.transform = {data.transform} is to choose {asked}, but the data have {classes}; ask for fewer, or "
            "leave the transform out"
        )
    return wanted


def _tailed(prepared: PreparedDataset, data: DataSection, seed: int) -> Iterator[pa.Table]:
    counts = prepared.counts("train")
    chosen: dict[int, Array] = {}
    for label, keep in enumerate(tail(data, counts, seed)):
        chosen[label] = np.zeros(counts[label], bool)
        chosen[label][rng.numpy_generator(seed, "long tail", label).permutation(counts[label])[:keep]] = True
    yield from _parts(prepared, "train", {label: label for label in chosen}, chosen)


def _parts(
    prepared: PreparedDataset, split: str, labels: Mapping[int, int], chosen: Mapping[int, Array] | None = None
) -> Iterator[pa.Table]:
    """Rows of some classes with new labels, in order; `chosen` says which places of each class."""
    places = dict.fromkeys(labels, 0)
    for group in prepared.groups(split):
        if group.label not in labels:
            continue
        table, first = prepared.read(group, split), places[group.label]
        places[group.label] += group.rows
        if chosen is not None:
            table = table.filter(pa.array(chosen[group.label][first : first + group.rows]))
        new = pa.array(np.full(table.num_rows, labels[group.label], np.int32))
        yield table.set_column(1, table.schema.field("label"), new)


def _by_variance(
    prepared: PreparedDataset, data: DataSection, seed: int, moments: Moments
) -> tuple[list[str], dict[str, Any]]:
    """Keep the classes of the smallest or largest variance, in both splits; returns their names and what is to be said."""
    wanted = wanted_classes(data, len(prepared.class_names))
    found = [_variance(prepared, label, seed) for label in range(len(prepared.class_names))]
    sign = 1 if data.transform == "low_variance" else -1
    classes = sorted(sorted(range(len(found)), key=lambda label: (sign * found[label], label))[:wanted])
    labels = {old: new for new, old in enumerate(classes)}
    for split in prepared.meta["counts"]:
        rows = _parts(prepared, split, labels)
        _rewrite(prepared, split, _watched(rows, moments) if split == "train" else rows, data)
    variances = {name: float(f"{v:.6g}") for name, v in zip(prepared.class_names, found, strict=True)}
    kept = [prepared.class_names[label] for label in classes]
    return kept, {"variance_classes": wanted, "variances": variances, "changes": list(prepared.meta["counts"])}


def _variance(prepared: PreparedDataset, label: int, seed: int) -> float:
    """The variance of a class around its mean sample, averaged over pixels (on the scale 0..1; of tensors, in units of
    the training values' variance), from at most MEASURED samples."""
    count = prepared.counts("train")[label]
    places = np.sort(rng.numpy_generator(seed, "class variance", label).permutation(count)[:MEASURED])
    at_once = max(1, READ_BYTES // (8 * prepared.sample_bytes))
    total, squares = np.zeros(prepared.shape), np.zeros(prepared.shape)
    for start in range(0, len(places), at_once):
        samples = prepared.take("train", label, places[start : start + at_once]).astype(np.float64)
        total += samples.sum(0)
        squares += (samples * samples).sum(0)
    variance = np.maximum(squares / len(places) - (total / len(places)) ** 2, 0)
    scale = np.array(prepared.std).reshape(-1, *(1,) * (len(prepared.shape) - 1)) if prepared.kind == "tensors" else 255
    return float((variance / scale**2).mean())


def _watched(tables: Iterable[pa.Table], moments: Moments) -> Iterator[pa.Table]:
    for table in tables:
        moments.add(shards.pixels_of(table, os.cpu_count() or 1))
        yield table


def _rewrite(prepared: PreparedDataset, split: str, tables: Iterable[pa.Table], data: DataSection) -> None:
    """The shards of a split anew: beside the old ones, then in their place."""
    old, new = prepared.folder / split, prepared.folder / f"{split}.derived"
    if not prepared.groups(split):
        return
    kind = pq.read_schema(next(iter(sorted(old.glob("*.parquet"))))).remove_metadata()
    group = shards.group_rows(prepared.shape, "jpeg" in kind.names, data.chunk, prepared.dtype.itemsize)
    shards.write_shards(new, tables, kind, group)
    shutil.rmtree(old)
    os.replace(new, old)


def _counts(folder: Path, classes: int) -> list[int]:
    """Samples of every class in the new shards."""
    counts = np.zeros(classes, np.int64)
    for path in sorted(folder.glob("shard-*.parquet")):
        counts += np.bincount(pq.ParquetFile(path).read(["label"])["label"].to_numpy(), minlength=classes)
    return counts.tolist()


def sentence(meta: Mapping[str, Any]) -> str:
    """What was done to a prepared set, from its metadata."""
    about, before, after = meta["transform"], meta["transform"]["counts_before"]["train"], meta["counts"]["train"]
    how = {
        "long_tail": f"a long tail, its classes down to 1 / {about.get('imbalance', 1):g} of the largest",
        "near_duplicates": f"near-duplicates, {about.get('copies', 1)} of every sample",
        "low_variance": f"the {len(after)} classes of {len(before)} that vary least",
        "high_variance": f"the {len(after)} classes of {len(before)} that vary most",
    }[about["name"]]
    return f"the training split was changed on purpose ({how}): {sum(after):,} samples of {sum(before):,}"
