"""A prepared data set on disk, as every stage after ingest reads it: by scoring chunk, by class, or by sample.

The format is in `data/prepared/format.py`. What is read may come from somebody else, so types, shapes and classes are checked. The class
of a row group follows from the counts in dataset.json, as rows are sorted by class, and labels are compared with it
whenever they are read: statistics in a footer may lie, and pyarrow ends the process on broken ones.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.format import JPEG_PART, MOST_AXES, MOST_VALUES, Array, Chunk, RowGroup, pixels_of
from distill_at_scale.data.prepared.parquet import reading

OPEN_FILES = 64
TAKEN_BYTES = 16 * 2**20  # of row groups that are read together
MOST_BYTES = 2**30  # of the samples of a row group in memory, where it has several; ours have far fewer
MOST_CHUNK = 2**20  # samples of a unit of scoring
COLUMNS = [("sample_id", pa.string()), ("label", pa.int32())]  # before the samples themselves


class PreparedDataset:
    """A prepared data set on disk."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files: OrderedDict[tuple[str, str], pq.ParquetFile] = OrderedDict()
        self._reading = Lock()  # draws are read ahead, and what pyarrow buffers of a file is not for two threads
        try:
            self.meta = _checked(json.loads((self.folder / "dataset.json").read_text()))
        except FileNotFoundError:
            raise UserError(
                f"{self.folder} holds no prepared data; run `distill-at-scale ingest CONFIG` first"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.folder}/dataset.json is damaged ({error}); ingest again") from None

    @property
    def class_names(self) -> list[str]:
        return self.meta["class_names"]

    @property
    def source_class_names(self) -> list[str]:
        """Every class of the source, also where only some were taken."""
        return self.meta.get("source_class_names", self.class_names)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.meta["shape"])

    @property
    def mean(self) -> list[float]:
        return self.meta["mean"]

    @property
    def std(self) -> list[float]:
        return self.meta["std"]

    @property
    def kind(self) -> str:
        """What the samples are: images, clips or tensors (float32 arrays)."""
        return self.meta.get("kind") or ("clips" if len(self.shape) == 4 else "images")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the samples in memory."""
        return np.dtype(np.float32 if self.kind == "tensors" else np.uint8)

    @property
    def value_bytes(self) -> int:
        """What one sample takes in memory."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def image_bytes(self) -> int:
        """About what one image takes as it is stored."""
        return max(1, int(self.value_bytes * (JPEG_PART if self.meta.get("jpeg") else 1)))

    @property
    def fingerprint(self) -> str:
        return self.meta["fingerprint"]

    def counts(self, split: str = "train") -> list[int]:
        return self.meta["counts"].get(split) or [0] * len(self.class_names)

    def has_test(self) -> bool:
        return sum(self.counts("test")) > 0

    def groups(self, split: str = "train") -> list[RowGroup]:
        """Every row group of a split, in class order."""
        return self._groups[split]

    def chunks(self, split: str = "train") -> list[Chunk]:
        """The whole split in units of at most `data.chunk` samples (one row group at least)."""
        most = self.meta.get("chunk", 1024)
        found: list[Chunk] = []
        for group in self.groups(split):
            last = found[-1] if found else None
            if last is not None and last.file == group.file and last.rows + group.rows <= most:
                found[-1] = replace(last, groups=last.groups + 1, rows=last.rows + group.rows)
            else:
                found.append(Chunk(len(found), group.file, group.number, 1, group.rows))
        return found

    def read(self, part: Chunk | RowGroup, split: str = "train", columns: Sequence[str] | None = None) -> pa.Table:
        numbers = [part.number] if isinstance(part, RowGroup) else range(part.first, part.first + part.groups)
        return self._rows(split, part.file, numbers, columns)

    def pixels(self, table: pa.Table, threads: int = 1) -> Array:
        """The images of a table that was read here: uint8 [n, *shape]; JPEGs are decoded in so many threads.

        Raises UserError where they are of another shape than dataset.json says.
        """
        found = pixels_of(table, threads)
        if found.shape[1:] != self.shape:
            raise UserError(f"{self.folder} holds samples of shape {found.shape[1:]}, not {self.shape}; ingest again")
        return found

    def index(self, split: str = "train") -> tuple[list[str], Array]:
        """All ids and labels of a split, in the order of the shards, without touching pixels."""
        tables = [self.read(chunk, split, ["sample_id", "label"]) for chunk in self.chunks(split)]
        table = pa.concat_tables(tables)
        return table["sample_id"].to_pylist(), table["label"].to_numpy()

    def load(
        self, split: str, only: Collection[str] | pa.Array | None = None, labels: Collection[int] | None = None
    ) -> tuple[Array, Array]:
        """Pixels uint8 (values float32) [n, *shape] and labels int64 [n], in shard order.

        `only` keeps these ids, `labels` these classes. Row groups without a wanted sample are not read.
        """
        groups = [g for g in self.groups(split) if labels is None or g.label in labels]
        mask = None if only is None else self._wanted(split, groups, only)
        pixels, found, start = [np.zeros((0, *self.shape), self.dtype)], [np.zeros(0, np.int64)], 0
        for group in groups:
            inside = None if mask is None else mask[start : start + group.rows]
            start += group.rows
            if inside is None or inside.any():
                table = self.read(group, split)
                pixels.append(self.pixels(table if inside is None else table.filter(pa.array(inside))))
                found.append(np.full(len(pixels[-1]), group.label, np.int64))
        return np.concatenate(pixels), np.concatenate(found)

    def _wanted(self, split: str, groups: Sequence[RowGroup], only: Collection[str] | pa.Array) -> Array:
        """Which samples of some row groups are among `only`: bool [rows]; looked up at once, as the set is built once."""
        wanted = only if isinstance(only, pa.Array | pa.ChunkedArray) else pa.array(list(only), pa.string())
        numbers: dict[str, list[int]] = {}
        for group in groups:
            numbers.setdefault(group.file, []).append(group.number)
        ids = [self._rows(split, f, n, ["sample_id"])["sample_id"] for f, n in numbers.items()]
        chunks = [chunk for column in ids for chunk in column.chunks]
        return pc.is_in(pa.chunked_array(chunks, pa.string()), wanted).to_numpy()

    def ids(self, split: str, label: int) -> pa.Array:
        """The ids of a class, in the order of its places."""
        found = [pa.array([], pa.string())]
        for file, groups in self._files_of(split, label).items():
            numbers = [group.number for group in groups]
            found += self._rows(split, file, numbers, ["sample_id"])["sample_id"].chunks
        return pa.chunked_array(found, pa.string()).combine_chunks()

    def take(self, split: str, label: int, places: Sequence[int] | Array, threads: int = 1) -> Array:
        """Samples [n, *shape] at some places (ascending) within a class; reads only the row groups that hold them.

        Other samples of these row groups are not decoded. JPEGs are decoded in so many threads.
        """
        parts = [np.zeros((0, *self.shape), self.dtype)]
        for file, numbers, rows in self._reads(split, label, np.asarray(places, np.int64)):
            table = self._rows(split, file, numbers)
            parts.append(self.pixels(table.take(pa.array(rows)), threads))
        return np.concatenate(parts)

    def _reads(self, split: str, label: int, wanted: Array) -> Iterator[tuple[str, list[int], Array]]:
        """(file, row groups, rows within them): what must be read for some places of a class, some MB at a time."""
        file, numbers, rows, held, start = "", list[int](), list[Array](), 0, 0
        for group in self._by_label[split].get(label, []):
            first, last = np.searchsorted(wanted, [start, start + group.rows])
            if first < last:
                if numbers and (group.file != file or held * self.image_bytes >= TAKEN_BYTES):
                    yield file, numbers, np.concatenate(rows)
                    numbers, rows, held = [], [], 0
                file = group.file
                numbers.append(group.number)
                rows.append(wanted[first:last] - start + held)
                held += group.rows
            start += group.rows
        if numbers:
            yield file, numbers, np.concatenate(rows)

    def _files_of(self, split: str, label: int) -> dict[str, list[RowGroup]]:
        """The row groups of a class by file, in order."""
        found: dict[str, list[RowGroup]] = {}
        for group in self._by_label[split].get(label, []):
            found.setdefault(group.file, []).append(group)
        return found

    @cached_property
    def _groups(self) -> dict[str, list[RowGroup]]:
        return {split: list(self._scan(split)) for split in ("train", "test")}

    @cached_property
    def _by_label(self) -> dict[str, dict[int, list[RowGroup]]]:
        found: dict[str, dict[int, list[RowGroup]]] = {split: {} for split in self._groups}
        for split, groups in self._groups.items():
            for group in groups:
                found[split].setdefault(group.label, []).append(group)
        return found

    @cached_property
    def _by_file(self) -> dict[tuple[str, str], list[RowGroup]]:
        found: dict[tuple[str, str], list[RowGroup]] = {}
        for split, groups in self._groups.items():
            for group in groups:
                found.setdefault((split, group.file), []).append(group)
        return found

    def _scan(self, split: str) -> Iterator[RowGroup]:
        """Raises UserError where the shards hold other rows than dataset.json counts."""
        ends, start = list(accumulate(self.counts(split))), 0  # of each class among the rows of the split
        for path in sorted((self.folder / split).glob("shard-*.parquet")):
            for number, rows in enumerate(_group_rows(path)):
                label = bisect_right(ends, start)
                fits = rows == 1 or 1 < rows <= MOST_BYTES // self.value_bytes
                if not fits or label == len(ends) or start + rows > ends[label]:
                    raise UserError(f"{path} holds other rows than {self.folder}/dataset.json counts; ingest again")
                yield RowGroup(path.name, number, label, rows)
                start += rows
        if start < sum(self.counts(split)):
            raise UserError(f"{self.folder / split} lacks rows that {self.folder}/dataset.json counts; ingest again")

    def _rows(self, split: str, file: str, numbers: Iterable[int], columns: Sequence[str] | None = None) -> pa.Table:
        """Some row groups of a file. Raises UserError where it is damaged, or holds other classes than dataset.json says."""
        groups = [self._by_file[split, file][number] for number in numbers]
        with self._reading, reading(self.folder / split / file, "ingest"):
            found = self._open(split, file).read_row_groups([g.number for g in groups], columns, use_threads=False)
        rows = [group.rows for group in groups]
        wrong = found.num_rows != sum(rows)
        if not wrong and "label" in found.column_names:
            wrong = not np.array_equal(found["label"].to_numpy(), np.repeat([group.label for group in groups], rows))
        if wrong:
            place = self.folder / split / file
            raise UserError(
                f"{place} holds samples of other classes than {self.folder}/dataset.json counts; ingest again"
            )
        return found

    def _open(self, split: str, file: str) -> pq.ParquetFile:
        """Files stay open between reads, the last few of them: a footer takes longer to read than a row group."""
        key = (split, file)
        if key not in self._files:
            self._files[key] = pq.ParquetFile(self.folder / split / file)
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(key)
        return self._files[key]


def _group_rows(path: Path) -> list[int]:
    """The rows of every row group of a shard, from its footer. Raises UserError for what is no shard."""
    with reading(path, "ingest"):
        metadata = pq.read_metadata(path)
        columns = [(field.name, field.type) for field in metadata.schema.to_arrow_schema()]
        rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    if columns[:-1] != COLUMNS:
        raise UserError(f"{path} is no shard: its columns are others; ingest again")
    return rows


def _checked(meta: Any) -> dict[str, Any]:
    """What `write_meta` wrote; raises ValueError for anything else."""
    if not isinstance(meta, dict):
        raise ValueError("it is no JSON object")
    names, shape, counts = meta.get("class_names", []), meta.get("shape", [1]), meta.get("counts", {})
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("class_names are no list of names")
    if (
        not isinstance(shape, list)
        or not all(isinstance(n, int) and n > 0 for n in shape)
        or not 0 < len(shape) <= MOST_AXES
    ):
        raise ValueError(f"the shape {shape!r:.80} is that of no sample")
    if math.prod(shape) > MOST_VALUES:
        raise ValueError("a sample has too many values")
    if not isinstance(counts, dict) or not all(_counts(found, len(names)) for found in counts.values()):
        raise ValueError("it counts no samples of its classes")
    chunk = meta.get("chunk", 1)
    if type(chunk) is not int or not 0 < chunk <= MOST_CHUNK:
        raise ValueError(f"the chunk {chunk!r:.80} is no number of samples up to {MOST_CHUNK}")
    numbers = [meta.get("mean", []), meta.get("std", [])]
    if not all(isinstance(found, list) and all(_finite(number) for number in found) for found in numbers):
        raise ValueError("mean and std are no lists of numbers")
    return meta


def _finite(number: Any) -> bool:
    return type(number) in (int, float) and math.isfinite(number)


def _counts(found: Any, classes: int) -> bool:
    return isinstance(found, list) and len(found) == classes and all(type(n) is int and n >= 0 for n in found)
