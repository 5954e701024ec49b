"""Merging part files into shards: the same bytes for any number of threads as from one sorted stream."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distill_at_scale.data.ingest import merge
from distill_at_scale.data.prepared import format as shards

SHAPE, GROUP, PART = (1, 4, 4), 4, 7


def table_of(kind: str, rows: int = 60, classes: int = 5) -> pa.Table:
    """Rows in an order that mixes classes, with ids and JPEGs of many lengths."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, classes, rows)
    ids = [f"{'x' * (i % 9)}{i}" for i in range(rows)]
    if kind == "jpeg":
        return shards.to_jpeg_table(ids, labels.tolist(), [draw.bytes(5 + i % 40) for i in range(rows)], SHAPE)
    dtype = np.float32 if kind == "values" else np.uint8
    return shards.to_table(ids, labels.tolist(), draw.integers(0, 255, (rows, *SHAPE)).astype(dtype))


def sorted_by_class(table: pa.Table) -> pa.Table:
    return table.sort_by([("label", "ascending"), ("sample_id", "ascending")])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_part(folder: Path, rows: pa.Table) -> Path:
    path = folder.with_name(f"{rows['sample_id'][0]}.arrow")
    with pa.ipc.new_file(str(path), rows.schema) as writer:
        writer.write_table(sorted_by_class(rows))
    return path


def merged(table: pa.Table, folder: Path, threads: int) -> dict[str, bytes]:
    parts = [write_part(folder, table.slice(i, PART)) for i in range(0, table.num_rows, PART)]
    merge.write(folder, parts, *merge.order_of(parts), GROUP, threads)
    return files(folder)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("kind", ["pixels", "jpeg", "values"])
def test_threads_write_the_bytes_of_one_sorted_stream(tmp_path, monkeypatch, kind, threads):
    monkeypatch.setattr(shards, "SHARD_BYTES", 400)
    monkeypatch.setattr(merge, "SPAN_BYTES", 200)
    table = table_of(kind)
    shards.write_shards(tmp_path / "stream", [sorted_by_class(table)], table.schema, GROUP)
    expected = files(tmp_path / "stream")
    assert len(expected) > 3
    assert merged(table, tmp_path / "merged", threads) == expected


def test_shards_are_filled_up_to_their_size(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 10)
    labels = np.array([0, 0, 0, 1, 1, 2])
    assert shards.shard_ranges(labels, np.full(6, 5), 2) == [(0, 2), (2, 5), (5, 6)]
    assert shards.shard_ranges(labels[:0], np.zeros(0, int), 2) == []


def test_a_failure_in_a_thread_is_raised_and_no_further_shard_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 400)
    begun, over = [], threading.Event()

    def full(folder, number, *rest):
        begun.append(number)
        if number == 1:
            raise OSError(28, "No space left on device")
        assert number == 0 or over.wait(60)

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(False, cancel_futures=cancel_futures)
            over.set()
            super().shutdown(wait)

    monkeypatch.setattr(merge, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(shards, "write_shard", full)
    with pytest.raises(OSError, match="No space left"):
        merged(table_of("pixels"), tmp_path / "merged", 1)
    assert begun in ([0, 1], [0, 1, 2]), "all others were still written"
