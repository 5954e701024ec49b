"""A small prepared set from a large one, in the same format: few samples of some classes, repeated where a class needs more."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa

from distill_at_scale.data.prepared import format as shards
from distill_at_scale.data.prepared.dataset import PreparedDataset

REAL = 64  # different samples of a class, which further ones repeat
CHUNK = 256  # samples of a scoring chunk, at most


def write(folder: Path, source: PreparedDataset, classes: int, each: int, tests: int) -> None:
    """Write `each` training samples of each of the first classes, and about `tests` test samples in all.

    Test samples come from the training split if these classes have none of their own.
    """
    counts, names = dict[str, list[int]](), source.class_names[:classes]
    folder.mkdir(parents=True)
    for file in source.folder.iterdir():  # the matrix of data.whiten
        if file.is_file() and file.name != "dataset.json":
            shutil.copy(file, folder)
    chunk, jpeg = source.meta.get("chunk", CHUNK), bool(source.meta.get("jpeg"))
    group = shards.group_rows(source.shape, jpeg, chunk, source.dtype.itemsize)
    for split, size in (("train", each), ("test", max(1, tests // len(names)))):
        full = any(source.counts(split)[: len(names)])
        tables, taken, counts[split] = [], split if full else "train", []
        for label in range(len(names)):
            wanted = np.arange(min(REAL, source.counts(taken)[label], size))
            if len(wanted):
                rows = pa.concat_tables([*source.take_rows(taken, label, wanted)]).take(np.arange(size) % len(wanted))
                ids = pa.array([f"{label:06d}/{k:06d}" for k in range(size)])
                tables.append(rows.set_column(0, rows.schema.field(0), ids))
            counts[split].append(size if len(wanted) else 0)
        shards.write_shards(folder / split, tables, tables[0].schema, group)
    meta = {"class_names": names, "counts": counts, "chunk": min(CHUNK, chunk)}
    shards.write_meta(folder, source.meta | meta, "excerpt")
