"""The prepared format: Parquet shards of uint8 images or clips, or of float32 arrays, sorted by class and id.

Columns: sample_id, label, and pixels (raw bytes of uint8), jpeg (encoded; frames of a clip stacked below each other) or values
(raw bytes of float32); the column's metadata holds the shape. A row group holds one class and few rows, so that any part of
the set can be read alone. `dataset.json` holds the metadata. See `data/README.md`.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_at_scale.core.atomic_files import file_digests, publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.data.codecs.image import Array, SampleRejected, decode_stored

SHARD_BYTES = 128 * 2**20
GROUP_BYTES, GROUP_ROWS = 256 * 2**10, 64  # size of a row group, the least that a random read fetches
OFFSET_BYTES = 4  # that Arrow stores per string
JPEG_RATIO = 0.2  # approximate size of a JPEG relative to raw pixels; used only to choose sizes
MAX_AXES, MAX_VALUES = 4, 2**30  # of a sample; data.frames and data.size allow 805 million
SCORED_CLIPS, SCORED_BYTES = 1024, 64 * 2**20  # limits of a scoring chunk of clips


@dataclass(frozen=True)
class RowGroup:
    """One row group: some samples of one class."""

    file: str
    number: int
    label: int
    rows: int


@dataclass(frozen=True)
class Chunk:
    """Consecutive row groups of one file: the unit of scoring. `index` counts over the split."""

    index: int
    file: str
    first: int
    groups: int
    rows: int


def schema(shape: Sequence[int], jpeg: bool = False, dtype: Any = np.uint8) -> pa.Schema:
    column_type = pa.binary() if jpeg else pa.binary(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    name = "values" if dtype != np.uint8 else "jpeg" if jpeg else "pixels"
    metadata = {"shape": json.dumps(list(shape))} | ({"dtype": np.dtype(dtype).name} if name == "values" else {})
    column = pa.field(name, column_type, metadata=metadata)
    return pa.schema([("sample_id", pa.string()), ("label", pa.int32()), column])


def to_table(ids: Sequence[str], labels: Sequence[int], pixels: Array) -> pa.Table:
    """ids [n], labels [n], pixels uint8 (or values float32) [n, *shape] -> a table of the prepared schema."""
    dtype = np.float32 if pixels.dtype == np.float32 else np.uint8
    kind = schema(pixels.shape[1:], dtype=dtype)
    buffer = pa.py_buffer(np.ascontiguousarray(pixels, dtype).reshape(-1))
    column = pa.FixedSizeBinaryArray.from_buffers(kind[-1].type, len(pixels), [None, buffer])
    return pa.table([pa.array(ids, pa.string()), np.asarray(labels, np.int32), column], schema=kind)


def to_jpeg_table(ids: Sequence[str], labels: Sequence[int], images: Sequence[bytes], shape: Sequence[int]) -> pa.Table:
    """The same for images of one shape that are stored as JPEG."""
    columns = [pa.array(ids, pa.string()), np.asarray(labels, np.int32), pa.array(images, pa.binary())]
    return pa.table(columns, schema=schema(shape, jpeg=True))


def pixels_of(table: pa.Table, threads: int = 1) -> Array:
    """The stored samples of a table: uint8 or float32 [n, *shape]. Raw samples are read-only views of Arrow's memory; JPEGs are
    decoded in `threads` threads.

    Raises UserError for a damaged JPEG, naming the sample.
    """
    name = table.column_names[-1]
    shape, dtype = _sample_type(table.schema.field(name))
    if name == "jpeg":
        images = np.empty((table.num_rows, *shape), np.uint8)
        frames = shape[0] if len(shape) == 4 else 1
        channels, height, width = shape[-3:]

        def decode(i: int, data: bytes) -> None:
            try:
                image = decode_stored(data, (channels, frames * height, width))
            except SampleRejected as error:
                sample_id = table["sample_id"][i].as_py()
                raise UserError(f"the prepared image of {sample_id!r} is damaged ({error}); ingest again") from None
            clip = image.reshape(channels, frames, height, width)
            images[i] = image if len(shape) == 3 else np.moveaxis(clip, 1, 0)

        with ThreadPoolExecutor(threads) if threads > 1 else nullcontext() as pool:
            deque((pool.map if pool else map)(decode, range(len(images)), table["jpeg"].to_pylist()), maxlen=0)
        return images
    column = table[name].combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    if column.null_count:
        raise UserError("a prepared sample is missing its values; ingest again")
    flat = np.frombuffer(column.buffers()[1] or b"", np.uint8)[column.offset * column.type.byte_width :]
    return flat[: len(column) * column.type.byte_width].view(dtype).reshape(len(column), *shape)


def _sample_type(field: pa.Field) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of the samples in a column. Raises UserError for metadata that `schema` does not write."""
    metadata = field.metadata or {}
    try:
        shape, dtype = tuple(json.loads(metadata[b"shape"])), (metadata.get(b"dtype") or b"uint8").decode()
        positive = all(type(n) is int and 0 < n <= MAX_VALUES for n in shape)
        known = dtype in ("uint8", "float32") and 0 < len(shape) <= MAX_AXES and math.prod(shape) <= MAX_VALUES
        size = math.prod(shape) * np.dtype(dtype).itemsize if positive and known else None
    except (KeyError, TypeError, ValueError, RecursionError):
        size = None
    if size is None or (field.name != "jpeg" and field.type != pa.binary(size)):
        column = f"the column {field.name!r} of a prepared shard"
        raise UserError(f"{column} has no valid shape in its metadata; ingest again")
    return shape, np.dtype(dtype)


def stack_frames(pixels: Array) -> Array:
    """The image to encode: uint8 [C, H, W] unchanged, a clip [T, C, H, W] as [C, T * H, W], frame below frame."""
    return pixels if pixels.ndim == 3 else np.moveaxis(pixels, 1, 0).reshape(pixels.shape[1], -1, pixels.shape[-1])


def group_rows(shape: Sequence[int], jpeg: bool, chunk: int, itemsize: int = 1) -> int:
    """Rows per row group: few enough for random reads, enough for fast ones."""
    size = int(np.prod(shape)) * itemsize * (JPEG_RATIO if jpeg else 1)
    return max(1, min(GROUP_ROWS, chunk, int(GROUP_BYTES / size)))


def scoring_chunk(shape: Sequence[int], chunk: int) -> int:
    """Samples per scoring chunk: `data.chunk`, or more for clips, which are decoded far more slowly than scored."""
    return chunk if len(shape) == 3 else max(chunk, min(SCORED_CLIPS, SCORED_BYTES // int(np.prod(shape))))


def write_shards(folder: Path, tables: Iterable[pa.Table], kind: pa.Schema, group: int) -> None:
    """Write tables, sorted by class and id, as shards whose row groups have one class and at most `group` rows."""
    folder.mkdir(parents=True)
    groups = _row_groups(tables, group)
    for number, table in enumerate(groups):
        with _writer(folder, number, kind) as writer:
            writer.write_table(table)
            size = table.nbytes
            while size < SHARD_BYTES and (table := next(groups, None)) is not None:
                writer.write_table(table)
                size += table.nbytes


def write_shard(folder: Path, number: int, tables: Iterable[pa.Table], kind: pa.Schema, group: int) -> None:
    """Write one shard of many, whose rows are as `shard_ranges` says; the bytes are those of `write_shards`."""
    with _writer(folder, number, kind) as writer:
        for table in _row_groups(tables, group):
            writer.write_table(table)


def shard_ranges(labels: Array, sizes: Array, group: int) -> list[tuple[int, int]]:
    """(start, stop) of each shard among all rows, given sorted labels and `row_bytes`, so that threads can write shards."""
    if not len(labels):
        return []
    ends = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]  # of each class
    groups = np.concatenate([np.arange(start, end, group) for start, end in pairwise(ends)])
    ranges, begin, total = [], 0, 0
    for start, size in zip(groups.tolist(), np.add.reduceat(sizes, groups).tolist(), strict=True):
        if total >= SHARD_BYTES:
            ranges.append((begin, start))
            begin, total = start, 0
        total += size
    return [*ranges, (begin, len(labels))]


def row_bytes(table: pa.Table) -> Array:
    """Bytes of each row of a table of the prepared schema, int64 [n]."""
    sizes = np.zeros(table.num_rows, np.int64)
    for column in table.columns:
        if pa.types.is_string(column.type) or pa.types.is_binary(column.type):
            sizes += pc.binary_length(column).to_numpy() + OFFSET_BYTES
        else:
            sizes += column.type.byte_width
    return sizes


def _writer(folder: Path, number: int, kind: pa.Schema) -> pq.ParquetWriter:
    compression, path = "none" if "jpeg" in kind.names else "zstd", folder / f"shard-{number:05d}.parquet"
    return pq.ParquetWriter(path, kind, use_dictionary=["label"], compression=compression)


def _row_groups(tables: Iterable[pa.Table], group: int) -> Iterator[pa.Table]:
    """Tables of one class and at most `group` rows. The end of an incoming table ends a group only if its class ends."""
    rest: pa.Table | None = None
    for table in tables:
        table = table if rest is None else pa.concat_tables([rest, table])
        labels = table["label"].to_numpy()
        ends = [*(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
        start, rest = 0, None
        for end in ends:
            while end - start >= group or (start < end and end < len(labels)):
                rows = min(group, end - start)
                yield table.slice(start, rows)
                start += rows
        if start < len(labels):
            rest = table.slice(start)
    if rest is not None:
        yield rest


def write_meta(folder: Path, meta: dict[str, Any], content: Any = None) -> None:
    """Publish dataset.json; its fingerprint covers the metadata and `content`, by default the hashes of the shards."""
    if content is None:
        files = file_digests(sorted(folder.rglob("*.parquet")))
        content = {path.relative_to(folder).as_posix(): entry["sha256"] for path, entry in files.items()}
    with publish(folder / "dataset.json") as temporary:
        text = json.dumps({**meta, "fingerprint": digest([meta, content])}, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")
