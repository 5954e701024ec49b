"""Reads a prepared data set: by scoring chunk, by class, or by sample.

The files may come from someone else, so types, shapes and classes are checked. Rows are sorted by class, so the counts in
dataset.json give the class of each row group; every read compares the labels with it. Statistics in a footer are not
trusted, and broken ones make pyarrow end the process.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_at_scale.core import rng
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.format import JPEG_RATIO, MAX_AXES, MAX_VALUES, Array, Chunk, RowGroup, pixels_of
from distill_at_scale.data.prepared.parquet import reading

OPEN_FILES = 64
TAKEN_BYTES = 16 * 2**20  # of row groups that are read together
MAX_GROUP_BYTES = 2**30  # of a row group with several samples, decoded; ours are far smaller
MAX_CHUNK = 2**20  # samples of a scoring chunk
COLUMNS = [("sample_id", pa.string()), ("label", pa.int32())]  # before the column of samples


class PreparedDataset:
    """A prepared data set on disk. Methods raise UserError for damaged files."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files: OrderedDict[Path, pq.ParquetFile] = OrderedDict()
        self._reading = Lock()  # batches are prefetched in a thread, and pyarrow's open files are not thread-safe
        try:
            self.meta = _checked(json.loads((self.folder / "dataset.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            hint = "run `distill-at-scale ingest CONFIG` first"
            raise UserError(f"{self.folder} holds no prepared data; {hint}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.folder}/dataset.json is damaged ({error}); ingest again") from None
        self.class_names: list[str] = self.meta.get("class_names", [])
        self.shape: tuple[int, ...] = tuple(self.meta.get("shape", ()))
        # images, clips or tensors (float32 arrays)
        self.kind: str = self.meta.get("kind") or ("clips" if len(self.shape) == 4 else "images")
        self.dtype = np.dtype(np.float32 if self.kind == "tensors" else np.uint8)
        self.sample_bytes = math.prod(self.shape) * self.dtype.itemsize  # in memory
        ratio = JPEG_RATIO if self.meta.get("jpeg") else 1
        self.stored_bytes = max(1, int(self.sample_bytes * ratio))  # approximate, on disk

    @property
    def source_class_names(self) -> list[str]:
        """All classes of the source, of which data.classes may have chosen some."""
        return self.meta.get("source_class_names", self.class_names)

    @property
    def mean(self) -> list[float]:
        return self.meta["mean"]

    @property
    def std(self) -> list[float]:
        return self.meta["std"]

    @property
    def fingerprint(self) -> str:
        return self.meta["fingerprint"]

    def counts(self, split: str = "train") -> list[int]:
        return self.meta.get("counts", {}).get(split) or [0] * len(self.class_names)

    def has_test(self) -> bool:
        return sum(self.counts("test")) > 0

    def groups(self, split: str = "train") -> list[RowGroup]:
        """All row groups of a split, in class order."""
        return self._groups[split]

    def chunks(self, split: str = "train") -> list[Chunk]:
        """The split in units of at most `data.chunk` samples, but at least one row group."""
        chunks, limit = list[Chunk](), self.meta.get("chunk", 1024)
        for group in self.groups(split):
            last = chunks[-1] if chunks else None
            if last is not None and last.file == group.file and last.rows + group.rows <= limit:
                chunks[-1] = replace(last, groups=last.groups + 1, rows=last.rows + group.rows)
            else:
                chunks.append(Chunk(len(chunks), group.file, group.number, 1, group.rows))
        return chunks

    def read(self, part: Chunk | RowGroup, split: str = "train", columns: Sequence[str] | None = None) -> pa.Table:
        numbers = [part.number] if isinstance(part, RowGroup) else range(part.first, part.first + part.groups)
        return self._rows(split, part.file, numbers, columns)

    def pixels(self, table: pa.Table, threads: int = 1) -> Array:
        """The samples of a table read here: uint8 (values float32) [n, *shape]. JPEGs are decoded in `threads` threads."""
        pixels = pixels_of(table, threads)
        if pixels.shape[1:] != self.shape:
            raise UserError(f"{self.folder} holds samples of shape {pixels.shape[1:]}, not {self.shape}; ingest again")
        return pixels

    def index(self, split: str = "train") -> tuple[list[str], Array]:
        """All ids and labels of a split, in the order of the shards, without reading pixels."""
        table = pa.concat_tables(self.read(chunk, split, ["sample_id", "label"]) for chunk in self.chunks(split))
        return table["sample_id"].to_pylist(), table["label"].to_numpy()

    def load(
        self, split: str, only: Collection[str] | pa.Array | None = None, labels: Collection[int] | None = None
    ) -> tuple[Array, Array]:
        """Pixels uint8 (values float32) [n, *shape] and labels int64 [n], in shard order.

        `only` keeps these ids, `labels` these classes. Row groups without a wanted sample are not read.
        """
        groups = [g for g in self.groups(split) if labels is None or g.label in labels]
        mask = None
        if only is not None:  # one look-up for all ids, as it builds its hash table once
            wanted = only if isinstance(only, pa.Array | pa.ChunkedArray) else pa.array(list(only), pa.string())
            mask = pc.is_in(self._ids(split, groups), wanted).to_numpy()
        pixels, targets, start = [np.zeros((0, *self.shape), self.dtype)], [np.zeros(0, np.int64)], 0
        for group in groups:
            inside = None if mask is None else mask[start : start + group.rows]
            start += group.rows
            if inside is None or inside.any():
                table = self.read(group, split)
                pixels.append(self.pixels(table if inside is None else table.filter(pa.array(inside))))
                targets.append(np.full(len(pixels[-1]), group.label, np.int64))
        return np.concatenate(pixels), np.concatenate(targets)

    def ids(self, split: str, label: int) -> pa.Array:
        """The ids of a class, in shard order."""
        return self._ids(split, self._by_label[split].get(label, [])).combine_chunks()

    def _ids(self, split: str, groups: Iterable[RowGroup]) -> pa.ChunkedArray:
        chunks: list[pa.Array] = []
        for file, inside in groupby(groups, lambda group: group.file):
            chunks += self._rows(split, file, [group.number for group in inside], ["sample_id"])["sample_id"].chunks
        return pa.chunked_array(chunks, pa.string())

    def take(self, split: str, label: int, places: Sequence[int] | Array, threads: int = 1) -> Array:
        """Samples [n, *shape] at ascending positions within a class. Other samples of their row groups are not decoded."""
        tables = self.take_rows(split, label, np.asarray(places, np.int64))
        pixels = [self.pixels(table, threads) for table in tables]
        return np.concatenate([np.zeros((0, *self.shape), self.dtype), *pixels])

    def sample(self, split: str, size: int, seed: int) -> tuple[Array, Array]:
        """About `size` random samples, spread evenly over the classes, in a random order: [n, *shape] and labels int64 [n]."""
        draw, counts = rng.numpy_generator(seed, "sample of the data", split), self.counts(split)
        labels = draw.permutation(np.flatnonzero(counts))[:size]
        each, targets = max(1, size // max(1, len(labels))), list[int]()
        pixels = [np.zeros((0, *self.shape), self.dtype)]
        for label in labels.tolist():
            pixels.append(self.take(split, label, np.sort(draw.permutation(counts[label])[:each])))
            targets += [label] * len(pixels[-1])
        order = draw.permutation(len(targets))
        return np.concatenate(pixels)[order], np.array(targets, np.int64)[order]

    def take_rows(self, split: str, label: int, places: Array) -> Iterator[pa.Table]:
        """Stored rows at ascending positions within a class, some MB of row groups at a time."""
        file, numbers, rows, held, start = "", list[int](), list[Array](), 0, 0
        for group in self._by_label[split].get(label, []):
            first, last = np.searchsorted(places, [start, start + group.rows])
            if first < last:
                if numbers and (group.file != file or held * self.stored_bytes >= TAKEN_BYTES):
                    yield self._rows(split, file, numbers).take(pa.array(np.concatenate(rows)))
                    numbers, rows, held = [], [], 0
                file = group.file
                numbers.append(group.number)
                rows.append(places[first:last] - start + held)
                held += group.rows
            start += group.rows
        if numbers:
            yield self._rows(split, file, numbers).take(pa.array(np.concatenate(rows)))

    @cached_property
    def _groups(self) -> dict[str, list[RowGroup]]:
        return {split: list(self._scan(split)) for split in ("train", "test")}

    @cached_property
    def _by_label(self) -> dict[str, dict[int, list[RowGroup]]]:
        grouped = {split: groupby(groups, lambda group: group.label) for split, groups in self._groups.items()}
        return {split: {label: list(inside) for label, inside in pairs} for split, pairs in grouped.items()}

    @cached_property
    def _by_file(self) -> dict[str, dict[str, list[RowGroup]]]:
        grouped = {split: groupby(groups, lambda group: group.file) for split, groups in self._groups.items()}
        return {split: {file: list(inside) for file, inside in pairs} for split, pairs in grouped.items()}

    def _scan(self, split: str) -> Iterator[RowGroup]:
        """The row groups according to the footers. Raises UserError if they contradict the counts in dataset.json."""
        ends, start = list(accumulate(self.counts(split))), 0  # of each class among the rows of the split
        for path in sorted((self.folder / split).glob("shard-*.parquet")):
            with reading(path, "ingest"):
                metadata = pq.read_metadata(path)
                columns = [(field.name, field.type) for field in metadata.schema.to_arrow_schema()]
                group_rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
            if columns[:-1] != COLUMNS:
                raise UserError(f"{path} is not a shard of prepared data: unexpected columns; ingest again")
            for number, rows in enumerate(group_rows):
                label = bisect_right(ends, start)
                fits = rows == 1 or 1 < rows <= MAX_GROUP_BYTES // self.sample_bytes
                if not fits or label == len(ends) or start + rows > ends[label]:
                    raise UserError(f"{path} holds other rows than {self.folder}/dataset.json counts; ingest again")
                yield RowGroup(path.name, number, label, rows)
                start += rows
        if start < sum(self.counts(split)):
            raise UserError(f"{self.folder / split} lacks rows that {self.folder}/dataset.json counts; ingest again")

    def _rows(self, split: str, file: str, numbers: Iterable[int], columns: Sequence[str] | None = None) -> pa.Table:
        """Some row groups of a file. Raises UserError if it is damaged or contradicts the counts in dataset.json."""
        path, groups = self.folder / split / file, [self._by_file[split][file][number] for number in numbers]
        with self._reading, reading(path, "ingest"):
            # the most recently used files stay open: reading a footer takes longer than reading a row group
            if path not in self._files:
                self._files[path] = pq.ParquetFile(path)
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)[1].close()
            self._files.move_to_end(path)
            table = self._files[path].read_row_groups([g.number for g in groups], columns, use_threads=False)
        rows = [group.rows for group in groups]
        wrong = table.num_rows != sum(rows)
        if not wrong and "label" in table.column_names:
            wrong = not np.array_equal(table["label"].to_numpy(), np.repeat([group.label for group in groups], rows))
        if wrong:
            facts = self.folder / "dataset.json"
            raise UserError(f"{path} holds samples of other classes than {facts} counts; ingest again")
        return table


def _checked(meta: Any) -> dict[str, Any]:
    """The content of dataset.json. Raises ValueError for anything that `write_meta` does not write."""
    if not isinstance(meta, dict):
        raise ValueError("it is not a JSON object")
    names, shape, counts = meta.get("class_names", []), meta.get("shape", [1]), meta.get("counts", {})
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("class_names is not a list of names")
    positive = isinstance(shape, list) and all(isinstance(n, int) and n > 0 for n in shape)
    if not positive or not 0 < len(shape) <= MAX_AXES:
        raise ValueError(f"{shape!r:.80} is not the shape of a sample")
    if math.prod(shape) > MAX_VALUES:
        raise ValueError("a sample has too many values")
    if not isinstance(counts, dict) or not all(
        isinstance(numbers, list) and len(numbers) == len(names) and all(type(n) is int and n >= 0 for n in numbers)
        for numbers in counts.values()
    ):
        raise ValueError("counts are not numbers of samples per class")
    chunk = meta.get("chunk", 1)
    if type(chunk) is not int or not 0 < chunk <= MAX_CHUNK:
        raise ValueError(f"the chunk {chunk!r:.80} is not a number of samples up to {MAX_CHUNK}")
    for numbers in (meta.get("mean", []), meta.get("std", [])):
        if not isinstance(numbers, list) or not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
            raise ValueError("mean and std are not lists of numbers")
    return meta
