"""From pieces, in the order in which the source is best read, to shards sorted by class: a merge in bounded memory.

The order of all samples, and which of them each shard holds, is computed from ids, labels and sizes alone; the shards are
then written side by side in threads, each span by span, and of every piece, which is sorted too, one contiguous slice is
read per span. Left out: several machines; this one's cores do it all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.ingest import channel_stats, derived_splits
from distill_at_scale.data.ingest.chunks import REJECTED, piece_path, rejected_path, stores_jpeg
from distill_at_scale.data.ingest.plan import IngestPlan, mapped
from distill_at_scale.data.ingest.sample_types import holds_tensors, sample_shape
from distill_at_scale.data.prepared import format as shards
from distill_at_scale.data.prepared import whitening

SPAN_BYTES = 32 * 2**20  # of images in the memory of one thread at once
MAX_OPEN = 16_384  # pieces that stay mapped; Linux allows a process some 65,000
MAX_THREADS = 16  # shards that are written side by side; bounds the memory
SET_ASIDE = REJECTED.append(pa.field("split", pa.string()))  # an id is unique within its split only

Array = np.ndarray[Any, Any]


def threads_here() -> int:
    """Shards that this process writes side by side: one per core that Arrow may use."""
    return min(MAX_THREADS, pa.cpu_count())


def merge(
    plan: IngestPlan, pieces: Path, prepared: Path, data: DataSection, seed: int = 0, threads: int | None = None
) -> dict[str, Any]:
    """Sort all pieces by class into `prepared/`; returns the metadata that goes to dataset.json.

    `data.transform` is applied before anything is published; `seed` is of its draws alone. The bytes are the same for any
    number of `threads` (default: `threads_here`).

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
            labels, order = order_of(paths)
            decoders = sum(map(_decoders, paths), decoders)
            counts[split] = np.bincount(labels, minlength=len(plan.class_names)).tolist()
            if split == "train":
                if 0 in counts["train"]:
                    raise UserError(_all_rejected(plan, counts["train"].index(0), rejected, prepared.parent))
                sums = np.sum([_sums(path) for path in paths], axis=0)
            group = shards.group_rows(shape, stores_jpeg(data), data.chunk, 4 if holds_tensors(data) else 1)
            write(temporary / split, paths, labels, order, group, threads or threads_here())
        values = holds_tensors(data)
        scored = data.chunk if values else shards.scoring_chunk(shape, data.chunk)
        mean, std = channel_stats.of_values(sums) if values else channel_stats.of_pixels(sums)
        meta = {"class_names": plan.class_names, "source_class_names": plan.source_class_names, "shape": list(shape),
                "counts": counts, "mean": mean, "std": std, "chunk": scored,
                "jpeg": stores_jpeg(data), "rejected": unusable(rejected).num_rows}  # fmt: skip
        meta |= {"kind": "tensors"} if values else {}
        meta |= {"decoders": dict(sorted(decoders.items()))} if data.frames else {}
        meta |= {"whiten": data.whiten} if data.whiten != "none" else {}
        derived_splits.write_meta(temporary, meta)
        if data.transform != "none":
            meta = derived_splits.derive(temporary, data, seed)
        if data.whiten == "zca":
            whitening.fit(temporary)
    return meta


def write_rejected(plan: IngestPlan, pieces: Path, target: Path, chunk: int) -> pa.Table:
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


def order_of(paths: Sequence[Path]) -> tuple[Array, Array]:
    """Sorted labels [n], and the places of all rows by label and id among the concatenated pieces [n]."""
    tables = []
    for path in paths:
        table = mapped(path).select(["sample_id", "label"]).replace_schema_metadata(None)
        tables.append(table.take(np.arange(table.num_rows)))  # a copy, which does not hold the file
    index = pa.concat_tables(tables)
    order = pc.sort_indices(index, [("label", "ascending"), ("sample_id", "ascending")]).to_numpy()
    return index["label"].to_numpy()[order], order.astype(np.int64)


def write(folder: Path, paths: Sequence[Path], labels: Array, order: Array, group: int, threads: int) -> None:
    """Write pieces, each sorted by class and id, as shards in `order` (sorted `labels` and the places of the rows among the
    concatenated pieces, both [n]), so many shards side by side; row groups have one class and at most `group` rows.
    """
    opened = lru_cache(MAX_OPEN)(_rows)  # a merge that mixes many pieces opens each for every span
    kind = opened(paths[0]).schema
    counted = [shards.row_bytes(_rows(path)) for path in paths]
    sizes = np.concatenate(counted)[order]
    starts = np.concatenate([[0], np.cumsum([len(rows) for rows in counted])]).astype(np.int64)
    span = max(1, int(SPAN_BYTES / max(1.0, sizes.mean()))) if len(sizes) else 1

    def one(number: int, rows: tuple[int, int]) -> None:
        wanted = (order[i : min(i + span, rows[1])] for i in range(*rows, span))
        tables = (_span(lambda piece: opened(paths[piece]), some, starts) for some in wanted)
        shards.write_shard(folder, number, tables, kind, group)

    folder.mkdir(parents=True)
    parts, pool = shards.shard_ranges(labels, sizes, group), ThreadPoolExecutor(threads)
    try:
        for written in [pool.submit(one, *part) for part in enumerate(parts)]:
            written.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C or a full disk no further shard is begun


def _rows(path: Path) -> pa.Table:
    return mapped(path).replace_schema_metadata(None)


def _span(rows_of: Callable[[int], pa.Table], wanted: Array, starts: Array) -> pa.Table:
    """The rows at some places of the concatenated pieces, in that order; in each piece they lie together and in order."""
    inside = np.searchsorted(starts, wanted, side="right") - 1  # which piece
    parts, places = [], np.empty(len(wanted), np.int64)
    have = 0
    for piece, members in _members(inside):
        first, count = int(wanted[members[0]] - starts[piece]), len(members)
        assert wanted[members[-1]] - wanted[members[0]] == count - 1, "a piece is not sorted"
        parts.append(rows_of(piece).slice(first, count))
        places[members] = have + np.arange(count)
        have += count
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


def _all_rejected(plan: IngestPlan, label: int, rejected: pa.Table, folder: Path) -> str:
    listing = plan.listings["train"]
    lost = listing.filter(pc.equal(listing["label"], label))["sample_id"]
    train = unusable(rejected).filter(pc.equal(unusable(rejected)["split"], "train"))
    first = train.filter(pc.is_in(train["sample_id"], lost.combine_chunks())).slice(0, 1).to_pylist()[0]
    return (
        f"every training sample of the class {plan.class_names[label]!r} was rejected, for example {first['sample_id']!r}: "
        f"{first['reason']}. Mend or remove the class; all reasons are in {folder / 'rejected.parquet'}."
    )
