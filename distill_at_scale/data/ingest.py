"""From a source to the prepared format, in fixed chunks: decode once, quarantine what is broken, merge by class.

`plan` lists the samples and cuts the listing into chunks; `ingest_chunk` decodes one chunk and publishes it as a piece;
`merge` sorts the pieces by class into shards. A piece that exists is finished, so an interrupted ingest resumes, and as
chunks do not depend on the number of workers, neither do the shards. Ray is not needed; `cluster/ingest.py` uses it.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_at_scale import rng
from distill_at_scale.config import Config, DataSection, nearest
from distill_at_scale.data import shards
from distill_at_scale.data.decode import ImageDecoder, Rejected
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.data.sources.base import Source
from distill_at_scale.errors import UserError
from distill_at_scale.registry import resolve
from distill_at_scale.rundir import file_digest, publish

REJECTED = pa.schema([("sample_id", pa.string()), ("location", pa.string()), ("reason", pa.string())])
ONE_FILE = (errno.ENOENT, errno.EISDIR, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP)  # errors of a single file
CONTRACT = ("splits", "listing", "digest", "read")


@dataclass(frozen=True)
class Plan:
    """What is to be ingested: the class names and, per split, the listing with final labels."""

    class_names: list[str]
    listings: dict[str, pa.Table]
    source: str  # content hash of what the source holds

    def chunks(self, size: int) -> list[tuple[str, int, pa.Table]]:
        """(split, index, rows) of every fixed chunk."""
        return [
            (split, i, table.slice(i * size, size))
            for split, table in self.listings.items()
            for i in range(-(-table.num_rows // size))
        ]


def open_source(data: DataSection) -> Source:
    return resolve("data.source", data.source, SOURCES, CONTRACT)(data)


def decoder_of(config: Config) -> ImageDecoder:
    data = config.data
    return ImageDecoder(data.size, data.channels, data.resize, data.max_pixels)


def plan(config: Config) -> Plan:
    """List the samples of every split.

    Raises UserError for a missing path, a split without samples, an unknown class, or a class without training samples.
    """
    data = config.data
    source = open_source(data)
    listings = {split: source.listing(split) for split in source.splits()}
    names = source.class_names
    if data.classes is not None:
        names = _subset(data.classes, names)
        listings = {split: _relabel(table, source.class_names, names) for split, table in listings.items()}
    if "test" not in listings and data.holdout:
        listings["train"], listings["test"] = _hold_out(listings["train"], data.holdout, config.run.seed)
    listings = {split: table for split, table in listings.items() if table.num_rows or split == "train"}
    counts = np.bincount(listings["train"]["label"].to_numpy(), minlength=len(names))
    if (empty := np.flatnonzero(counts == 0)).size:
        raise UserError(f"the class {names[empty[0]]!r} has no training sample in {data.path or data.source}")
    digests = json.dumps({split: source.digest(split) for split in source.splits()})
    return Plan(names, listings, digests)


def ingest_chunk(source: Source, decoder: ImageDecoder, rows: pa.Table, target: Path) -> tuple[int, int]:
    """Decode some rows of a listing and publish them, sorted by class, as the piece `target`.

    Returns the number of samples used and rejected. A piece that is there already is not made again.
    """
    if target.exists():
        return pq.read_metadata(target).num_rows, pq.read_metadata(_rejected(target)).num_rows
    good, pixels, bad = [], [], []
    for i in range(rows.num_rows):
        row = rows.slice(i, 1)
        try:
            pixels.append(decoder(source.read(row)[0]))
            good.append(i)
        except OSError as error:
            if error.errno not in ONE_FILE:
                raise  # the disk or the network, not this sample
            bad.append((row["sample_id"][0].as_py(), row["location"][0].as_py(), error.strerror or str(error)))
        except Rejected as error:
            bad.append((row["sample_id"][0].as_py(), row["location"][0].as_py(), str(error)))
    kept = rows.take(pa.array(good, pa.int64()))
    array = np.stack(pixels) if pixels else np.zeros((0, *decoder.shape), np.uint8)
    table = shards.to_table(kept["sample_id"].to_pylist(), kept["label"].to_numpy(), array).sort_by("label")
    with publish(_rejected(target)) as temporary:
        pq.write_table(
            pa.Table.from_pylist([dict(zip(REJECTED.names, b, strict=True)) for b in bad], REJECTED), temporary
        )
    with publish(target) as temporary:
        _write_by_class(table, temporary)
    return len(good), len(bad)


def merge(plan: Plan, pieces: Path, prepared: Path, group: int) -> dict[str, Any]:
    """Sort all pieces by class into `prepared/`; returns the metadata that goes to dataset.json.

    Raises UserError where a class lost all its training samples, naming it and the list of reasons.
    """
    shape: tuple[int, ...] | None = None
    counts, moments = {}, np.zeros(0)
    with publish(prepared) as temporary:
        temporary.mkdir()
        for split in plan.listings:
            files = [pq.ParquetFile(p) for p in sorted(pieces.glob(f"{split}-*.parquet")) if _is_piece(p)]
            shape = tuple(files[0].schema_arrow.field("pixels").type.shape)
            labels = range(len(plan.class_names))
            classes = ((label, _rows_of(files, label)) for label in labels)
            found: dict[int, int] = {}
            sums: list[Any] = []
            nonempty = (pair for pair in classes if pair[1].num_rows)
            shards.write_shards(temporary / split, _measured(nonempty, found, sums), shape, group)
            counts[split] = [found.get(label, 0) for label in labels]
            if split == "train":
                moments = np.sum(sums, axis=0) if sums else np.zeros((3, shape[0]))
        rejected = pa.concat_tables([pq.read_table(p) for p in sorted(pieces.glob("*.rejected"))])
        with publish(prepared.parent / "rejected.parquet") as listed:
            pq.write_table(rejected.sort_by("sample_id"), listed)
        if 0 in counts["train"]:
            raise UserError(_all_rejected(plan, counts["train"].index(0), rejected, pieces))
        mean, std = _statistics(moments)
        meta = {"class_names": plan.class_names, "shape": list(shape or ()), "counts": counts, "mean": mean, "std": std,
                "rejected": rejected.num_rows}  # fmt: skip
        files_written = sorted(temporary.rglob("*.parquet"))
        content = {p.relative_to(temporary).as_posix(): file_digest(p)["sha256"] for p in files_written}
        shards.write_meta(temporary, meta, content)
    return meta


def _all_rejected(plan: Plan, label: int, rejected: pa.Table, pieces: Path) -> str:
    listing = plan.listings["train"]
    lost = listing.filter(pc.equal(listing["label"], label))["sample_id"]
    first = rejected.filter(pc.is_in(rejected["sample_id"], lost.combine_chunks())).slice(0, 1).to_pylist()[0]
    return (
        f"every training sample of the class {plan.class_names[label]!r} was rejected, for example {first['sample_id']!r}: "
        f"{first['reason']}. Mend or remove the class; all reasons are in {pieces}/*.rejected (Parquet)."
    )


def piece_path(folder: Path, split: str, index: int) -> Path:
    return folder / f"{split}-{index:06d}.parquet"


def _rejected(piece: Path) -> Path:
    return piece.with_suffix(".rejected")


def _is_piece(path: Path) -> bool:
    return not path.name.startswith(".")


def _write_by_class(table: pa.Table, path: Path) -> None:
    """One row group per class, so that the merge reads just the class it wants."""
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for label in sorted(set(table["label"].to_pylist())):
            writer.write_table(table.filter(pc.equal(table["label"], label)))


def _rows_of(files: list[pq.ParquetFile], label: int) -> pa.Table:
    parts = [
        file.read_row_group(group)
        for file in files
        for group in range(file.num_row_groups)
        if file.metadata.row_group(group).column(1).statistics.min == label
    ]
    return pa.concat_tables(parts) if parts else files[0].schema_arrow.empty_table()


def _measured(
    classes: Iterator[tuple[int, pa.Table]], counts: dict[int, int], sums: list[Any]
) -> Iterator[tuple[int, pa.Table]]:
    """Passes tables through, noting counts and exact channel sums (n, sum x, sum x^2) [3, channels]."""
    for label, table in classes:
        pixels = shards.pixels_of(table)
        flat = np.moveaxis(pixels, 1, 0).reshape(pixels.shape[1], -1)  # channels x (n * rest)
        hist = np.stack([np.bincount(channel, minlength=256) for channel in flat]).astype(np.float64)
        level = np.arange(256)
        counts[label] = table.num_rows
        sums.append(np.stack([hist.sum(1), hist @ level, hist @ level**2]))
        yield label, table


def _statistics(moments: np.ndarray[Any, Any]) -> tuple[list[float], list[float]]:
    """Channel mean and standard deviation of the training pixels, on the scale 0..1; 1 for a channel that is constant."""
    count, total, squares = moments
    mean = total / np.maximum(count, 1)
    std = np.sqrt(np.maximum(squares / np.maximum(count, 1) - mean**2, 1e-12))
    return [round(float(m) / 255, 6) for m in mean], [round(float(s) / 255, 6) or 1.0 for s in std]


def _subset(wanted: list[str], known: list[str]) -> list[str]:
    for name in wanted:
        if name not in known:
            raise UserError(f"data.classes: {name!r} is not a class of this data set; {nearest(name, known)}")
    if len(set(wanted)) != len(wanted) or not wanted:
        raise UserError("data.classes must name at least one class, and each once")
    return list(wanted)


def _relabel(table: pa.Table, before: list[str], after: list[str]) -> pa.Table:
    new = np.array([after.index(name) if name in after else -1 for name in before], np.int32)[table["label"].to_numpy()]
    return table.set_column(1, "label", pa.array(new, pa.int32())).filter(pa.array(new >= 0))


def _hold_out(table: pa.Table, share: float, seed: int) -> tuple[pa.Table, pa.Table]:
    """A class-wise random split; which samples are held out depends on ids and seed, not on their order on disk."""
    labels, ids = table["label"].to_numpy(), np.array(table["sample_id"].to_pylist(), dtype=object)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(ids[members].astype(str), kind="stable")]
        order = rng.numpy_generator(seed, "holdout", int(label)).permutation(len(members))
        held[members[order[: int(share * len(members) + 0.5)]]] = True
    return table.filter(pa.array(~held)), table.filter(pa.array(held))
