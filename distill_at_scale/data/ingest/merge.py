"""Merges part files, which are in source order, into shards sorted by class, in bounded memory.

Ids, labels and sizes alone decide the order of all samples and the contents of each shard. Threads then write the shards in
parallel, span by span; each part file is sorted too, so a span reads one contiguous slice of it. One machine does it all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
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
from distill_at_scale.data.ingest import derived_splits
from distill_at_scale.data.ingest.channel_stats import mean_and_std
from distill_at_scale.data.ingest.chunks import REJECTED, part_path, rejected_path, stores_jpeg
from distill_at_scale.data.ingest.plan import IngestPlan, map_arrow
from distill_at_scale.data.ingest.sample_types import holds_tensors, sample_shape
from distill_at_scale.data.prepared import format as shards
from distill_at_scale.data.prepared import whitening
from distill_at_scale.data.prepared.format import Array

SPAN_BYTES = 32 * 2**20  # of samples in the memory of one thread at once
MAX_OPEN = 16_384  # part files that stay mapped; Linux allows a process some 65,000
MAX_THREADS = 16  # shards that are written in parallel; bounds the memory
SET_ASIDE = REJECTED.append(pa.field("split", pa.string()))  # an id is unique within its split only


def merge_threads() -> int:
    """Shards that this process writes in parallel: one per core that Arrow may use."""
    return min(MAX_THREADS, pa.cpu_count())


def merge(
    plan: IngestPlan, parts: Path, prepared: Path, data: DataSection, seed: int = 0, threads: int | None = None
) -> dict[str, Any]:
    """Sort the part files in `parts` by class into `prepared/`; returns the metadata in dataset.json.

    Applies `data.transform`, whose draws use `seed`, and `data.whiten` before anything is published. The bytes do not depend
    on `threads` (default: `merge_threads`).

    Raises UserError if a class lost all its training samples, naming it and the list of reasons.
    """
    counts: dict[str, list[int]] = {}
    shape, tensors = sample_shape(data), holds_tensors(data)
    sums, decoders = np.zeros(0), Counter[str]()
    rejected = write_rejected(plan, parts, prepared.parent / "rejected.parquet", data.chunk)
    with publish(prepared) as temporary:
        temporary.mkdir()
        for split, listing in plan.listings.items():
            paths = [part_path(parts, split, i) for i in range(-(-listing.num_rows // data.chunk))]
            metadata = [map_arrow(path).schema.metadata for path in paths]
            labels, order = order_of(paths)
            decoders = sum((Counter(json.loads(held.get(b"decoders", b"{}"))) for held in metadata), decoders)
            counts[split] = np.bincount(labels, minlength=len(plan.class_names)).tolist()
            if split == "train":
                if 0 in counts["train"]:
                    raise UserError(_all_rejected(plan, counts["train"].index(0), rejected, prepared.parent))
                sums = np.sum([np.array(json.loads(held[b"sums"])) for held in metadata], axis=0)  # [3, C]
            group = shards.group_rows(shape, stores_jpeg(data), data.chunk, 4 if tensors else 1)
            write(temporary / split, paths, labels, order, group, threads or merge_threads())
        mean, std = mean_and_std(sums, tensors)
        meta = {"class_names": plan.class_names, "source_class_names": plan.source_class_names, "shape": list(shape),
                "counts": counts, "mean": mean, "std": std,
                "chunk": data.chunk if tensors else shards.scoring_chunk(shape, data.chunk),
                "jpeg": stores_jpeg(data), "rejected": unused(rejected).num_rows}  # fmt: skip
        meta |= {"kind": "tensors"} if tensors else {}
        meta |= {"decoders": dict(sorted(decoders.items()))} if data.frames else {}
        meta |= {} if data.whiten == "none" else {"whiten": data.whiten}
        shards.write_meta(temporary, meta)
        if data.transform != "none":
            meta = derived_splits.derive(temporary, data, seed)
        whitening.fit(temporary, data)
    return meta


def write_rejected(plan: IngestPlan, parts: Path, target: Path, chunk: int) -> pa.Table:
    """Publish one list (schema SET_ASIDE), sorted by id and split, of all samples that are rejected or used with a remark."""
    tables = [SET_ASIDE.empty_table()]
    for split, aside in plan.aside.items():
        used = pa.array([False] * aside.num_rows, pa.bool_())
        tables.append(_with_split(aside.drop_columns(["label"]).append_column("used", used), split))
    for split, index, _ in plan.chunks(chunk):
        tables.append(_with_split(pq.read_table(rejected_path(part_path(parts, split, index))), split))
    table = pa.concat_tables(tables).sort_by([("sample_id", "ascending"), ("split", "ascending")])
    with publish(target) as temporary:
        pq.write_table(table, temporary)
    return table


def _with_split(rows: pa.Table, split: str) -> pa.Table:
    return rows.append_column(SET_ASIDE.field("split"), pa.array([split] * rows.num_rows, pa.string()))


def unused(listed: pa.Table) -> pa.Table:
    """The rows of such a list whose samples are not used."""
    return listed.filter(pc.invert(listed["used"]))


def order_of(paths: Sequence[Path]) -> tuple[Array, Array]:
    """Sorted labels [n], and the positions of all rows, by label and id, in the concatenated part files [n]."""
    tables = []
    for path in paths:
        table = _rows(path).select(["sample_id", "label"])
        tables.append(table.take(np.arange(table.num_rows)))  # a copy, which does not keep the file mapped
    index = pa.concat_tables(tables)
    order = pc.sort_indices(index, [("label", "ascending"), ("sample_id", "ascending")]).to_numpy()
    return index["label"].to_numpy()[order], order.astype(np.int64)


def write(folder: Path, paths: Sequence[Path], labels: Array, order: Array, group: int, threads: int) -> None:
    """Write part files as shards, `threads` in parallel; row groups have one class and at most `group` rows.

    `labels` and `order` come from `order_of`.
    """
    opened = lru_cache(MAX_OPEN)(_rows)  # a merge that mixes many part files opens each for every span
    kind = opened(paths[0]).schema
    row_bytes = [shards.row_bytes(_rows(path)) for path in paths]
    sizes = np.concatenate(row_bytes)[order]
    starts = np.concatenate([[0], np.cumsum([len(rows) for rows in row_bytes])]).astype(np.int64)
    span = max(1, int(SPAN_BYTES / max(1.0, sizes.mean()))) if len(sizes) else 1

    def write_one(number: int, rows: tuple[int, int]) -> None:
        spans = (order[i : min(i + span, rows[1])] for i in range(*rows, span))
        tables = (_span(lambda part: opened(paths[part]), positions, starts) for positions in spans)
        shards.write_shard(folder, number, tables, kind, group)

    folder.mkdir(parents=True)
    ranges, pool = shards.shard_ranges(labels, sizes, group), ThreadPoolExecutor(threads)
    try:
        for future in [pool.submit(write_one, *numbered) for numbered in enumerate(ranges)]:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C or a full disk no further shard is started


def _rows(path: Path) -> pa.Table:
    return map_arrow(path).replace_schema_metadata(None)


def _span(rows_of: Callable[[int], pa.Table], positions: Array, starts: Array) -> pa.Table:
    """The rows at some positions in the concatenated part files, in that order; those of one part file are contiguous in it.

    `starts`: position of each part file's first row.
    """
    part_of = np.searchsorted(starts, positions, side="right") - 1
    by_part = np.argsort(part_of, kind="stable")
    parts, begins = np.unique(part_of[by_part], return_index=True)
    slices, places, total = [], np.empty(len(positions), np.int64), 0
    for part, members in zip(parts.tolist(), np.split(by_part, begins[1:]), strict=True):
        first, count = int(positions[members[0]] - starts[part]), len(members)
        assert positions[members[-1]] - positions[members[0]] == count - 1, "a part file is not sorted"
        slices.append(rows_of(part).slice(first, count))
        places[members] = total + np.arange(count)
        total += count
    return pa.concat_tables(slices).take(pa.array(places))


def _all_rejected(plan: IngestPlan, label: int, rejected: pa.Table, folder: Path) -> str:
    listing = plan.listings["train"]
    lost = listing.filter(pc.equal(listing["label"], label))["sample_id"]
    train = unused(rejected).filter(pc.equal(unused(rejected)["split"], "train"))
    first = train.filter(pc.is_in(train["sample_id"], lost.combine_chunks())).slice(0, 1).to_pylist()[0]
    problem = f"all training samples of the class {plan.class_names[label]!r} were rejected"
    example, hint = f"{first['sample_id']!r}: {first['reason']}", "Mend or remove the class; all reasons are in"
    return f"{problem}, for example {example}. {hint} {folder / 'rejected.parquet'}."
