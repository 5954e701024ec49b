"""From pieces, in the order in which the source is best read, to shards sorted by class: a merge in bounded memory.

The order of all samples is computed from ids and labels alone; the shards are then written span by span, and of every
piece, which is sorted too, one contiguous slice is read per span.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_at_scale.data import moments, shards, transforms, whitening
from distill_at_scale.data.ingest import Plan, mapped
from distill_at_scale.data.kinds import holds_tensors, sample_shape
from distill_at_scale.data.pieces import REJECTED, piece_path, rejected_path, stores_jpeg
from distill_at_scale.errors import UserError
from distill_at_scale.rundir import publish
from distill_at_scale.sections import DataSection

SPAN_BYTES = 128 * 2**20  # of images in memory at once
SET_ASIDE = REJECTED.append(pa.field("split", pa.string()))  # an id is unique within its split only

Array = np.ndarray[Any, Any]


def merge(plan: Plan, pieces: Path, prepared: Path, data: DataSection, seed: int = 0) -> dict[str, Any]:
    """Sort all pieces by class into `prepared/`; returns the metadata that goes to dataset.json.

    `data.transform` is applied before anything is published; `seed` is of its draws alone.

    Raises UserError where a class lost all its training samples, naming it and the list of reasons.
    """
    counts: dict[str, list[int]] = {}
    shape = sample_shape(data)
    sums, decoders = np.zeros(0), Counter[str]()
    rejected = write_rejected(plan, pieces, prepared.parent / "rejected.parquet", data.chunk)
    with publish(prepared) as temporary:
        temporary.mkdir()
        for split, listing in plan.listings.items():
            paths = [piece_path(pieces, split, i) for i in range(-(-listing.num_rows // data.chunk))]
            labels, order, starts = _order(paths)
            decoders = sum(map(_decoders, paths), decoders)
            counts[split] = np.bincount(labels, minlength=len(plan.class_names)).tolist()
            if split == "train":
                if 0 in counts["train"]:
                    raise UserError(_all_rejected(plan, counts["train"].index(0), rejected, prepared.parent))
                sums = np.sum([_sums(path) for path in paths], axis=0)
            _write(temporary / split, paths, order, starts, shape, data)
        tensors = holds_tensors(data)
        scored = data.chunk if tensors else shards.scored_chunk(shape, data.chunk)
        mean, std = moments.of_values(sums) if tensors else moments.of_pixels(sums)
        meta = {"class_names": plan.class_names, "source_class_names": plan.source_class_names, "shape": list(shape),
                "counts": counts, "mean": mean, "std": std, "chunk": scored,
                "jpeg": stores_jpeg(data), "rejected": unusable(rejected).num_rows}  # fmt: skip
        meta |= {"kind": "tensors"} if tensors else {}
        meta |= {"decoders": dict(sorted(decoders.items()))} if data.frames else {}
        meta |= {"whiten": data.whiten} if data.whiten != "none" else {}
        transforms.write_meta(temporary, meta)
        if data.transform != "none":
            meta = transforms.derive(temporary, data, seed)
        if data.whiten == "zca":
            whitening.fit(temporary)
    return meta


def write_rejected(plan: Plan, pieces: Path, target: Path, chunk: int) -> pa.Table:
    """One list (schema SET_ASIDE), sorted by id and split, of everything that was set aside or is used with a remark."""
    found = [SET_ASIDE.empty_table(), *(_of_source(table, split) for split, table in plan.aside.items())]
    for split, index, _ in plan.chunks(chunk):
        part = pq.read_table(rejected_path(piece_path(pieces, split, index)))
        found.append(part.append_column(SET_ASIDE.field("split"), pa.array([split] * part.num_rows, pa.string())))
    table = pa.concat_tables(found).sort_by([("sample_id", "ascending"), ("split", "ascending")])
    with publish(target) as temporary:
        pq.write_table(table, temporary)
    return table


def _of_source(aside: pa.Table, split: str) -> pa.Table:
    rows = aside.drop_columns(["label"])
    rows = rows.append_column("used", pa.array([False] * rows.num_rows, pa.bool_()))
    return rows.append_column(SET_ASIDE.field("split"), pa.array([split] * rows.num_rows, pa.string()))


def unusable(listed: pa.Table) -> pa.Table:
    """Of such a list the samples that are not used."""
    return listed.filter(pc.invert(listed["used"]))


def _order(paths: list[Path]) -> tuple[Array, Array, Array]:
    """Sorted labels [n], the order of all rows by label and id [n], and where each piece's rows begin [pieces + 1]."""
    tables = []
    for path in paths:
        table = mapped(path).select(["sample_id", "label"]).replace_schema_metadata(None)
        tables.append(table.take(np.arange(table.num_rows)))  # a copy, which does not hold the file
    index = pa.concat_tables(tables)
    order = pc.sort_indices(index, [("label", "ascending"), ("sample_id", "ascending")]).to_numpy()
    starts = np.concatenate([[0], np.cumsum([table.num_rows for table in tables])]).astype(np.int64)
    return index["label"].to_numpy()[order], order.astype(np.int64), starts


def _write(
    folder: Path, paths: list[Path], order: Array, starts: Array, shape: tuple[int, ...], data: DataSection
) -> None:
    kind = mapped(paths[0]).schema.remove_metadata()
    jpeg = "jpeg" in kind.names
    itemsize = 4 if "values" in kind.names else 1
    size = int(np.prod(shape)) * itemsize * (shards.JPEG_PART if jpeg else 1)
    span = max(1, int(SPAN_BYTES / size))
    tables = (_span(paths, order[i : i + span], starts) for i in range(0, len(order), span))
    shards.write_shards(folder, tables, kind, shards.group_rows(shape, jpeg, data.chunk, itemsize))


def _span(paths: list[Path], wanted: Array, starts: Array) -> pa.Table:
    """The rows at some places of the concatenated pieces, in that order."""
    inside = np.searchsorted(starts, wanted, side="right") - 1  # which piece
    parts, places = [], np.empty(len(wanted), np.int64)
    have = 0
    for piece, members in _members(inside):
        rows = wanted[members] - starts[piece]
        first, count = int(rows.min()), int(rows.max() - rows.min()) + 1
        table = mapped(paths[piece]).slice(first, count)
        parts.append(table.take(pa.array(rows - first)).replace_schema_metadata(None))
        places[members] = have + np.arange(len(rows))
        have += len(rows)
    return pa.concat_tables(parts).take(pa.array(places))


def _members(pieces: Array) -> Iterator[tuple[int, Array]]:
    """(piece, the places at which it occurs), by piece."""
    by_piece = np.argsort(pieces, kind="stable")
    found, begins = np.unique(pieces[by_piece], return_index=True)
    yield from zip(found.tolist(), np.split(by_piece, begins[1:]), strict=True)


def _sums(piece: Path) -> Array:
    """[3, C]: int64 of pixels, float64 of other values."""
    return np.array(json.loads(mapped(piece).schema.metadata[b"sums"]))


def _decoders(piece: Path) -> Counter[str]:
    return Counter(json.loads(mapped(piece).schema.metadata.get(b"decoders", b"{}")))


def _all_rejected(plan: Plan, label: int, rejected: pa.Table, folder: Path) -> str:
    listing = plan.listings["train"]
    lost = listing.filter(pc.equal(listing["label"], label))["sample_id"]
    train = unusable(rejected).filter(pc.equal(unusable(rejected)["split"], "train"))
    first = train.filter(pc.is_in(train["sample_id"], lost.combine_chunks())).slice(0, 1).to_pylist()[0]
    return (
        f"every training sample of the class {plan.class_names[label]!r} was rejected, for example {first['sample_id']!r}: "
        f"{first['reason']}. Mend or remove the class; all reasons are in {folder / 'rejected.parquet'}."
    )
