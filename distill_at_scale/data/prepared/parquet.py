"""Reads and writes long Parquet tables in bounded memory, in row groups of one exact size.

The bytes written depend on the rows alone, not on the tables they arrived in. A thread encodes while the caller prepares the
next rows. Columns and publishing are up to the caller.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_at_scale.core.errors import UserError

BATCH = 2**15  # rows decoded at a time: some MB, still in the cache when they are used
ROWS_PER_BYTE = 8  # upper bound for a whole file: ids are unique, so even compressed ones take some bits each


class RowGroupWriter:
    """A Parquet file that grows by whole row groups of `rows` rows; use it as a context manager.

    `append` takes tables of the schema's columns, of any length; `clear` discards all appended rows.
    `facts`, set at any time, becomes JSON under `key` in the file's metadata. `encoding` goes to pyarrow's ParquetWriter.
    """

    def __init__(self, path: Path, schema: pa.Schema, key: str, rows: int, **encoding: Any):
        self.path, self.schema, self.key, self.rows, self.encoding = path, schema, key, rows, encoding
        self.facts: dict[str, Any] = {}
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._start()

    def _start(self) -> None:
        self._tables: list[pa.Table] = []
        self._held = 0
        self._writer = pq.ParquetWriter(self.path, self.schema, **self.encoding)

    def __enter__(self) -> RowGroupWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                if self._held:
                    self._encode_next(pa.concat_tables(self._tables))
                self._wait()
                if self.facts:
                    self._writer.add_key_value_metadata({self.key: json.dumps(self.facts, sort_keys=True)})
        finally:
            self._thread.shutdown()
            self._writer.close()

    def append(self, table: pa.Table) -> None:
        """Returns before the rows are encoded, but waits for earlier rows."""
        self._tables.append(table.select(self.schema.names).cast(self.schema))
        self._held += table.num_rows
        if self._held >= self.rows:
            joined = pa.concat_tables(self._tables)
            full = joined.num_rows // self.rows * self.rows
            self._tables, self._held = [joined.slice(full)], joined.num_rows - full
            self._encode_next(joined.slice(0, full))

    def clear(self) -> None:
        self._wait()
        self._writer.close()
        self._start()

    def _encode_next(self, table: pa.Table) -> None:
        self._wait()
        self._pending = self._thread.submit(self._encode, table)

    def _encode(self, table: pa.Table) -> None:
        for start in range(0, table.num_rows, self.rows):
            group = table.slice(start, self.rows).combine_chunks()  # chunk borders would change the pages
            self._writer.write_table(group, row_group_size=self.rows)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None


@contextlib.contextmanager
def reading(path: Path, stage: str) -> Iterator[None]:
    """Turns pyarrow's errors for a missing or damaged file into a UserError that names the stage which writes the file."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run `distill-at-scale {stage} CONFIG` first") from None
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a readable Parquet file: {reason}; run `{stage}` again") from None


def open_table(path: Path, stage: str, required: Iterable[str], what: str) -> pq.ParquetFile:
    """Opens a table and checks its footer, the required columns and that it claims no more rows than its size allows.

    Raises UserError if the file is missing, is not a Parquet file or fails a check; `what` names the table in messages.
    """
    with reading(path, stage):
        file = pq.ParquetFile(path, pre_buffer=False)  # else iter_batches keeps everything it has read
        names = file.schema_arrow.names
        listed = sum(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
    if missing := [name for name in required if name not in names]:
        raise UserError(f"{path} is not a {what}: it lacks the columns {', '.join(missing)}")
    if (rows := file.metadata.num_rows) > ROWS_PER_BYTE * (size := path.stat().st_size) or rows != listed:
        raise UserError(f"{path} claims {rows:,} rows in {size:,} bytes; run `{stage}` again")
    return file


def read_group(file: pq.ParquetFile, group: int, columns: Sequence[str]) -> pa.Table:
    """Some columns of a row group. Raises ValueError if its number of rows differs from the footer."""
    table = file.read_row_group(group, list(columns))
    if table.num_rows != (wanted := file.metadata.row_group(group).num_rows):
        raise ValueError(f"row group {group} has {table.num_rows:,} rows, not {wanted:,}")
    return table


def check_values(table: pa.Table, path: Path, stage: str) -> None:
    """Raises UserError if a value is missing."""
    if holes := [name for name in table.column_names if table[name].null_count]:
        raise UserError(f"{path}: the column {holes[0]} lacks values; run `{stage}` again")


def check_rows(table: pa.Table, path: Path, stage: str) -> None:
    """Raises UserError unless ids are strings, labels integers, no value is missing, and rows ascend strictly by label and id,
    so that ids are unique.
    """
    check_values(table, path, stage)
    id_, label = table.schema.field("sample_id").type, table.schema.field("label").type
    if not (pa.types.is_string(id_) and pa.types.is_integer(label)):
        raise UserError(f"{path}: sample_id and label are {id_} and {label}, not text and numbers; run `{stage}` again")
    ids, labels = table["sample_id"].combine_chunks(), table["label"].to_numpy()
    in_class = labels[1:] == labels[:-1]
    rising = pc.less(ids[:-1], ids[1:]).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(np.where(in_class, ~rising.astype(bool), labels[1:] < labels[:-1]))
    if wrong.size:
        sample = ids[int(wrong[0]) + 1].as_py()
        raise UserError(f"{path}: the sample {sample!r} is there twice or not in its place; run `{stage}` again")


def facts_of(file: pq.ParquetFile, key: str) -> dict[str, Any]:
    """The facts that RowGroupWriter stored under `key`, or {}. Raises UserError if they are not a JSON object."""
    subject = f"the facts {key!r} in a Parquet file's metadata are"
    try:
        facts = json.loads((file.metadata.metadata or {}).get(key.encode(), b"{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{subject} damaged ({error}); make the file again") from None
    if not isinstance(facts, dict):
        raise UserError(f"{subject} not a JSON object; make the file again")
    return facts
