"""One chunk of a listing, read, decoded and published as a piece; what is broken is set aside with its reason.

A piece is an Arrow file of the prepared schema, sorted by class and id, beside a list of rejected samples (and of those
that are used with a remark, such as clips that are shorter than asked). A piece that exists is finished, so an interrupted
ingest resumes. Its metadata holds the exact sums behind the channel statistics, and who decoded how many clips.
"""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_at_scale.config.load import Config
from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.events import TimeSpent
from distill_at_scale.core.prefetch import prefetch
from distill_at_scale.data.codecs.clip import ClipDecoder, clip_decoder
from distill_at_scale.data.codecs.image import ImageDecoder, SampleRejected, encode
from distill_at_scale.data.ingest.plan import mapped
from distill_at_scale.data.ingest.sample_types import TensorDecoder, holds_tensors, sample_shape
from distill_at_scale.data.prepared import format as shards
from distill_at_scale.data.prepared import whitening
from distill_at_scale.data.sources.base import Source

REJECTED = pa.schema(
    [("sample_id", pa.string()), ("location", pa.string()), ("reason", pa.string()), ("used", pa.bool_())]
)
ONE_FILE = (errno.ENOENT, errno.EISDIR, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP)  # errors of a single file
READ_AT_ONCE = 64  # samples; up to four such reads are in memory: one is decoded, two wait, one is being read
READ_BYTES = 32 * 2**20  # of them together, unless one sample alone is larger
JPEG_FROM = 129  # pixels a side; below, raw pixels compress as well and cost nothing to decode

Raw = bytes | np.ndarray[Any, Any]


@dataclass(frozen=True)
class Recipe:
    """How a sample becomes what is stored."""

    decoder: ImageDecoder | ClipDecoder | TensorDecoder
    quality: int | None  # of the stored JPEG; None stores raw pixels
    max_bytes: int = 2**28

    @property
    def jpeg(self) -> bool:
        return self.quality is not None

    def tally(self) -> Counter[str]:
        """How many clips each decoder has decoded so far."""
        return Counter() if isinstance(self.decoder, ImageDecoder | TensorDecoder) else self.decoder.tally.copy()

    def decode(self, name: str, raw: Raw) -> tuple[np.ndarray[Any, Any], str | None]:
        """uint8 (tensors: float32) of the decoder's shape, and what is to be said about the sample although it is used.

        Raises Rejected.
        """
        if isinstance(self.decoder, ImageDecoder | TensorDecoder):
            return self.decoder(raw), None
        if not isinstance(raw, bytes):
            raise SampleRejected("pixels, not the bytes of a video file")
        return self.decoder(name, raw)


def recipe_of(config: Config) -> Recipe:
    data = config.data
    if data.whiten == "zca":
        whitening.check(sample_shape(data))
    if holds_tensors(data):
        return Recipe(TensorDecoder(sample_shape(data)), None, data.max_bytes)
    decoder = clip_decoder(data, config.run.seed) if data.frames else image_decoder(data)
    return Recipe(decoder, data.quality if stores_jpeg(data) else None, data.max_bytes)


def image_decoder(data: DataSection) -> ImageDecoder:
    return ImageDecoder(data.size, data.channels, data.resize, data.max_pixels)


def stores_jpeg(data: DataSection) -> bool:
    if holds_tensors(data):
        return False
    return data.store == "jpeg" or (data.store == "auto" and data.size >= JPEG_FROM)


def piece_path(folder: Path, split: str, index: int) -> Path:
    return folder / f"{split}-{index:06d}.arrow"


def rejected_path(piece: Path) -> Path:
    return piece.with_suffix(".rejected")


def is_finished(piece: Path, check: bool) -> bool:
    """Whether a piece and its list of rejected samples (or, with `check`, the list alone) are there.

    The list is published first, but a copy of the folder, or a storage, may have got one without the other.
    """
    return rejected_path(piece).exists() and (check or piece.exists())


def ingest_chunk(
    source: Source, recipe: Recipe, rows: pa.Table, target: Path, spent: TimeSpent | None = None
) -> tuple[int, int]:
    """Decode some rows of a listing and publish them, sorted by class and id, as the piece `target`.

    Returns the number of samples used and rejected. A piece that is there already is not made again. `spent` takes the
    seconds of read (which runs ahead of the rest), decode and write.
    """
    spent = spent or TimeSpent()
    if not is_finished(target, check=False):
        order = rows.sort_by([("label", "ascending"), ("sample_id", "ascending")]).select(["sample_id", "label"])
        made, before = _Made(recipe), recipe.tally()
        table_of_bad = _table_of(_decoded(source, recipe, rows, made.add, spent))
        with spent.on("write"):
            table = made.table(order, recipe.tally() - before)
            _publish_rejected(target, table_of_bad)
            with publish(target) as temporary, pa.ipc.new_file(temporary, table.schema) as writer:
                writer.write_table(table)
    return finished(target, rows, check=False)


def check_chunk(
    source: Source, recipe: Recipe, rows: pa.Table, target: Path, spent: TimeSpent | None = None
) -> tuple[int, int]:
    """As `ingest_chunk`, but keeps only the list of what would be rejected."""
    if not is_finished(target, check=True):
        bad = _decoded(source, recipe, rows, lambda name, pixels: None, spent or TimeSpent())
        _publish_rejected(target, _table_of(bad))
    return finished(target, rows, check=True)


def finished(piece: Path, rows: pa.Table, check: bool) -> tuple[int, int]:
    """How many samples a finished piece (or, with `check`, its list of rejected ones) says were used and rejected."""
    listed = pq.read_table(rejected_path(piece), columns=["used"])["used"]
    bad = len(listed) - (pc.sum(listed).as_py() or 0)
    if check:
        return rows.num_rows - bad, bad
    return mapped(piece).num_rows, bad


@dataclass
class _Made:
    """What was decoded so far, by sample id."""

    recipe: Recipe
    images: dict[str, Raw] = field(default_factory=dict)
    sums: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros((0, 0)))  # [3, C]: n, sum x, sum x^2

    def __post_init__(self) -> None:
        decoder = self.recipe.decoder
        if isinstance(decoder, TensorDecoder):
            self.sums = np.zeros((3, decoder.shape[0] if len(decoder.shape) > 1 else 1), np.float64)
        else:
            self.sums = np.zeros((3, decoder.shape[-3]), np.int64)

    def add(self, name: str, pixels: np.ndarray[Any, Any]) -> None:
        if isinstance(self.recipe.decoder, TensorDecoder):
            flat = pixels.reshape(self.sums.shape[1], -1).astype(np.float64)  # [C, values of one channel]
            self.sums += np.stack([np.full(len(flat), flat.shape[1], np.float64), flat.sum(1), (flat * flat).sum(1)])
            self.images[name] = pixels
            return
        channels = pixels if pixels.ndim == 3 else np.moveaxis(pixels, 1, 0)  # [C, values of one channel]
        parts = channels.reshape(len(channels), -1, _part(channels[0].size)).astype(np.float32)  # [C, parts, values]
        self.sums[0] += channels[0].size
        self.sums[1] += parts.sum(2).sum(1, dtype=np.float64).astype(np.int64)
        self.sums[2] += np.einsum("cpv,cpv->cp", parts, parts).sum(1, dtype=np.float64).astype(np.int64)
        quality = self.recipe.quality
        self.images[name] = pixels if quality is None else encode(shards.stack_frames(pixels), quality)

    def table(self, order: pa.Table, decoders: Mapping[str, int]) -> pa.Table:
        names, labels = order["sample_id"].to_pylist(), order["label"].to_numpy()
        kept = [i for i, name in enumerate(names) if name in self.images]
        ids, images = [names[i] for i in kept], [self.images[names[i]] for i in kept]
        if self.recipe.jpeg:
            table = shards.to_jpeg_table(ids, labels[kept], images, self.recipe.decoder.shape)  # type: ignore[arg-type]
        else:
            dtype = np.float32 if isinstance(self.recipe.decoder, TensorDecoder) else np.uint8
            pixels = np.stack(images) if images else np.zeros((0, *self.recipe.decoder.shape), dtype)
            table = shards.to_table(ids, labels[kept], pixels)
        return table.replace_schema_metadata({"sums": json.dumps(self.sums.tolist()), "decoders": json.dumps(decoders)})


def _part(values: int) -> int:
    """Values whose squares add up exactly in float32 (at most 256), and which divide a channel."""
    return next(part for part in range(min(256, values), 0, -1) if values % part == 0)


def _decoded(
    source: Source, recipe: Recipe, rows: pa.Table, use: Any, spent: TimeSpent
) -> Iterator[tuple[str, str, str, bool]]:
    """Decode rows in order and hand each over; yields (sample_id, location, reason, used) of what is not as it should be."""
    small = rows["size"].to_numpy() <= recipe.max_bytes
    for row in rows.filter(pa.array(~small)).to_pylist():
        yield row["sample_id"], row["location"], _too_large(row["size"], recipe.max_bytes), False
    for part, raws in prefetch(_read(source, rows if small.all() else rows.filter(pa.array(small)), spent)):
        with spent.on("decode"):
            yield from _decoded_part(recipe, part, raws, use)


def _decoded_part(
    recipe: Recipe, part: pa.Table, raws: Sequence[Raw | OSError], use: Any
) -> Iterator[tuple[str, str, str, bool]]:
    names = part["sample_id"].to_pylist()
    for i, raw in enumerate(raws):
        try:
            if isinstance(raw, OSError):
                raise SampleRejected(raw.strerror or str(raw))
            pixels, remark = recipe.decode(names[i], raw)
        except SampleRejected as error:
            yield names[i], part["location"][i].as_py(), str(error), False
        else:
            use(names[i], pixels)
            if remark is not None:
                yield names[i], part["location"][i].as_py(), remark, True


def _too_large(size: int, limit: int) -> str:
    return f"{size:,} bytes, more than data.max_bytes = {limit:,}"


def _read(source: Source, rows: pa.Table, spent: TimeSpent) -> Iterator[tuple[pa.Table, Sequence[Raw | OSError]]]:
    """Raw samples, some at a time; where a read fails, one by one, so that the failure concerns one sample."""
    for part in _parts(rows):
        raws: Sequence[Raw | OSError]
        with spent.on("read"):
            try:
                raws = source.read(part)
            except OSError:
                raws = [_read_one(source, part.slice(i, 1)) for i in range(part.num_rows)]
        yield part, raws


def _parts(rows: pa.Table) -> Iterator[pa.Table]:
    """At most READ_AT_ONCE rows and, unless a single one is larger, READ_BYTES."""
    ends, start = np.cumsum(rows["size"].to_numpy()), 0
    while start < rows.num_rows:
        before = ends[start - 1] if start else 0
        fit = int(np.searchsorted(ends, before + READ_BYTES, side="right")) - start
        count = max(1, min(READ_AT_ONCE, fit))
        yield rows.slice(start, count)
        start += count


def _read_one(source: Source, row: pa.Table) -> Raw | OSError:
    try:
        return source.read(row)[0]
    except OSError as error:
        if error.errno not in ONE_FILE:
            raise  # the disk or the network, not this sample; what pyarrow's network errors say has no number
        return error


def _table_of(bad: Iterator[tuple[str, str, str, bool]]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(REJECTED.names, b, strict=True)) for b in bad], REJECTED)


def _publish_rejected(target: Path, table: pa.Table) -> None:
    with publish(rejected_path(target)) as temporary:
        pq.write_table(table, temporary)
