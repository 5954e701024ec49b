"""Broken Parquet files: manifests, score tables, prepared shards and data sets.

What is accepted has whole columns and unique ids, and its pixels and labels are of the declared shape and classes.
"""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable
from pathlib import Path

import mutating
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_prepared

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.codecs.image import SampleRejected
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.sources.image.hf_parquet import HuggingFaceParquet
from distill_at_scale.pruning.scoring import score_table

ROWS = 12


def parquet(table: pa.Table, **options) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=5, **options)
    return buffer.getvalue()


def broken_rows(data: bytes, chance: random.Random) -> bytes:
    """A whole file whose rows are repeated, missing, shuffled or null, or whose columns are of other types."""
    try:
        table = pq.read_table(io.BytesIO(data))
        names = table.column_names
    except (pa.ArrowException, OSError, ValueError, MemoryError):
        return mutating.flip(data, chance)
    kind, name = chance.randrange(6), chance.choice(names)
    at = names.index(name)
    if kind < 3:
        places = list(range(table.num_rows))
        if kind == 0:
            places.insert(chance.randrange(len(places) + 1), chance.choice(places or [0]))
        elif kind == 1:
            chance.shuffle(places)
        else:
            places = places[: chance.randrange(len(places) + 1)]
        return parquet(table.take(pa.array(places, pa.int64())) if table.num_rows else table)
    if kind == 3:
        return parquet(table.drop_columns([name]))
    if kind == 4:
        values = table[name].to_pylist()
        values[:1] = [None]
        return parquet(table.set_column(at, table.field(at).with_nullable(True), pa.array(values, table[name].type)))
    other = pa.array([chance.choice((-1, 2**40, 7)) for _ in range(table.num_rows)], pa.int64())
    return parquet(table.set_column(at, name, other))


def footer(data: bytes, chance: random.Random) -> bytes:
    """The footer broken: counts, offsets, types and sizes of everything."""
    size = min(len(data), int.from_bytes(data[-8:-4], "little") + 8)
    return data[:-size] + mutating.flip(data[-size:-8], chance) + data[-8:]


MUTATORS = [broken_rows, broken_rows, footer, footer]


def check_rows(table: pa.Table) -> None:
    assert not any(column.null_count for column in table.columns)
    ids = table["sample_id"].to_pylist()
    assert len(set(ids)) == len(ids)


def a_manifest(folder: Path) -> bytes:
    ids, labels = [f"{i:03d}" for i in range(ROWS)], np.arange(ROWS, dtype=np.int32) // 4
    columns = [ids, labels, np.linspace(0, 1, ROWS, dtype=np.float32), np.arange(ROWS, dtype=np.int32) % 4]
    kept = pa.array([i % 2 == 0 for i in range(ROWS)])
    manifest.write(folder / "m", pa.table([*columns, kept], schema=manifest.SCHEMA), {"rule": "loss"})
    return (folder / "m").read_bytes()


def test_broken_manifests_are_refused_or_whole(tmp_path: Path):
    path = tmp_path / "manifest.parquet"

    def attempt(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            table, facts = manifest.read(path)
            kept = manifest.kept(path)
            parts = list(manifest.kept_in_parts(path, [0, 1, 2]))
        except UserError:
            return False
        check_rows(table)
        assert table.schema.types == manifest.SCHEMA.types
        assert isinstance(facts, dict)
        assert kept.to_pylist() == table.filter(table["kept"])["sample_id"].to_pylist()
        assert {label for label, _ in parts} <= {0, 1, 2}
        return True

    mutating.run("manifests", 0.07, [a_manifest(tmp_path)], attempt, MUTATORS)


def test_broken_score_tables_are_refused_or_whole(tmp_path: Path):
    path = tmp_path / "scores.parquet"
    columns = {"sample_id": [f"{i:03d}" for i in range(ROWS)], "label": np.arange(ROWS, dtype=np.int32) // 4}
    scores = np.linspace(0, 1, ROWS, dtype=np.float32)
    all_rows = pa.table(columns | {"loss": scores, "score": scores}).replace_schema_metadata(
        {"scores": '{"trials": 2}'}
    )

    def attempt(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            table, facts = score_table.read(path, ["sample_id", "label", "score"])
        except UserError:
            return False
        check_rows(table)
        assert isinstance(facts, dict)
        return True

    mutating.run("scores", 0.04, [parquet(all_rows), parquet(all_rows, compression="zstd")], attempt, MUTATORS)


def test_broken_shards_are_refused_or_of_the_declared_shape(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (ROWS, 1, 4, 4), np.uint8)
    write_prepared(tmp_path, pixels, np.arange(ROWS) % 3)
    (shard,) = (tmp_path / "train").glob("*.parquet")

    def attempt(data: bytes) -> bool:
        shard.write_bytes(data)
        try:
            values, labels = PreparedDataset(tmp_path).load("train")
        except UserError:
            return False
        assert (values.shape[1:], values.dtype, len(values)) == ((1, 4, 4), np.uint8, len(labels))
        assert not len(labels) or 0 <= labels.min() <= labels.max() < 3
        return True

    mutating.run("prepared", 0.04, [shard.read_bytes()], attempt, MUTATORS)


def shard_of(folder: Path) -> tuple[Path, Callable[[], object]]:
    """A small prepared set: its one shard, and all that is read of it."""
    write_prepared(folder, np.random.default_rng(0).integers(0, 256, (ROWS, 1, 4, 4), np.uint8), np.arange(ROWS) % 3)

    def read() -> object:
        prepared = PreparedDataset(folder)
        pixels, labels = prepared.load("train")
        ids, values = prepared.index()
        taken = prepared.take("train", 1, [0, 2])
        return [a.tobytes() for a in (pixels, labels, taken, values)], ids, prepared.ids("train", 1).to_pylist()

    return next((folder / "train").glob("*.parquet")), read


def manifest_of(folder: Path) -> tuple[Path, Callable[[], object]]:
    path = folder / "m"
    a_manifest(folder)
    return path, lambda: [(label, ids.to_pylist()) for label, ids in manifest.kept_in_parts(path, [1, 2])]


@pytest.mark.chaos  # about a minute
@pytest.mark.parametrize("make", [shard_of, manifest_of])
def test_no_single_bit_of_a_footer_ends_the_process_or_changes_what_is_read(
    tmp_path: Path, make: Callable[[Path], tuple[Path, Callable[[], object]]]
):
    path, read = make(tmp_path)
    table, expected = path.read_bytes(), read()
    for bit in range(8 * (len(table) - 8 - int.from_bytes(table[-8:-4], "little")), 8 * len(table)):
        broken = bytearray(table)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        with contextlib.suppress(UserError):
            assert read() == expected, f"bit {bit}"


@pytest.mark.parametrize("kind", ["struct", "binary"])
def test_broken_data_sets_are_refused_or_list_what_can_be_read(tmp_path: Path, kind: str):
    raw = [bytes([i]) * (1 + i % 3) for i in range(ROWS)]
    image = (
        pa.array([{"bytes": b, "path": f"{i}.png"} for i, b in enumerate(raw)]) if kind == "struct" else pa.array(raw)
    )
    table = pa.table({"image": image, "label": pa.array(np.arange(ROWS) % 3)})
    config = DataSection(source="parquet", path=str(tmp_path))

    def attempt(data: bytes) -> bool:
        (tmp_path / "train-0.parquet").write_bytes(data)
        try:
            source = HuggingFaceParquet(config)
            rows = source.listing("train")
            values = source.read(rows)
        except UserError:
            return False
        check_rows(rows)
        assert all(isinstance(one, bytes | SampleRejected) for one in values)
        assert len(values) == rows.num_rows
        labels = rows["label"].to_numpy()
        assert 0 <= labels.min() <= labels.max() < len(source.class_names)
        return True

    mutating.run(f"parquet-{kind}", 0.02, [parquet(table), parquet(table, compression="none")], attempt, MUTATORS)
