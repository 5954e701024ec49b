"""The manifest: which training samples are kept, and why. Distillation reads nothing else of the selection.

Columns: sample_id, label, score, rank (within its class, 0 = first to be kept) and kept. Samples that are held out
(select.held_out) are not ranked: their rank is -1, their score NaN. Rows are sorted by label and id. The schema's metadata
holds rule, requested and reached keep rate, seed and fingerprints as JSON under the key `selection`.
`pruning/selection/select.py` chooses the rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared import parquet

SCHEMA = pa.schema(
    {"sample_id": pa.string(), "label": pa.int32(), "score": pa.float32(), "rank": pa.int32(), "kept": pa.bool_()}
)
KEY = "selection"
ROWS = 2**17  # of a row group
HELD_OUT = -1  # the rank of a sample that is held out
ENCODING = {  # ids never repeat: no dictionary; scores and ranks do not compress
    "use_dictionary": ["label"],
    "compression": {"sample_id": "lz4", "label": "lz4", "score": "none", "rank": "none", "kept": "none"},
    "write_statistics": ["label", "kept"],
    "write_batch_size": 2**14,
    "store_schema": False,  # else readers see the metadata from before the facts were known
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[parquet.RowGroupWriter]:
    """Yields the writer; the manifest appears at `path` when the block ends without an error."""
    with publish(path) as temporary, parquet.RowGroupWriter(temporary, SCHEMA, KEY, ROWS, **ENCODING) as out:
        yield out


def write(path: Path, table: pa.Table, facts: dict[str, Any]) -> None:
    """Writes a manifest from rows in memory, sorted by label and id."""
    with writing(path) as out:
        out.append(table)
        out.facts = facts


def write_like(source: Path, target: Path, columns: Mapping[str, np.ndarray[Any, Any]], facts: dict[str, Any]) -> None:
    """Writes the rows of a manifest with other values in some columns [rows]."""
    file, start = _open(source), 0
    with writing(target) as out, parquet.reading(source, "select"):
        for group in range(file.num_row_groups):
            table = parquet.read_group(file, group, SCHEMA.names)
            end = start + table.num_rows
            for name, values in columns.items():
                place = SCHEMA.get_field_index(name)
                table = table.set_column(place, SCHEMA.field(place), pa.array(values[start:end]))
            out.append(table)
            start = end
        out.facts = facts


def read(path: Path, columns: Sequence[str] = SCHEMA.names) -> tuple[pa.Table, dict[str, Any]]:
    """Some columns of all rows, and the facts. Raises UserError if the file is missing or is not a manifest."""
    file = _open(path)
    with parquet.reading(path, "select"):
        table = file.read(list(columns))
    if {"sample_id", "label"} <= set(columns):
        parquet.check_rows(table, path, "select")
    return table, parquet.facts_of(file, KEY)


def facts(path: Path) -> dict[str, Any]:
    """The facts alone, from the footer."""
    return parquet.facts_of(_open(path), KEY)


def kept(path: Path) -> pa.ChunkedArray:
    """The ids of the kept samples, in the order of the manifest; row groups that keep none are skipped."""
    return _ids(path, "kept", lambda kept: kept)


def held_out(path: Path, outside: bool = True) -> pa.ChunkedArray:
    """The ids of the samples that are held out, or of all others, in the order of the manifest."""
    return _ids(path, "rank", lambda rank: pc.equal(pc.equal(rank, HELD_OUT), outside))


def _ids(path: Path, column: str, wanted: Callable[[pa.ChunkedArray], pa.ChunkedArray]) -> pa.ChunkedArray:
    file, chunks = _open(path), []
    with parquet.reading(path, "select"):
        for group in range(file.num_row_groups):
            mask = wanted(parquet.read_group(file, group, [column])[column])
            if pc.any(mask).as_py():
                table = parquet.read_group(file, group, ["sample_id", "label"])
                parquet.check_rows(table, path, "select")
                chunks += table["sample_id"].filter(mask).chunks
    return pa.chunked_array(chunks, pa.string())


def kept_in_parts(path: Path, labels: Collection[int], others: bool = False) -> Iterator[tuple[int, pa.Array]]:
    """(label, ids of kept samples) for some classes, row group by row group; other groups only have their labels read.

    With `others` also of the samples that are not kept, except those that are held out: their rank is negative.
    """
    for label, rows in _rows(path, labels, ["sample_id"], others):
        yield label, rows["sample_id"].combine_chunks()


def first_kept(path: Path, labels: Collection[int], count: int) -> Iterator[tuple[int, pa.Array]]:
    """(label, ids of its `count` kept samples of smallest rank, in the order of their ranks) for some classes."""
    first: dict[int, pa.Table] = {}
    for label, rows in _rows(path, labels, ["sample_id", "rank"]):
        rows = pa.concat_tables([first[label], rows]) if label in first else rows
        first[label] = rows.sort_by([("rank", "ascending"), ("sample_id", "ascending")])[:count]
    for label, rows in first.items():
        yield label, rows["sample_id"].combine_chunks()


def _rows(
    path: Path, labels: Collection[int], columns: Sequence[str], others: bool = False
) -> Iterator[tuple[int, pa.Table]]:
    """Some columns of the samples of `kept_in_parts`, per class and row group."""
    if not labels:
        return
    file, wanted = _open(path), np.array(sorted(labels), np.int32)
    with parquet.reading(path, "select"):
        for group in range(file.num_row_groups):  # statistics in the footer name the labels, too, but may lie
            if not np.isin(parquet.read_group(file, group, ["label"])["label"], wanted).any():
                continue
            table = parquet.read_group(file, group, ["label", "rank" if others else "kept"])
            parquet.check_values(table, path, "select")
            labels_here = table["label"].to_numpy()
            chosen = table["rank"].to_numpy() >= 0 if others else table["kept"].to_numpy()
            mask = chosen & np.isin(labels_here, wanted)
            if mask.any():
                rows = parquet.read_group(file, group, columns)
                rows, kept_labels = rows.take(pa.array(np.flatnonzero(mask))), labels_here[mask]
                for label in np.unique(kept_labels):
                    yield int(label), rows.filter(pa.array(kept_labels == label))


def _open(path: Path) -> pq.ParquetFile:
    file = parquet.open_table(path, "select", SCHEMA.names, "manifest")
    if [file.schema_arrow.field(name).type for name in SCHEMA.names] != SCHEMA.types:
        raise UserError(f"{path} is not a manifest: its columns have other types; run `select` again")
    return file
