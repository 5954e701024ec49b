"""The prepared format: class-sorted Parquet shards of uint8 images or clips, or of float32 arrays, and reading them.

`train/` and `test/` hold files `shard-00000.parquet` with the columns sample_id (string), label (int32) and either pixels
(fixed-size binary: the bytes of a uint8 tensor C x H x W or, of a clip, T x C x H x W, whose shape is in the field's
metadata; Parquet would store a list of bytes as 32-bit numbers, which takes 13 times as long to read) or, where large, jpeg
(binary: the resized image, encoded again; of a clip its frames below each other). Arrays of other data are in a column
values (fixed-size binary of float32; their shape and type are in the field's metadata). Rows are sorted by class and, within
it, by id; a row group holds one class and few rows, so that any part of the set is read without the rest. `dataset.json`
holds class names, shape, counts, channel statistics and the content fingerprint.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_at_scale.data.decode import Rejected, decode_stored
from distill_at_scale.data.rowgroups import range_of, reading
from distill_at_scale.errors import UserError
from distill_at_scale.rundir import digest, publish

SHARD_BYTES = 128 * 2**20
GROUP_BYTES, GROUP_ROWS = 256 * 2**10, 64  # a row group: what a random read fetches at least
OFFSET_BYTES = 4  # that Arrow holds for every string
JPEG_PART = 0.2  # of an image's raw bytes that its JPEG takes, about; only sizes depend on it
OPEN_FILES = 64
MOST_AXES, MOST_VALUES = 4, 2**30  # of a sample; data.frames and data.size allow 805 million
TAKEN_BYTES = 16 * 2**20  # of row groups that are read together
CLIPS_SCORED, SCORED_BYTES = 1024, 64 * 2**20  # clips in a unit of scoring work at most, and their bytes

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Group:
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
        except Rejected as error:
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


class Prepared:
    """A prepared data set on disk."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files: OrderedDict[tuple[str, str], pq.ParquetFile] = OrderedDict()
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

    def groups(self, split: str = "train") -> list[Group]:
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

    def read(self, part: Chunk | Group, split: str = "train", columns: Sequence[str] | None = None) -> pa.Table:
        numbers = [part.number] if isinstance(part, Group) else range(part.first, part.first + part.groups)
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

    def _wanted(self, split: str, groups: Sequence[Group], only: Collection[str] | pa.Array) -> Array:
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

    def _files_of(self, split: str, label: int) -> dict[str, list[Group]]:
        """The row groups of a class by file, in order."""
        found: dict[str, list[Group]] = {}
        for group in self._by_label[split].get(label, []):
            found.setdefault(group.file, []).append(group)
        return found

    @cached_property
    def _groups(self) -> dict[str, list[Group]]:
        return {split: list(self._scan(split)) for split in ("train", "test")}

    @cached_property
    def _by_label(self) -> dict[str, dict[int, list[Group]]]:
        found: dict[str, dict[int, list[Group]]] = {split: {} for split in self._groups}
        for split, groups in self._groups.items():
            for group in groups:
                found[split].setdefault(group.label, []).append(group)
        return found

    def _scan(self, split: str) -> Iterator[Group]:
        for path in sorted((self.folder / split).glob("shard-*.parquet")):
            with reading(path, "ingest"):
                metadata = pq.read_metadata(path)
            for number in range(metadata.num_row_groups):
                label = self._label(path, metadata, number)
                yield Group(path.name, number, label, metadata.row_group(number).num_rows)

    def _label(self, path: Path, metadata: pq.FileMetaData, group: int) -> int:
        """The one class of a row group, as its statistics have it."""
        least, label = (metadata.num_columns > 1 and range_of(metadata, group, 1)) or (None, None)
        if least != label or type(label) is not int or not 0 <= label < len(self.class_names):
            raise UserError(f"{path} holds rows of no class, or of several in one group; ingest again")
        return label

    def _rows(self, split: str, file: str, numbers: Iterable[int], columns: Sequence[str] | None = None) -> pa.Table:
        """Some row groups of a file. Raises UserError where it is damaged."""
        with reading(self.folder / split / file, "ingest"):
            return self._open(split, file).read_row_groups(list(numbers), columns=columns, use_threads=False)

    def _open(self, split: str, file: str) -> pq.ParquetFile:
        """Files stay open between reads, the last few of them: a footer takes longer to read than a row group."""
        key = (split, file)
        if key not in self._files:
            self._files[key] = pq.ParquetFile(self.folder / split / file)
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(key)
        return self._files[key]


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
    if math.prod(shape) > MOST_VALUES or not isinstance(counts, dict):
        raise ValueError("a sample has too many values, or nothing is counted")
    return meta


def write_meta(folder: Path, meta: dict[str, Any], content: Any) -> None:
    """Publish dataset.json; `content` is what the fingerprint covers besides the metadata itself."""
    with publish(folder / "dataset.json") as temporary:
        temporary.write_text(json.dumps({**meta, "fingerprint": digest([meta, content])}, indent=1) + "\n")
