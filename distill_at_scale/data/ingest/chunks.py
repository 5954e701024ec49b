"""Reads and decodes one chunk of a listing and publishes it as a part file; broken samples are listed with their reason.

A part file is an Arrow file of the prepared schema, sorted by class and id, next to a list of rejected samples (and of samples
that are used with a remark, such as short clips). An existing part file is finished, so an interrupted ingest resumes. Its
metadata holds the exact sums behind the channel statistics, and how many clips each decoder decoded; the metadata of the list
holds a hash of each sample's bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_at_scale.config.load import Config
from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.events import TimeSpent
from distill_at_scale.core.prefetch import prefetch
from distill_at_scale.data.codecs.clip import ClipDecoder, clip_decoder
from distill_at_scale.data.codecs.image import ImageDecoder, SampleRejected, encode
from distill_at_scale.data.ingest.channel_stats import ChannelSums
from distill_at_scale.data.ingest.plan import map_arrow
from distill_at_scale.data.ingest.sample_types import TensorDecoder, holds_tensors, sample_shape
from distill_at_scale.data.prepared import whitening
from distill_at_scale.data.prepared.format import stack_frames, to_jpeg_table, to_table
from distill_at_scale.data.sources.base import Source, rows_to_table
from distill_at_scale.storage.filesystem import is_access_error

REJECTED = pa.schema({"sample_id": pa.string(), "location": pa.string(), "reason": pa.string(), "used": pa.bool_()})
SAMPLE_ERRORS = (errno.ENOENT, errno.EISDIR, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP)  # concern a single file
NETWORK_PACKAGES = ("urllib", "urllib3", "requests", "aiohttp", "botocore")  # their OSErrors have no number
TRIED = 8  # samples of a source of the user's own, before an ingest
READ_AT_ONCE = 64  # samples; up to four such reads are in memory: one is decoded, two wait, one is being read
READ_BYTES = 32 * 2**20  # of one read, unless a single sample is larger
UNREADABLE = bytes(8)  # in place of a hash
JPEG_FROM = 129  # pixels a side; below, raw pixels compress as well and cost nothing to decode

Raw = bytes | np.ndarray[Any, Any]
Rejection = tuple[str, str, str, bool]  # a row of REJECTED


@dataclass(frozen=True)
class Recipe:
    """How a sample is decoded and stored."""

    decoder: ImageDecoder | ClipDecoder | TensorDecoder
    quality: int | None  # of the stored JPEG; None stores raw pixels
    max_bytes: int = 2**28

    def tally(self) -> Counter[str]:
        return Counter() if isinstance(self.decoder, ImageDecoder | TensorDecoder) else self.decoder.tally.copy()

    def decode(self, name: str, raw: Raw) -> tuple[np.ndarray[Any, Any], str | None]:
        """uint8 (tensors: float32) of the decoder's shape, and a remark about a flaw. Raises SampleRejected."""
        if isinstance(self.decoder, ImageDecoder | TensorDecoder):
            return self.decoder(raw), None
        if not isinstance(raw, bytes):
            raise SampleRejected("pixels, not the bytes of a video file")
        return self.decoder(name, raw)


def recipe_of(config: Config) -> Recipe:
    data, shape = config.data, sample_shape(config.data)
    whitening.check(data, shape)
    if holds_tensors(data):
        return Recipe(TensorDecoder(shape), None, data.max_bytes)
    image_decoder = ImageDecoder(data.size, data.channels, data.resize, data.max_pixels)
    decoder = clip_decoder(data, config.run.seed) if data.frames else image_decoder
    return Recipe(decoder, data.quality if stores_jpeg(data) else None, data.max_bytes)


def stores_jpeg(data: DataSection) -> bool:
    return not holds_tensors(data) and (data.store == "jpeg" or (data.store == "auto" and data.size >= JPEG_FROM))


def part_path(folder: Path, split: str, index: int) -> Path:
    return folder / f"{split}-{index:06d}.arrow"


def rejected_path(part: Path) -> Path:
    return part.with_suffix(".rejected")


def is_finished(part: Path, check: bool) -> bool:
    """Whether a part file and its list of rejected samples (or, with `check`, the list alone) exist.

    The list is published first, but a copy of the folder or an object store may hold only one of them.
    """
    return rejected_path(part).exists() and (check or part.exists())


def ingest_chunk(
    source: Source, recipe: Recipe, rows: pa.Table, target: Path, spent: TimeSpent | None = None, check: bool = False
) -> tuple[int, int]:
    """Decode rows of a listing and publish them, sorted by class and id, as the part file `target` unless it exists.

    With `check`, publish only the list of rejected samples. Returns the number of samples used and rejected. `spent` takes
    the seconds of read (which runs ahead), decode and write.
    """
    spent = spent or TimeSpent()
    if is_finished(target, check):
        return part_counts(target, rows, check)
    tensors, shape = isinstance(recipe.decoder, TensorDecoder), recipe.decoder.shape
    sums, samples, before = ChannelSums(shape, tensors), dict[str, Raw](), recipe.tally()

    def keep(name: str, pixels: np.ndarray[Any, Any]) -> None:
        if check:
            return
        if tensors or recipe.quality is not None:
            sums.add(pixels[None])
        samples[name] = pixels if recipe.quality is None else encode(stack_frames(pixels), recipe.quality)

    hashes: dict[str, bytes] = {}
    rejections = list(_decoded(source, recipe, rows, keep, spent, hashes))
    found = [hashes[name].hex() if name in hashes else None for name in rows["sample_id"].to_pylist()]
    with publish(rejected_path(target)) as temporary:
        table = rows_to_table(rejections, REJECTED).replace_schema_metadata({"hashes": json.dumps(found)})
        pq.write_table(table, temporary)
    if check:
        return part_counts(target, rows, check)
    with spent.on("write"):
        order = rows.sort_by([("label", "ascending"), ("sample_id", "ascending")])
        names, labels = order["sample_id"].to_pylist(), order["label"].to_numpy()
        used = [i for i, name in enumerate(names) if name in samples]
        ids, stored = [names[i] for i in used], [samples[names[i]] for i in used]
        if recipe.quality is not None:
            table = to_jpeg_table(ids, labels[used], stored, shape)  # type: ignore[arg-type]
        else:
            empty = np.zeros((0, *shape), np.float32 if tensors else np.uint8)
            pixels = np.stack(stored) if stored else empty
            if not tensors:  # integer sums do not depend on the order
                for start in range(0, len(pixels), READ_AT_ONCE):
                    sums.add(pixels[start : start + READ_AT_ONCE])
            table = to_table(ids, labels[used], pixels)
        metadata = {"sums": json.dumps(sums.sums.tolist()), "decoders": json.dumps(recipe.tally() - before)}
        table = table.replace_schema_metadata(metadata)
        with publish(target) as temporary, pa.ipc.new_file(temporary, table.schema) as writer:
            writer.write_table(table)
    return part_counts(target, rows, check)


def part_counts(part: Path, rows: pa.Table, check: bool) -> tuple[int, int]:
    """Samples used and rejected according to a finished part file (or, with `check`, to its list of rejected samples)."""
    used = pq.read_table(rejected_path(part), columns=["used"])["used"]
    rejected = len(used) - (pc.sum(used).as_py() or 0)
    return rows.num_rows - rejected if check else map_arrow(part).num_rows, rejected


def _decoded(
    source: Source,
    recipe: Recipe,
    rows: pa.Table,
    keep: Callable[[str, Any], None],
    spent: TimeSpent,
    hashes: dict[str, bytes] | None = None,
) -> Iterator[Rejection]:
    """Decodes rows in order and calls `keep` for each sample; yields samples that are rejected or used with a remark.

    `hashes` takes the hash of the bytes of each sample that is read.
    """
    small = rows["size"].to_numpy() <= recipe.max_bytes
    for row in rows.filter(pa.array(~small)).to_pylist():
        reason = f"{row['size']:,} bytes, more than data.max_bytes = {recipe.max_bytes:,}; raise it or replace the file"
        yield row["sample_id"], row["location"], reason, False
    for batch, raws in prefetch(_read(source, rows if small.all() else rows.filter(pa.array(small)), spent)):
        with spent.on("decode"):
            names = batch["sample_id"].to_pylist()
            for i, raw in enumerate(raws):
                if hashes is not None:
                    hashes[names[i]] = content_hash(raw)
                try:
                    if isinstance(raw, SampleRejected):
                        raise raw
                    pixels, remark = recipe.decode(names[i], raw)
                except SampleRejected as error:
                    yield names[i], batch["location"][i].as_py(), str(error), False
                else:
                    keep(names[i], pixels)
                    if remark is not None:
                        yield names[i], batch["location"][i].as_py(), remark, True


def _read(
    source: Source, rows: pa.Table, spent: TimeSpent
) -> Iterator[tuple[pa.Table, Sequence[Raw | SampleRejected]]]:
    """Raw samples, some at a time; after an error they are read one by one, to find the sample at fault."""
    ends, start = np.cumsum(rows["size"].to_numpy()), 0
    while start < rows.num_rows:
        before = ends[start - 1] if start else 0
        fit = int(np.searchsorted(ends, before + READ_BYTES, side="right")) - start
        batch = rows.slice(start, max(1, min(READ_AT_ONCE, fit)))
        start += batch.num_rows
        with spent.on("read"):
            try:
                raws = _items(source, batch)
            except (UserError, MemoryError):
                raise
            except Exception:  # code of a user's own can raise anything
                raws = [_read_one(source, batch.slice(i, 1)) for i in range(batch.num_rows)]
        yield batch, raws


def content_hash(raw: Raw | SampleRejected) -> bytes:
    """BLAKE2b of a sample, 8 bytes; UNREADABLE for one that cannot be read."""
    if isinstance(raw, SampleRejected) or (isinstance(raw, np.ndarray) and raw.dtype.hasobject):
        return UNREADABLE
    return hashlib.blake2b(raw if isinstance(raw, bytes) else raw.tobytes(), digest_size=8).digest()


def read_hashes(source: Source, rows: pa.Table) -> list[bytes]:
    """The hashes of rows of a listing as they are now."""
    return [content_hash(raw) for _, raws in _read(source, rows, TimeSpent()) for raw in raws]


def _items(source: Source, rows: pa.Table) -> list[Raw | SampleRejected]:
    """What `read` returns for these rows; raises SampleRejected for another number of items than rows."""
    items = list(source.read(rows))
    if len(items) != rows.num_rows:
        counts = f"{len(items)} items, not {rows.num_rows}"
        raise SampleRejected(f"read of {_name(source)} returned {counts}; it must return one item for each row")
    allowed = bytes | np.ndarray | SampleRejected
    return [item if isinstance(item, allowed) else _wrong_type(source, item) for item in items]


def _wrong_type(source: Source, item: object) -> SampleRejected:
    allowed = "bytes (the content of an image or video file) or a numpy array"
    kind = f"{type(item).__module__}.{type(item).__qualname__}".removeprefix("builtins.")
    return SampleRejected(f"read of {_name(source)} returned {kind}; it must return {allowed} for each row")


def _read_one(source: Source, row: pa.Table) -> Raw | SampleRejected:
    """A sample, or why it cannot be read. Raises what concerns more than this sample: a failure of the disk, of the
    network or of memory, and what a source reports as UserError.
    """
    try:
        return _items(source, row)[0]
    except SampleRejected as error:
        return error
    except (UserError, MemoryError):
        raise
    except Exception as error:
        frames = list(traceback.walk_tb(error.__traceback__))
        if isinstance(error, OSError):
            if error.errno in SAMPLE_ERRORS:
                return SampleRejected(f"{error.strerror or error}; restore it as a readable file")
            from_network = type(error).__module__.partition(".")[0] in NETWORK_PACKAGES
            if from_network or isinstance(error, ConnectionError | TimeoutError) or is_access_error(error):
                raise
        own = [line for frame, line in frames if frame.f_globals.get("__name__") == type(source).__module__]
        where = f" ({Path(frames[-1][0].f_code.co_filename).name}, line {frames[-1][1]})"
        if own:
            where = f" ({type(source).__module__}, line {own[-1]})"
        message = str(error).partition("\n")[0]
        return SampleRejected(f"read of {_name(source)} failed: {type(error).__name__}: {message}{where}")


def _name(source: Source) -> str:
    return f"{type(source).__module__}:{type(source).__qualname__}"


def check_read(source: Source, recipe: Recipe, rows: pa.Table) -> None:
    """Read and decode a few rows, evenly spaced, of a source of the user's own.

    Raises UserError if none of them can be used: then `read` itself is wrong, not a sample.
    """
    places = np.unique(np.linspace(0, rows.num_rows - 1, TRIED).round().astype(np.int64))
    rejected = [row for row in _decoded(source, recipe, rows.take(places), lambda *_: None, TimeSpent()) if not row[3]]
    if len(rejected) == len(places):
        sample_id, location, reason, _ = rejected[0]
        raise UserError(
            f"{_name(source)} gives no usable sample: all {len(places)} that were tried failed, the first of them "
            f"{sample_id!r} (location {location!r}): {reason}. Correct its read; distill_at_scale/data/README.md has the "
            "contract and an example"
        )
