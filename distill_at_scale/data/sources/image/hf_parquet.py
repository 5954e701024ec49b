"""Hugging Face's image layout: Parquet files `train-*.parquet`, `test-*.parquet` with `image: struct<bytes, path>` and `label`.

The image column may also hold plain bytes, and files may lie in a folder per split. Class names come from the metadata that
the datasets library writes into the schema; without it, numbered classes are called "0" to the largest number of the training
split, and text labels are sorted by name. A sample's id is `image.path` if it is present and unique within the split, else
`<file>:<row>`. Files are listed in parallel; listing reads labels and paths, never images.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.data.codecs.image import SampleRejected
from distill_at_scale.data.sources.base import (
    MAX_LABEL,
    by_split,
    data_store,
    first_duplicate,
    listing,
    unused_split,
)  # fmt: skip
from distill_at_scale.data.sources.numbered_files import check_numbered
from distill_at_scale.storage.filesystem import is_access_error

T = TypeVar("T")
MAX_ROW_GROUP = 16  # times data.max_bytes: the samples of a row group together
MAX_ROWS_PER_BYTE = 64  # of a file; real files stay below, as each row has a sample of its own
MAX_LISTED_BYTES = 2**32  # of the labels and paths of a file
BATCH_ROWS = 1024  # rows to unpack before their bytes are counted
READERS = 8  # threads that list files
TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)


class HuggingFaceParquet:
    """Messages use `column_key` (the configuration key of the sample column), `column_types` and `column_content`."""

    column_key = "data.image_column"
    column_types = "binary or a struct with the field bytes"
    column_content = "encoded images"

    def __init__(self, config: DataSection) -> None:
        self.config, self.store = config, data_store(config)
        self.column = config.image_column
        files = [entry.path for entry in self.store.files() if entry.path.endswith(".parquet")]
        self.files = by_split(files, self.store)
        for split in set(self.files) - {"unused"}:
            check_numbered(self.files[split], self.store)
        if "train" not in self.files:
            raise UserError(f"{self.store.place()} holds no training Parquet files (train-*.parquet)")
        self._declared = self._declared_names()
        self._columns: dict[str, list[pa.Table]] = {}
        self._open: tuple[str, Any, np.ndarray[Any, Any]] | None = None
        self._group: tuple[str, int, pa.ChunkedArray] | None = None

    def _declared_names(self) -> list[str]:
        """Class names in the metadata of the first training file; empty if it has none or they are malformed."""
        with self._parquet(self.files["train"][0]) as file:
            metadata = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        try:
            names = json.loads(metadata)
        except (ValueError, RecursionError):
            return []
        for key in ("info", "features", self.config.label_column, "names"):
            names = names.get(key) if isinstance(names, dict) else None
        return [str(name) for name in names] if isinstance(names, list) else []

    @cached_property
    def class_names(self) -> list[str]:
        """The declared names, else the sorted text labels of the training split, else "0".."max" for numeric labels.

        Raises UserError for a number that is not a class, naming file and row.
        """
        if self._declared:
            return self._declared
        columns = [table["label"] for table in self._tables("train")]
        if self._has_text_labels:
            labels = {label for column in columns if _is_text(column.type) for label in pc.unique(column).to_pylist()}
            return sorted(label for label in labels if label and label.strip())
        largest = [pc.max(column).as_py() or 0 for column in columns]
        for column, name, label in zip(columns, self.files["train"], largest, strict=True):
            if label > MAX_LABEL:
                place, row = self.store.place(name), pc.index(column, label).as_py()
                problem = f"{place}, row {row}: the label {label} is more than {MAX_LABEL:,}, so it numbers no class"
                raise UserError(f"{problem}; set data.label_column to the column with the classes")
        return [str(label) for label in range(max(0, *largest) + 1)]

    @cached_property
    def _has_text_labels(self) -> bool:
        return any(_is_text(table["label"].type) for table in self._tables("train"))

    def splits(self) -> list[str]:
        return [split for split in ("train", "test") if split in self.files]

    def notes(self) -> list[str]:
        unused = self.files.get("unused", [])
        return [unused_split(self.files["test"][0], unused)] if unused else []

    def listing(self, split: str) -> pa.Table:
        files, tables = self.files[split], self._tables(split)
        counts = [table.num_rows for table in tables]
        if not sum(counts):
            raise UserError(f"the {split} files in {self.store.place()} hold no rows")
        labels = np.concatenate([self._labels(table["label"], file) for table, file in zip(tables, files, strict=True)])
        rows = np.concatenate([np.arange(count) for count in counts])
        locations = pa.array(files, pa.string()).take(pa.array(np.repeat(np.arange(len(files)), counts)))
        del self._columns[split]  # a million paths need not be kept twice
        ids = pc.binary_join_element_wise(locations, pa.array(rows).cast(pa.string()), ":")
        if all("path" in table.column_names for table in tables):
            paths = pa.chunked_array([chunk for table in tables for chunk in table["path"].chunks], pa.string())
            if not paths.null_count and first_duplicate(paths) is None:
                ids = paths.combine_chunks()
        return listing(ids, labels, locations, rows)

    def digest(self, split: str) -> str:
        """A hash of the files' footers: schema, and sizes and statistics of all column chunks."""

        def footer(name: str) -> list[Any]:
            with self._reading(name):
                size = self.store.size(name) or 0
                length = int.from_bytes(self.store.read_range(name, max(0, size - 8), 4), "little")
                content = self.store.read_range(name, max(0, size - 8 - length), length)
                return [name.rpartition("/")[2], hashlib.sha256(content).hexdigest(), size]

        return digest(self._map_files(footer, self.files[split]))

    def read(self, rows: pa.Table) -> Sequence[Any]:
        """Reads each row group once when rows come in file order; the last one stays open between calls.

        An item is a SampleRejected for a row that holds neither an image nor the path of one. Raises UserError for a damaged
        file, which affects all of its rows.
        """
        names, numbers = rows["location"].to_pylist(), rows["row"].to_pylist()
        samples: list[Any] = []
        first = 0
        while first < len(names):  # one run of rows in the same row group at a time
            name, stop = names[first], first
            start, values = self._group_of(name, numbers[first])
            while stop < len(names) and names[stop] == name and start <= numbers[stop] < start + len(values):
                stop += 1
            samples += self._to_raw(values.take(pa.array([number - start for number in numbers[first:stop]])), name)
            first = stop
        return samples

    def _parquet_columns(self, kind: pa.DataType) -> list[str]:
        """The Parquet columns with the samples, for a sample column of this type; none for a type without samples."""
        if pa.types.is_struct(kind):
            fields = [field for field in ("bytes", "path") if kind.get_field_index(field) >= 0]
            return [f"{self.column}.{field}" for field in fields] if "bytes" in fields else []
        return [self.column] if any(is_kind(kind) for is_kind in BINARY) else []

    def _to_raw(self, values: pa.ChunkedArray, name: str) -> list[Any]:
        """The samples of some rows (binary, or a struct of bytes and path) of a file."""
        rows = values.to_pylist()
        if not pa.types.is_struct(values.type):
            rows = [{"bytes": row} for row in rows]
        return [self._image(name, row or {}) for row in rows]

    def _image(self, name: str, row: dict[str, Any]) -> bytes | SampleRejected:
        """The bytes in a row, else the file that its path names, relative to the Parquet file's folder or to the root.

        Files outside data.path are not read.
        """
        if row.get("bytes") is not None:
            return row["bytes"]
        path = row.get("path")
        if not path:
            return SampleRejected("the row holds no image: its bytes are null; remove the row")
        problem = f"the row holds a path, not an image: {path!r}"
        root = f"{os.path.abspath(self.store.root)}/"
        if self.store.local and path.startswith(root):
            files = [path.removeprefix(root)]
        else:
            files = [posixpath.join(folder, path) for folder in dict.fromkeys((posixpath.dirname(name), ""))]
        for file in map(posixpath.normpath, files):
            if file.startswith(("/", "../")) or "\0" in file or (size := self.store.size(file)) is None:
                continue
            if size > self.config.max_bytes:
                return SampleRejected(f"{problem}, larger than data.max_bytes = {self.config.max_bytes:,}; raise it")
            return self.store.read(file)
        return SampleRejected(f"{problem} is missing in {self.store.place()}; put the file there, or embed the images")

    def _group_of(self, name: str, row: int) -> tuple[int, pa.ChunkedArray]:
        """The first row of the row group that holds a row, and the group's samples; the last group is cached."""
        if self._group is not None and self._group[0] == name and 0 <= row - self._group[1] < len(self._group[2]):
            return self._group[1:]
        file, ends = self._opened(name)
        group = int(np.searchsorted(ends, row, side="right"))
        if not 0 <= row < (ends[-1] if len(ends) else 0):
            raise UserError(f"{self.store.place(name)} has no row {row}; did the file change after it was listed?")
        columns = self._parquet_columns(file.schema_arrow.field(self.column).type)
        first = int(ends[group - 1]) if group else 0
        rows, max_bytes = int(ends[group]) - first, MAX_ROW_GROUP * self.config.max_bytes
        values = self._read_columns(name, file, [group], columns, rows, max_bytes)[0]
        if pa.types.is_struct(values.type) and not (own := pc.struct_field(values, "bytes")).null_count:
            values = own
        self._group = name, first, values
        return self._group[1:]

    def _read_columns(
        self, name: str, file: Any, groups: list[int], columns: Sequence[str], rows: int, max_bytes: int
    ) -> pa.Table:
        """Columns of row groups, read batch by batch, because a few bytes can encode a value repeated without end.

        Raises UserError for more than `max_bytes` unpacked bytes, and for another number of rows than the footer's `rows`.
        """
        size, batches = 0, []
        with self._reading(name):
            for batch in file.iter_batches(BATCH_ROWS, groups, columns):
                size += batch.nbytes
                batches.append(batch)
                if size > max_bytes:
                    raise pa.ArrowInvalid(f"it unpacks to more than {max_bytes:,} bytes in one piece")
            table = pa.Table.from_batches(batches, file.schema_arrow if not batches else None)
        if (count := table.num_rows) != rows:
            place = self.store.place(name)
            raise UserError(f"{place} holds {count:,} rows, not the {rows:,} it claims; download it again")
        return table

    def _opened(self, name: str) -> tuple[Any, np.ndarray[Any, Any]]:
        """A file and the row after each of its row groups; the last file stays open."""
        if self._open is None or self._open[0] != name:
            file = self._parquet(name)
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self._open = name, file, np.cumsum(sizes)
        return self._open[1:]

    def _parquet(self, name: str) -> Any:
        with self._reading(name):
            file = pq.ParquetFile(self.store.open_native(name), pre_buffer=not self.store.local)
            _ = file.schema_arrow  # parsed on access, and may be damaged too
        rows, size = file.metadata.num_rows, self.store.size(name) or 0
        if rows > MAX_ROWS_PER_BYTE * size:
            raise UserError(f"{self.store.place(name)} claims {rows:,} rows in {size:,} bytes; download it again")
        return file

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Raises UserError if a file is missing or not a Parquet file, and Unreachable if the storage refuses."""
        try:
            yield
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"{self.store.place(name)} is gone; restore it, or list the data again") from None
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            if isinstance(error, OSError) and is_access_error(error):
                raise self.store.unreachable(error) from None
            place, reason = self.store.place(name), " ".join(str(error).split())
            raise UserError(f"{place} is not a readable Parquet file: {reason}. Download it again") from None

    def _map_files(self, function: Callable[[str], T], names: Sequence[str]) -> list[T]:
        with ThreadPoolExecutor(min(READERS, len(names))) as pool:
            return list(pool.map(function, names))

    def _tables(self, split: str) -> list[pa.Table]:
        if split not in self._columns:
            self._columns[split] = self._map_files(self._list_file, self.files[split])
        return self._columns[split]

    def _list_file(self, name: str) -> pa.Table:
        """The columns `label` (integer or string) and, if it exists, `path` of one file."""
        sample_column, label_column, place = self.column, self.config.label_column, self.store.place(name)
        with self._parquet(name) as file:
            schema = file.schema_arrow
            for key, column in ((self.column_key, sample_column), ("data.label_column", label_column)):
                if column not in schema.names:
                    raise UserError(f"{place} has no column {column!r}; set {key} to one of: {', '.join(schema.names)}")
            kind = schema.field(sample_column).type
            if not self._parquet_columns(kind):
                problem = f"{place}: column {sample_column!r} must be {self.column_types}, it is {kind}"
                raise UserError(f"{problem}; set {self.column_key} to the column that holds {self.column_content}")
            has_path = pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
            columns = [label_column, *([f"{sample_column}.path"] if has_path else [])]
            groups = list(range(file.num_row_groups))
            table = self._read_columns(name, file, groups, columns, file.metadata.num_rows, MAX_LISTED_BYTES)
        labels = table[label_column]
        if pa.types.is_dictionary(labels.type):
            labels = labels.cast(labels.type.value_type)
        if _is_text(labels.type):
            labels = labels.cast(pa.string())
        elif not pa.types.is_integer(labels.type):
            problem = f"{place}: column {label_column!r} holds {labels.type}, neither whole numbers nor text"
            raise UserError(f"{problem}; set data.label_column to the column with the classes")
        paths = {"path": pc.struct_field(table[sample_column], "path").cast(pa.string())} if has_path else {}
        return pa.table({"label": labels, **paths})

    def _labels(self, column: pa.ChunkedArray, name: str) -> np.ndarray[Any, Any]:
        names, is_text = self.class_names, _is_text(column.type)
        indices = pc.index_in(column, pa.array(names, pa.string())) if is_text else column.cast(pa.int64(), safe=False)
        labels = indices.cast(pa.int64()).fill_null(-1).to_numpy()
        if not self._declared and is_text != self._has_text_labels:
            bad = np.arange(len(column))
            expected = f"a {'text' if self._has_text_labels else 'number'}, as in other training files"
        else:
            bad = np.flatnonzero((labels < 0) | (labels >= len(names)))
            expected = "a class of the training split" if is_text else f"one of 0..{len(names) - 1}"
        if bad.size:
            place, label = self.store.place(name), column[int(bad[0])].as_py()
            hint = "correct or remove the row or the file, or set data.label_column to the column with the classes"
            raise UserError(f"{place}, row {bad[0]}: the label {label!r} is not {expected}; {hint}")
        return labels


def _is_text(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in TEXT)
