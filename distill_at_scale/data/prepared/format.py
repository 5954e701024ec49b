"""The prepared format: class-sorted Parquet shards of uint8 images or clips, or of float32 arrays.

`train/` and `test/` hold files `shard-00000.parquet` with the columns sample_id (string), label (int32) and either pixels
(fixed-size binary: the bytes of a uint8 tensor C x H x W or, of a clip, T x C x H x W, whose shape is in the field's
metadata; Parquet would store a list of bytes as 32-bit numbers, which takes 13 times as long to read) or, where large, jpeg
(binary: the resized image, encoded again; of a clip its frames below each other). Arrays of other data are in a column
values (fixed-size binary of float32; their shape and type are in the field's metadata). Rows are sorted by class and, within
it, by id; a row group holds one class and few rows, so that any part of the set is read without the rest. `dataset.json`
holds class names, shape, counts, channel statistics and the content fingerprint. Reading them is in `data/prepared/dataset.py`.
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

from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.data.codecs.image import SampleRejected, decode_stored

SHARD_BYTES = 128 * 2**20
GROUP_BYTES, GROUP_ROWS = 256 * 2**10, 64  # a row group: what a random read fetches at least
OFFSET_BYTES = 4  # that Arrow holds for every string
JPEG_PART = 0.2  # of an image's raw bytes that its JPEG takes, about; only sizes depend on it
MOST_AXES, MOST_VALUES = 4, 2**30  # of a sample; data.frames and data.size allow 805 million
CLIPS_SCORED, SCORED_BYTES = 1024, 64 * 2**20  # clips in a unit of scoring work at most, and their bytes

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class RowGroup:
    """One row group: some samples of one class."""

    file: str
    number: int
    label: int
    rows: int


@dataclass(frozen=True)
class Chunk:
    """Consecutive row groups of one file: the fixed unit of scoring work. `index` counts over the whole split."""

    index: int
    file: str
    first: int
    groups: int
    rows: int


def schema(shape: Sequence[int], jpeg: bool = False, dtype: Any = np.uint8) -> pa.Schema:
    size = pa.binary() if jpeg else pa.binary(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    about = {"shape": json.dumps(list(shape))}
    if dtype == np.uint8:
        image = pa.field("jpeg" if jpeg else "pixels", size, metadata=about)
    else:
        image = pa.field("values", size, metadata=about | {"dtype": np.dtype(dtype).name})
    return pa.schema([("sample_id", pa.string()), ("label", pa.int32()), image])


def to_table(ids: Sequence[str], labels: Sequence[int], pixels: Array) -> pa.Table:
    """ids [n], labels [n], pixels uint8 (or values float32) [n, *shape] -> a table of the prepared schema."""
    dtype = np.float32 if pixels.dtype == np.float32 else np.uint8
    kind = schema(pixels.shape[1:], dtype=dtype)
    buffer = pa.py_buffer(np.ascontiguousarray(pixels, dtype).reshape(-1))
    column = pa.FixedSizeBinaryArray.from_buffers(kind[-1].type, len(pixels), [None, buffer])
    return pa.table([pa.array(ids, pa.string()), np.asarray(labels, np.int32), column], schema=kind)


def to_jpeg_table(ids: Sequence[str], labels: Sequence[int], images: Sequence[bytes], shape: Sequence[int]) -> pa.Table:
    """The same for images of one shape that are kept as JPEG."""
    columns = [pa.array(ids, pa.string()), np.asarray(labels, np.int32), pa.array(images, pa.binary())]
    return pa.table(columns, schema=schema(shape, jpeg=True))


def pixels_of(table: pa.Table, threads: int = 1) -> Array:
    """The samples of a table as they are stored, uint8 or float32 [n, *shape] (raw ones read-only: Arrow's own memory);
    JPEGs are decoded.

    Raises UserError for a JPEG that is damaged, naming the sample.
    """
    name = table.column_names[-1]
    shape, dtype = _form(table.schema.field(name))
    if name == "jpeg":
        return _decoded(table, shape, threads)
    column = table[name].combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    if column.null_count:
        raise UserError("a prepared sample is missing its values; ingest again")
    flat = np.frombuffer(column.buffers()[1] or b"", np.uint8)[column.offset * column.type.byte_width :]
    return flat[: len(column) * column.type.byte_width].view(dtype).reshape(len(column), *shape)


def _form(field: pa.Field) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the samples in a column; raises UserError for what `schema` does not make."""
    about = field.metadata or {}
    try:
        shape, dtype = tuple(json.loads(about[b"shape"])), (about.get(b"dtype") or b"uint8").decode()
        sizes = all(type(n) is int and 0 < n <= MOST_VALUES for n in shape)
        assumed = dtype in ("uint8", "float32") and 0 < len(shape) <= MOST_AXES and math.prod(shape) <= MOST_VALUES
        size = math.prod(shape) * np.dtype(dtype).itemsize if sizes and assumed else None
    except (KeyError, TypeError, ValueError, RecursionError):
        size = None
    if size is None or (field.name != "jpeg" and field.type != pa.binary(size)):
        raise UserError(
            f"the column {field.name!r} of a prepared shard says nothing sensible about its shape; ingest again"
        )
    return shape, np.dtype(dtype)


def as_image(pixels: Array) -> Array:
    """uint8 [C, H, W] as it is, a clip [T, C, H, W] as one tall image [C, T * H, W], frame below frame; how it is encoded."""
    return pixels if pixels.ndim == 3 else np.moveaxis(pixels, 1, 0).reshape(pixels.shape[1], -1, pixels.shape[-1])


def _decoded(table: pa.Table, shape: tuple[int, ...], threads: int) -> Array:
    images = np.empty((table.num_rows, *shape), np.uint8)
    frames = shape[0] if len(shape) == 4 else 1
    channels, height, width = shape[-3:]

    def decode(i: int, data: bytes) -> None:
        try:
            image = decode_stored(data, (channels, frames * height, width))
            images[i] = image if len(shape) == 3 else np.moveaxis(image.reshape(channels, frames, height, width), 1, 0)
        except SampleRejected as error:
            name = table["sample_id"][i].as_py()
            raise UserError(f"the prepared image of {name!r} is damaged ({error}); ingest again") from None

    with ThreadPoolExecutor(threads) if threads > 1 else nullcontext() as pool:
        deque((pool.map if pool else map)(decode, range(len(images)), table["jpeg"].to_pylist()), maxlen=0)
    return images


def group_rows(shape: Sequence[int], jpeg: bool, chunk: int, itemsize: int = 1) -> int:
    """Rows of a row group: few enough to be read at random, enough to be read fast."""
    size = int(np.prod(shape)) * itemsize * (JPEG_PART if jpeg else 1)
    return max(1, min(GROUP_ROWS, chunk, int(GROUP_BYTES / size)))


def scored_chunk(shape: Sequence[int], chunk: int) -> int:
    """Samples in a unit of scoring work: `data.chunk`, of clips more, as they are decoded far more slowly than scored."""
    if len(shape) == 3:
        return chunk
    return max(chunk, min(CLIPS_SCORED, SCORED_BYTES // int(np.prod(shape))))


def write_shards(folder: Path, tables: Iterable[pa.Table], kind: pa.Schema, group: int) -> None:
    """Write tables, which are sorted by class and id, as shards whose row groups have one class and at most `group` rows."""
    folder.mkdir(parents=True)
    writer, size, count = None, 0, 0
    for table in _cut(tables, group):
        if writer is None or size >= SHARD_BYTES:
            if writer is not None:
                writer.close()
            writer = _writer(folder, count, kind)
            size, count = 0, count + 1
        writer.write_table(table)
        size += table.nbytes
    if writer is not None:
        writer.close()


def write_shard(folder: Path, number: int, tables: Iterable[pa.Table], kind: pa.Schema, group: int) -> None:
    """Write one shard of many, whose rows are as `shard_rows` says; the bytes are those of `write_shards`."""
    with _writer(folder, number, kind) as writer:
        for table in _cut(tables, group):
            writer.write_table(table)


def shard_rows(labels: Array, sizes: Array, group: int) -> list[tuple[int, int]]:
    """Where each shard begins and ends among all rows, which are sorted by class and id and take `sizes` bytes: what lets
    shards be written apart, in any order.
    """
    if not len(labels):
        return []
    ends = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]  # of each class
    groups = np.concatenate([np.arange(start, end, group) for start, end in pairwise(ends)])
    found, begin, held = [], 0, 0
    for start, size in zip(groups.tolist(), np.add.reduceat(sizes, groups).tolist(), strict=True):
        if held >= SHARD_BYTES:
            found.append((begin, start))
            begin, held = start, 0
        held += size
    return [*found, (begin, len(labels))]


def row_bytes(table: pa.Table) -> Array:
    """What each row of a table of the prepared schema takes, int64 [n], as `shard_rows` wants it."""
    sizes = np.zeros(table.num_rows, np.int64)
    for column in table.columns:
        if pa.types.is_string(column.type) or pa.types.is_binary(column.type):
            sizes += pc.binary_length(column).to_numpy() + OFFSET_BYTES
        else:
            sizes += column.type.byte_width
    return sizes


def _writer(folder: Path, number: int, kind: pa.Schema) -> pq.ParquetWriter:
    compression = "none" if "jpeg" in kind.names else "zstd"
    name = f"shard-{number:05d}.parquet"
    return pq.ParquetWriter(folder / name, kind, use_dictionary=["label"], compression=compression)


def _cut(tables: Iterable[pa.Table], group: int) -> Iterator[pa.Table]:
    """Tables of one class and at most `group` rows; where an incoming table ends, so does a group only if its class does."""
    held: pa.Table | None = None
    for table in tables:
        table = table if held is None else pa.concat_tables([held, table])
        labels = table["label"].to_numpy()
        ends = [*(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
        start, held = 0, None
        for end in ends:
            while end - start >= group or (start < end and end < len(labels)):
                rows = min(group, end - start)
                yield table.slice(start, rows)
                start += rows
        if start < len(labels):
            held = table.slice(start)
    if held is not None:
        yield held


def write_meta(folder: Path, meta: dict[str, Any], content: Any) -> None:
    """Publish dataset.json; `content` is what the fingerprint covers besides the metadata itself."""
    with publish(folder / "dataset.json") as temporary:
        temporary.write_text(json.dumps({**meta, "fingerprint": digest([meta, content])}, indent=1) + "\n")
