"""The parts of a run that one machine does once, at ImageNet-1K's size: images per second of each, on synthetic inputs.

The list of all samples, their order, the merge into shards with one thread and with all threads, the hashes, the join of the
scores and the selection. Every part is the product's own function. `simulated.py` prints these beside the actors' rates.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_up
import numpy as np
import pyarrow as pa
import selection

from distill_at_scale.config.load import validate
from distill_at_scale.core.atomic_files import file_digests
from distill_at_scale.data.ingest import merge
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.prepared import format as shards

SHAPE, CHUNK = (3, 64, 64), 1024
Rates = dict[str, float]  # a part -> images per second


def measure(folder: Path, merged: int) -> Rates:
    """All parts; `merged` images of 64 x 64 go through the merge and the hashes, all of ImageNet-1K through the others."""
    return _listed(folder) | _merged(folder, merged) | _scored(folder)


def _listed(folder: Path) -> Rates:
    """The driver's list of all samples, on disk, and their order by class and id."""
    config = validate({"data": {"source": "made_up:ImageNetSized", "path": "1", "size": 64, "chunk": CHUNK}})
    plan, seconds = _timed(lambda: ingest.plan(config).on_disk(folder))
    result = {"list all samples": plan.samples / seconds}
    rows = plan.listings["train"].select(["sample_id", "label"])
    pieces = [_write(folder / f"ids-{i}.arrow", rows.slice(i, CHUNK)) for i in range(0, rows.num_rows, CHUNK)]
    _, seconds = _timed(lambda: merge.order_of(pieces))
    return result | {"sort all ids": rows.num_rows / seconds}


def _merged(folder: Path, count: int) -> Rates:
    pieces, result = _pieces(folder, count), {}
    group = shards.group_rows(SHAPE, False, CHUNK)
    labels, order = merge.order_of(pieces)
    for threads in sorted({1, merge.merge_threads()}):
        target = folder / f"shards-{threads}"
        _, seconds = _timed(lambda: merge.write(target, pieces, labels, order, group, threads))  # noqa: B023
        result[f"merge into shards, {threads} thread{'s' * (threads > 1)}"] = count / seconds
    files = sorted(target.iterdir())
    _, seconds = _timed(lambda: file_digests(files))
    return result | {"hash the shards": count / seconds}


def _scored(folder: Path) -> Rates:
    """The join of all scored pieces under 25 checkpoints, and the selection; each in a process of its own."""
    pieces, scores = folder / "scored", folder / "scores.parquet"
    selection.make_pieces(pieces)
    joined = selection._alone(selection.aggregate, pieces, scores)
    selected = selection._alone(selection.select, scores, 0.1, "class")
    return {
        "join the scores": selection.IMAGENET / joined["seconds"],
        "select": selection.IMAGENET / selected["seconds"],
    }


def _pieces(folder: Path, count: int) -> list[Path]:
    """Pieces of noise as ingest leaves them, of a source whose order mixes all classes."""
    draw = np.random.default_rng(0)
    labels = draw.permutation(np.arange(made_up.CLASSES).repeat(made_up.class_sizes()))[:count]
    noise, size = draw.integers(70, 186, made_up.POOL, np.uint8), int(np.prod(SHAPE))
    result = []
    for start in range(0, count, CHUNK):
        some = np.sort(labels[start : start + CHUNK])
        ids = [f"train/n{label:08d}/n{label:08d}_{start + i}.JPEG" for i, label in enumerate(some)]
        begins = draw.integers(0, made_up.POOL - size, len(some))
        table = shards.to_table(ids, some.tolist(), noise[begins[:, None] + np.arange(size)].reshape(-1, *SHAPE))
        table = table.sort_by([("label", "ascending"), ("sample_id", "ascending")])
        result.append(_write(folder / f"{start:08d}.arrow", table))
    return result


def _write(path: Path, table: pa.Table) -> Path:
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    os.sync()  # what was written before is not to be waited for meanwhile
    began = time.perf_counter()
    return work(), time.perf_counter() - began
