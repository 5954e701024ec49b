"""Notices data that changed after it was read, though ids, labels and sizes are the same.

`contents.parquet` has a row for each sample of an ingest, split by split in the order of the listings:
- `modified` (int64): when its file was last modified, in nanoseconds since 1970; -1 in an object store;
- `hash` (8 bytes): BLAKE2b of what was read; zeros for a sample that could not be read, null for one that was too large.

Files with another time are compared by their hashes, because a copy of a data set often has new times and the same content.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_at_scale.core import rng
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.data.ingest.chunks import is_finished, part_path, read_hashes, rejected_path
from distill_at_scale.data.ingest.plan import IngestPlan
from distill_at_scale.data.sources.base import Source
from distill_at_scale.storage.filesystem import Store

SCHEMA = pa.schema({"modified": pa.int64(), "hash": pa.binary(8)})
COMPARED = 256  # files with another time that are compared, drawn at random
UNKNOWN = -1  # time of a file in an object store
TIMES = "modified.npy"  # in the folder of unfinished work: times when the ingest was started last

Array = np.ndarray[Any, Any]


def all_rows(plan: IngestPlan) -> pa.Table:
    return pa.concat_tables(plan.listings.values())


def modified_times(source: Source, rows: pa.Table) -> Array:
    """When the file of each row of a listing was last modified, int64 [n] in nanoseconds; UNKNOWN if it is not local."""
    store = getattr(source, "store", None)
    if not isinstance(store, Store) or not store.local:
        return np.full(rows.num_rows, UNKNOWN)
    files = pc.unique(rows["location"])
    times = pa.array(store.modified(files.to_pylist()), pa.int64())
    return times.take(pc.index_in(rows["location"].combine_chunks(), files)).to_numpy()


def write(target: Path, plan: IngestPlan, times: Array, parts: Path, chunk: int) -> None:
    """Publish contents.parquet from the lists next to the part files."""
    with publish(target) as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
        start = 0
        for split, index, rows in plan.chunks(chunk):
            hashes = hashes_of(part_path(parts, split, index), rows.num_rows)
            columns = [pa.array(times[start : start + rows.num_rows]), hashes]
            writer.write_table(pa.table(columns, schema=SCHEMA))
            start += rows.num_rows


def hashes_of(part: Path, count: int) -> pa.Array:
    """The hashes of the `count` samples of a finished part; nulls from a version that kept none."""
    metadata = pq.read_schema(rejected_path(part)).metadata or {}
    hashes = json.loads(metadata.get(b"hashes", b"null")) or [None] * count
    return pa.array([None if text is None else bytes.fromhex(text) for text in hashes], SCHEMA.field("hash").type)


def changed(source: Source, rows: pa.Table, hashes: pa.ChunkedArray, touched: Array) -> tuple[int, pa.Table]:
    """Compares rows of a listing, at the places `touched`, with their hashes; at most COMPARED of them, drawn at random.

    Returns how many were compared, and the rows whose content is another.
    """
    if len(touched) > COMPARED:
        draw = rng.numpy_generator(0, "contents", len(touched))
        touched = np.sort(draw.choice(touched, COMPARED, replace=False))
    before = hashes.take(pa.array(touched))
    known = pc.is_valid(before)
    chosen, before = rows.take(pa.array(touched)).filter(known), before.filter(known)
    now = pa.array(read_hashes(source, chosen), before.type)
    return chosen.num_rows, chosen.filter(pc.not_equal(now, before))


def outdated(source: Source, plan: IngestPlan, times: Array, parts: Path, chunk: int, check: bool) -> list[Path]:
    """The finished part files with samples that changed since an interrupted ingest (`check`: validation) read them.

    Keeps `times` in `parts` for the next start.
    """
    path, files = parts / TIMES, list[Path]()
    if path.exists():
        before, start, touched, hashes = np.load(path), 0, list[int](), list[pa.Array]()
        for split, index, rows in plan.chunks(chunk):
            part, stop = part_path(parts, split, index), start + rows.num_rows
            finished = is_finished(part, check)
            hashes.append(hashes_of(part, rows.num_rows) if finished else pa.nulls(rows.num_rows, pa.binary(8)))
            places = start + np.flatnonzero(before[start:stop] != times[start:stop])
            if finished and len(places):
                touched += places.tolist()
                files.append(part)
            start = stop
        if not touched or not changed(source, all_rows(plan), pa.chunked_array(hashes), np.array(touched))[1].num_rows:
            files = []
    with publish(path) as temporary, open(temporary, "wb") as file:
        np.save(file, times)
    return files


def place(source: Source, row: pa.Table) -> str:
    """Where the first row of a listing lies, for messages."""
    location, sample_id = row["location"][0].as_py(), row["sample_id"][0].as_py()
    store = getattr(source, "store", None)
    address = store.place(location) if isinstance(store, Store) else location
    return address if location == sample_id else f"{address} (sample {sample_id!r})"


def differing(before: Sequence[pa.Array] | pa.ChunkedArray, now: pa.ChunkedArray) -> Array:
    """The places of hashes that are known on both sides and differ."""
    return np.flatnonzero(pc.fill_null(pc.not_equal(before, now), False).to_numpy())
