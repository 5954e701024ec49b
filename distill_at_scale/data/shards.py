"""The prepared format: class-sorted Parquet shards of uint8 tensors, and reading them.

`train/` and `test/` hold files `shard-00000.parquet` with the columns sample_id (string), label (int32) and pixels
(fixed-shape uint8 tensor, C x H x W). Rows are sorted by class and, within it, by id; a row group holds one class.
`dataset.json` holds class names, shape, counts, channel statistics and the content fingerprint.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_at_scale.errors import UserError
from distill_at_scale.rundir import digest, publish

SHARD_BYTES = 128 * 2**20

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Chunk:
    """One row group: the fixed unit of scoring work. `index` counts over the whole split."""

    index: int
    file: str
    row_group: int
    label: int
    rows: int


def schema(shape: Sequence[int]) -> pa.Schema:
    pixels = pa.fixed_shape_tensor(pa.uint8(), list(shape))
    return pa.schema([("sample_id", pa.string()), ("label", pa.int32()), ("pixels", pixels)])


def to_table(ids: Sequence[str], labels: Sequence[int], pixels: Array) -> pa.Table:
    """ids [n], labels [n], pixels uint8 [n, *shape] -> a table of the prepared schema."""
    kind = schema(pixels.shape[1:])
    flat = pa.array(np.ascontiguousarray(pixels).reshape(-1))
    storage = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(pixels.shape[1:])))
    tensor = pa.ExtensionArray.from_storage(kind.field("pixels").type, storage)
    return pa.table([pa.array(ids, pa.string()), np.asarray(labels, np.int32), tensor], schema=kind)


def pixels_of(table: pa.Table) -> Array:
    """The pixels of a table as uint8 [n, *shape] (read-only where Arrow allows no copy)."""
    column = table["pixels"].combine_chunks()
    chunk = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    return chunk.to_numpy_ndarray()


def write_shards(folder: Path, classes: Iterable[tuple[int, pa.Table]], shape: Sequence[int], group: int) -> None:
    """Write (label, rows) pairs, in class order, as shards with row groups of one class and at most `group` rows."""
    folder.mkdir(parents=True)
    kind, writer, size, count = schema(shape), None, 0, 0
    for _, table in classes:
        ordered = table.sort_by("sample_id")
        if writer is None or size >= SHARD_BYTES:
            if writer is not None:
                writer.close()
            writer = pq.ParquetWriter(folder / f"shard-{count:05d}.parquet", kind, compression="zstd")
            size, count = 0, count + 1
        writer.write_table(ordered, row_group_size=group)
        size += ordered.num_rows * int(np.prod(shape))
    if writer is not None:
        writer.close()


class Prepared:
    """A prepared data set on disk."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "dataset.json").read_text())
        except FileNotFoundError:
            raise UserError(
                f"{self.folder} holds no prepared data; run `distill-at-scale ingest CONFIG` first"
            ) from None

    @property
    def class_names(self) -> list[str]:
        return self.meta["class_names"]

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
    def fingerprint(self) -> str:
        return self.meta["fingerprint"]

    def counts(self, split: str = "train") -> list[int]:
        return self.meta["counts"].get(split) or [0] * len(self.class_names)

    def has_test(self) -> bool:
        return sum(self.counts("test")) > 0

    @cached_property
    def _chunks(self) -> dict[str, list[Chunk]]:
        return {split: list(self._scan(split)) for split in ("train", "test")}

    def chunks(self, split: str = "train") -> list[Chunk]:
        """Every row group of a split, in class order."""
        return self._chunks[split]

    def read(self, chunk: Chunk, split: str = "train", columns: Sequence[str] | None = None) -> pa.Table:
        return pq.ParquetFile(self.folder / split / chunk.file).read_row_group(chunk.row_group, columns=columns)

    def index(self, split: str = "train") -> tuple[list[str], Array]:
        """All ids and labels of a split, in the order of the shards, without touching pixels."""
        tables = [self.read(chunk, split, ["sample_id", "label"]) for chunk in self.chunks(split)]
        table = pa.concat_tables(tables)
        return table["sample_id"].to_pylist(), table["label"].to_numpy()

    def load(
        self, split: str, only: Collection[str] | None = None, labels: Collection[int] | None = None
    ) -> tuple[Array, Array]:
        """Pixels uint8 [n, *shape] and labels int64 [n], in shard order; `only` keeps these ids, `labels` these classes."""
        wanted = None if only is None else pa.array(sorted(only), pa.string())
        pixels, found = [np.zeros((0, *self.shape), np.uint8)], [np.zeros(0, np.int64)]
        for chunk in self.chunks(split):
            if labels is not None and chunk.label not in labels:
                continue
            table = self.read(chunk, split)
            if wanted is not None:
                table = table.filter(pa.compute.is_in(table["sample_id"], wanted))
            if table.num_rows:
                pixels.append(pixels_of(table))
                found.append(table["label"].to_numpy().astype(np.int64))
        return np.concatenate(pixels), np.concatenate(found)

    def take(self, split: str, label: int, places: Sequence[int]) -> Array:
        """Pixels uint8 [n, *shape] at some places (ascending) within a class; reads only the row groups that hold them."""
        parts, start = [np.zeros((0, *self.shape), np.uint8)], 0
        for chunk in (c for c in self.chunks(split) if c.label == label):
            inside = [place - start for place in places if start <= place < start + chunk.rows]
            if inside:
                parts.append(pixels_of(self.read(chunk, split))[inside])
            start += chunk.rows
        return np.concatenate(parts)

    def _scan(self, split: str) -> Iterator[Chunk]:
        index = 0
        for path in sorted((self.folder / split).glob("shard-*.parquet")):
            metadata = pq.read_metadata(path)
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group)
                yield Chunk(index, path.name, group, int(rows.column(1).statistics.min), rows.num_rows)
                index += 1


def write_meta(folder: Path, meta: dict[str, Any], content: Any) -> None:
    """Publish dataset.json; `content` is what the fingerprint covers besides the metadata itself."""
    with publish(folder / "dataset.json") as temporary:
        temporary.write_text(json.dumps({**meta, "fingerprint": digest([meta, content])}, indent=1) + "\n")
