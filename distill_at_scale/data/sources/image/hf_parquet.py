"""Hugging Face's image layout: Parquet files `train-*.parquet`, `test-*.parquet` with `image: struct<bytes, path>` and
`label`. An image column of plain bytes is taken as well.

Class names come from the metadata that the datasets library writes into the schema; without it, numbered classes are called
"0" to the largest number of the training split, and labels that are text are sorted by name. A sample's id is `image.path`
where it is present and unique within the split, else `<file>:<row>`. Files may also lie in a folder per split. Files are
looked at side by side; while listing only labels and paths are read, never images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.data.sources.base import (
    MAX_LABEL,
    data_store,
    first_duplicate,
    listing,
    prefer_validation,
    split_of,
    split_word,
)
from distill_at_scale.storage.filesystem import unanswered

T = TypeVar("T")
LARGEST_GROUP = 16  # times data.max_bytes: of the samples of a row group together
ROWS_PER_BYTE = 64  # of a file; more is a bomb, as every row of a real one has a sample of its own
LISTED_BYTES = 2**32  # of the labels and paths of a file
ROWS_AT_ONCE = 1024  # that are unpacked before they are counted
READERS = 8  # files that are looked at side by side
TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)


class HuggingFaceParquet:
    """`column_key`, `wanted` and `held` are for messages: the configuration's key of the column, its types, its content."""

    column_key = "data.image_column"
    wanted = "binary or a struct with the field bytes"
    held = "encoded images"

    def __init__(self, config: DataSection) -> None:
        self.config, self.store = config, data_store(config)
        self.column = config.image_column
        self.files: dict[str, list[str]] = {}
        for name in [entry.path for entry in self.store.files() if entry.path.endswith(".parquet")]:
            self.files.setdefault(split_of(_split_part(name)) or "train", []).append(name)
        if test := self.files.get("test"):
            self.files["test"] = prefer_validation({name: split_word(_split_part(name)) for name in test})
        if "train" not in self.files:
            raise UserError(f"{self.store.place()} holds no training Parquet files (train-*.parquet)")
        self._declared = self._declared_names()
        self._columns: dict[str, list[pa.Table]] = {}
        self._open: tuple[str, Any, np.ndarray[Any, Any]] | None = None
        self._group: tuple[str, int, pa.ChunkedArray] | None = None

    @cached_property
    def class_names(self) -> list[str]:
        """The declared names, else the sorted training labels that are text, else "0".."max" of those that are numbers.

        Raises UserError for a number that no class can have, naming file and row.
        """
        if self._declared:
            return self._declared
        tables = self._tables("train")
        if self._textual:
            texts = (pc.unique(table["label"]).to_pylist() for table in tables if _is_text(table["label"].type))
            return sorted({text for found in texts for text in found if text and text.strip()})
        largest = [self._largest(t["label"], name) for t, name in zip(tables, self.files["train"], strict=True)]
        return [str(label) for label in range(max(largest) + 1)]

    @cached_property
    def _textual(self) -> bool:
        """Whether training labels are text."""
        return any(_is_text(table["label"].type) for table in self._tables("train"))

    def _largest(self, column: pa.ChunkedArray, name: str) -> int:
        """The largest label of a file of numbers, 0 where it has none."""
        found = pc.max(column)
        label = found.as_py() or 0
        if label > MAX_LABEL:
            raise UserError(
                f"{self.store.place(name)}, row {pc.index(column, found).as_py()}: the label {label} is more than "
                f"{MAX_LABEL:,}, so it numbers no class; set data.label_column to the column with the classes"
            )
        return max(0, label)

    def splits(self) -> list[str]:
        return [split for split in ("train", "test") if split in self.files]

    def listing(self, split: str) -> pa.Table:
        """Raises UserError for a missing column, an unlabelled row, or a split without rows; names file and row."""
        files, tables = self.files[split], self._tables(split)
        counts = [table.num_rows for table in tables]
        if not sum(counts):
            raise UserError(f"the {split} files in {self.store.place()} hold no rows")
        labels = np.concatenate([self._labels(table["label"], file) for table, file in zip(tables, files, strict=True)])
        rows = np.concatenate([np.arange(count) for count in counts])
        locations = pa.array(files, pa.string()).take(pa.array(np.repeat(np.arange(len(files)), counts)))
        del self._columns[split]  # a million paths need not be kept twice
        return listing(_ids(tables, locations, rows), labels, locations, rows)

    def digest(self, split: str) -> str:
        """Hash of every file's footer: its schema, and sizes and statistics of all column chunks."""
        return digest(self._of_all(lambda name: self._asked(name, lambda: self._footer(name)), self.files[split]))

    def read(self, rows: pa.Table) -> Sequence[bytes | np.ndarray[Any, Any]]:
        """Reads each row group once when rows come in file order; the last one stays open between calls.

        Raises UserError where a file is damaged: that concerns all of its rows.
        """
        names, numbers = rows["location"].to_pylist(), rows["row"].to_numpy()
        found: list[bytes | np.ndarray[Any, Any]] = []
        for first, last in _runs(names):
            while first < last:
                start, images = self._images(names[first], int(numbers[first]))
                inside = (numbers[first:last] >= start) & (numbers[first:last] < start + len(images))
                stop = last if inside.all() else first + int(np.argmin(inside))
                found += self._raw(images.take(pa.array(numbers[first:stop] - start)))
                first = stop
        return found

    def _leaf(self, kind: pa.DataType) -> str | None:
        """The Parquet column to read of a column of this type, or None where it cannot hold samples."""
        return _leaf(kind, self.column)

    def _raw(self, values: pa.ChunkedArray) -> list[Any]:
        """The raw form of some values of that column."""
        return [raw or b"" for raw in values.to_pylist()]

    def _images(self, name: str, row: int) -> tuple[int, pa.ChunkedArray]:
        """The first row of the row group that holds a row, and the group's images."""
        if self._group is None or self._group[0] != name or not 0 <= row - self._group[1] < len(self._group[2]):
            self._group = (name, *self._row_group(name, row))
        return self._group[1:]

    def _row_group(self, name: str, row: int) -> tuple[int, pa.ChunkedArray]:
        file, ends = self._opened(name)
        group = int(np.searchsorted(ends, row, side="right"))
        if not 0 <= row < (ends[-1] if len(ends) else 0):
            raise UserError(f"{self.store.place(name)} has no row {row}; did the file change after it was listed?")
        leaf = self._leaf(file.schema_arrow.field(self.column).type)
        table = self._asked(name, lambda: self._bounded(file, [group], [leaf], LARGEST_GROUP * self.config.max_bytes))
        first = int(ends[group - 1]) if group else 0
        self._check_count(name, table, int(ends[group]) - first)
        return first, table.flatten()[0] if pa.types.is_struct(table.schema[0].type) else table[0]

    def _check_count(self, name: str, table: pa.Table, rows: int) -> None:
        """Raises UserError where a file, or a row group of it, holds other rows than its footer says."""
        if table.num_rows != rows:
            raise UserError(
                f"{self.store.place(name)} holds {table.num_rows:,} rows where it claims {rows:,}; download it again"
            )

    def _bounded(self, file: Any, groups: list[int], columns: list[str | None], most: int) -> pa.Table:
        """Some columns of row groups, batch by batch: a few bytes can stand for a value that is first_duplicate without end.

        Raises ArrowInvalid for what unpacks to more than so many bytes.
        """
        held, parts = 0, []
        for batch in file.iter_batches(ROWS_AT_ONCE, groups, columns):
            held += batch.nbytes
            parts.append(batch)
            if held > most:
                raise pa.ArrowInvalid(f"it unpacks to more than {most:,} bytes in one piece")
        return pa.Table.from_batches(parts, file.schema_arrow if not parts else None)

    def _opened(self, name: str) -> tuple[Any, np.ndarray[Any, Any]]:
        """The last file that was read from, and the row after each of its row groups."""
        if self._open is None or self._open[0] != name:
            file = self._parquet(name)
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self._open = name, file, np.cumsum(sizes)
        return self._open[1:]

    def _parquet(self, name: str) -> Any:
        file, _ = self._asked(name, lambda: self._with_schema(name))
        rows, size = file.metadata.num_rows, self.store.size(name) or 0
        if rows > ROWS_PER_BYTE * size:
            raise UserError(
                f"{self.store.place(name)} claims {rows:,} rows in {size:,} bytes; get it from its publisher"
            )
        return file

    def _with_schema(self, name: str) -> tuple[Any, pa.Schema]:
        """The schema, too, may be damaged, and is read when it is asked for."""
        file = pq.ParquetFile(self.store.open_native(name), pre_buffer=not self.store.local)
        return file, file.schema_arrow

    def _asked(self, name: str, question: Callable[[], T]) -> T:
        """Raises UserError for a file that is missing or no Parquet file, and Unreachable where the storage refuses."""
        try:
            return question()
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"{self.store.place(name)} is gone; restore it, or list the data again") from None
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            if isinstance(error, OSError) and unanswered(error):
                raise self.store.refusal(error) from None
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self.store.place(name)} is not a readable Parquet file: {reason}. Download it again."
            ) from None

    def _of_all(self, question: Callable[[str], T], names: Sequence[str]) -> list[T]:
        with ThreadPoolExecutor(min(READERS, len(names))) as pool:
            return list(pool.map(question, names))

    def _tables(self, split: str) -> list[pa.Table]:
        if split not in self._columns:
            self._columns[split] = self._of_all(self._read_columns, self.files[split])
        return self._columns[split]

    def _read_columns(self, name: str) -> pa.Table:
        """The columns `label` and, where it exists, `path` of one file."""
        with self._parquet(name) as file:
            schema, image, label = file.schema_arrow, self.column, self.config.label_column
            place = self.store.place(name)
            for key, column in ((self.column_key, image), ("data.label_column", label)):
                if column not in schema.names:
                    raise UserError(f"{place} has no column {column!r}; set {key} to one of: {', '.join(schema.names)}")
            kind = schema.field(image).type
            if self._leaf(kind) is None:
                raise UserError(
                    f"{place}: column {image!r} must be {self.wanted}, it is {kind}; "
                    f"set {self.column_key} to the column that holds {self.held}"
                )
            paths = [f"{image}.path"] if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 else []
            groups = list(range(file.num_row_groups))
            table = self._asked(name, lambda: self._bounded(file, groups, [label, *paths], LISTED_BYTES))
            self._check_count(name, table, file.metadata.num_rows)
        columns = {"label": _plain(table[label], f"{place}: column {label!r}")}
        if paths:
            columns["path"] = pc.struct_field(table[image], "path").cast(pa.string())
        return pa.table(columns)

    def _labels(self, column: pa.ChunkedArray, name: str) -> np.ndarray[Any, Any]:
        """The place of every label of a file in class_names."""
        names, is_text = self.class_names, _is_text(column.type)
        places = pc.index_in(column, pa.array(names, pa.string())) if is_text else column.cast(pa.int64(), safe=False)
        filled = places.cast(pa.int64()).fill_null(-1).to_numpy()
        if not self._declared and is_text != self._textual:
            bad, wanted = (
                np.arange(len(column)),
                f"a {'text' if self._textual else 'number'}, as in other training files",
            )
        else:
            bad = np.flatnonzero((filled < 0) | (filled >= len(names)))
            wanted = "a class of the training split" if is_text else f"one of 0..{len(names) - 1}"
        if bad.size:
            raise UserError(
                f"{self.store.place(name)}, row {bad[0]}: the label {column[int(bad[0])].as_py()!r} is not {wanted}; "
                "correct or remove the row or the file, or set data.label_column to the column with the classes"
            )
        return filled

    def _footer(self, name: str) -> list[Any]:
        size = self.store.size(name) or 0
        length = int.from_bytes(self.store.read_range(name, max(0, size - 8), 4), "little")
        footer = self.store.read_range(name, max(0, size - 8 - length), length)
        return [name.rpartition("/")[2], hashlib.sha256(footer).hexdigest(), size]

    def _declared_names(self) -> list[str]:
        """Class names in the metadata of the first training file."""
        with self._parquet(self.files["train"][0]) as file:
            metadata = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        try:
            found = json.loads(metadata)
        except (ValueError, RecursionError):
            return []  # damaged, as if it were not there
        for key in ("info", "features", self.config.label_column, "names"):
            found = found.get(key) if isinstance(found, dict) else None
        return [str(name) for name in found] if isinstance(found, list) else []


def _split_part(path: str) -> str:
    """The file's name, else the first folder, that says the split; the file's name where none does."""
    *folders, file = path.split("/")
    return next((part for part in (file, *folders) if split_of(part)), file)


def _is_text(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in TEXT)


def _plain(column: pa.ChunkedArray, place: str) -> pa.ChunkedArray:
    """Labels as integers or as strings, whatever their encoding; raises UserError for labels that are neither."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if _is_text(column.type):
        return column.cast(pa.string())
    if not pa.types.is_integer(column.type):
        raise UserError(
            f"{place} holds {column.type}, neither whole numbers nor text; set data.label_column to the column with the "
            "classes"
        )
    return column


def _ids(tables: list[pa.Table], locations: pa.Array, rows: np.ndarray[Any, Any]) -> pa.Array:
    if all("path" in table.column_names for table in tables):
        paths = pa.chunked_array([chunk for table in tables for chunk in table["path"].chunks], pa.string())
        if not paths.null_count and first_duplicate(paths) is None:
            return paths.combine_chunks()
    return pc.binary_join_element_wise(locations, pa.array(rows).cast(pa.string()), ":")


def _leaf(kind: pa.DataType, column: str) -> str | None:
    """The Parquet column that holds the encoded images, or None where there is none."""
    if pa.types.is_struct(kind):
        return f"{column}.bytes" if kind.get_field_index("bytes") >= 0 else None
    return column if any(is_kind(kind) for is_kind in BINARY) else None


def _runs(names: list[str]) -> Iterator[tuple[int, int]]:
    """The stretches of equal names, as (first, one after the last)."""
    starts = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    yield from zip(starts, [*starts, len(names)][1:], strict=True)
