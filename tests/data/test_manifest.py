"""The manifest: rows and facts, the same bytes for the same rows, kept ids, and nothing half-written."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_at_scale.config.sections import SelectSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared import manifest
from distill_at_scale.pruning.selection import select as static


def rows(count, step_kept=3, classes=2):
    """Manifest rows in order, of which each `step_kept`-th is kept."""
    k = np.arange(count)
    return pa.table(
        {
            "sample_id": [f"s{i:06d}" for i in k],
            "label": pa.array(k * classes // count, pa.int32()),
            "score": pa.array(np.sqrt(k), pa.float32()),
            "rank": pa.array(k, pa.int32()),
            "kept": k % step_kept == 0,
        }
    )


def test_the_manifest_holds_the_selection_and_its_facts(tmp_path):
    scores = pa.table({"sample_id": list("cabd"), "label": [0, 1, 0, 0], "loss": [2.0, 5.0, 1.0, 3.0]})
    with manifest.writing(tmp_path / "m.parquet") as out:
        result = static.select(scores, out, SelectSection(keep=0.34), "loss", True, 1, 7)
        out.facts = result | {"fingerprint": "abc"}
    table, facts = manifest.read(tmp_path / "m.parquet")
    assert table.schema.remove_metadata() == manifest.SCHEMA
    assert table.to_pydict() == {
        "sample_id": ["b", "c", "d", "a"],
        "label": [0, 0, 0, 1],
        "score": [1.0, 2.0, 3.0, 5.0],
        "rank": [0, 1, 2, 0],
        "kept": [True, False, False, True],
    }
    assert facts == manifest.facts(tmp_path / "m.parquet") == json.loads(table.schema.metadata[b"selection"])
    assert facts == {
        "criterion": "loss",
        "order": "useful",
        "scope": "class",
        "stratum_start": 0.0,
        "asked": {"keep": 0.34},
        "reached": 0.5,
        "kept": 2,
        "of": 4,
        "kept_per_class": [1, 1],
        "min_per_class": 1,
        "raised_to_minimum": [1],
        "seed": 7,
        "fingerprint": "abc",
    }


def test_the_bytes_do_not_depend_on_how_the_rows_arrived(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "ROWS", 1000)
    small_pages = {"data_page_size": 500, "write_batch_size": 16}  # as many pages as in a long row group
    monkeypatch.setattr(manifest, "ENCODING", manifest.ENCODING | small_pages)
    table, seen = rows(4700), set()
    for name, step in {"one": 4700, "small": 7, "odd": 1301}.items():
        with manifest.writing(tmp_path / name) as out:
            for start in range(0, 4700, step):
                out.append(table.slice(start, step))
            out.facts = {"kept": 1567}
        seen.add((tmp_path / name).read_bytes())
        footer = pq.read_metadata(tmp_path / name)
        assert [footer.row_group(k).num_rows for k in range(footer.num_row_groups)] == [1000] * 4 + [700]
        assert manifest.read(tmp_path / name)[0].to_pydict() == table.to_pydict()
    assert len(seen) == 1


def test_what_is_cleared_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "ROWS", 10)
    with manifest.writing(tmp_path / "m") as out:
        out.append(rows(55))
        out.clear()
        out.append(rows(25))
    assert manifest.read(tmp_path / "m")[0].to_pydict() == rows(25).to_pydict()


def half_written(path):
    with manifest.writing(path) as out:
        out.append(rows(55))
        raise UserError("too few")


def test_an_error_while_writing_keeps_the_old_manifest_and_no_other_file(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "ROWS", 10)
    manifest.write(tmp_path / "m", rows(30), {"kept": 10})
    before = (tmp_path / "m").read_bytes()
    with pytest.raises(UserError, match="too few"):
        half_written(tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_rows_that_cannot_be_encoded_raise_and_are_not_published(tmp_path):
    with pytest.raises(pa.ArrowInvalid), manifest.writing(tmp_path / "m") as out:
        out.append(rows(5).set_column(1, "label", pa.array(["x"] * 5)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step_kept", [1, 3, 977, 10_000])
def test_the_kept_ids_come_in_order_from_all_row_groups(tmp_path, monkeypatch, step_kept):
    monkeypatch.setattr(manifest, "ROWS", 100)
    table = rows(1950, step_kept)
    manifest.write(tmp_path / "m", table, {})
    assert manifest.kept(tmp_path / "m").to_pylist() == table["sample_id"].to_pylist()[::step_kept]
    assert manifest.kept(tmp_path / "m").to_pylist() == table["sample_id"].to_pylist()[::step_kept]


def test_statistics_in_a_footer_hide_no_kept_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "ROWS", 4)
    table = rows(12).set_column(1, "label", pa.array(np.repeat([5, 6, 7], 4), pa.int32()))
    manifest.write(tmp_path / "m", table, {})
    expected = [(label, ids.to_pylist()) for label, ids in manifest.kept_in_parts(tmp_path / "m", [6])]
    data = (tmp_path / "m").read_bytes()
    size = int.from_bytes(data[-8:-4], "little") + 8
    assert b"\x04\x06\0\0\0" in data[-size:]
    (tmp_path / "m").write_bytes(data[:-size] + data[-size:].replace(b"\x04\x06\0\0\0", b"\x04\x07\0\0\0"))
    assert [(label, ids.to_pylist()) for label, ids in manifest.kept_in_parts(tmp_path / "m", [6])] == expected != []


def test_nothing_kept_is_an_empty_array_of_strings(tmp_path):
    manifest.write(tmp_path / "m", rows(9).set_column(4, "kept", pa.array([False] * 9)), {})
    assert manifest.kept(tmp_path / "m").type == pa.string()
    assert manifest.kept(tmp_path / "m").to_pylist() == []


def test_a_folder_with_an_equals_sign_adds_no_column(tmp_path):
    path = tmp_path / "label=3" / "keep=0.1" / "m.parquet"
    manifest.write(path, rows(9), {})
    assert manifest.read(path)[0].to_pydict() == rows(9).to_pydict()


def test_chosen_columns_are_read_alone(tmp_path):
    manifest.write(tmp_path / "m", rows(9), {"kept": 3})
    table, facts = manifest.read(tmp_path / "m", ["label", "kept"])
    assert (table.column_names, facts) == (["label", "kept"], {"kept": 3})


@pytest.mark.parametrize("read", [manifest.read, manifest.facts, manifest.kept])
def test_a_file_that_is_not_a_manifest_is_refused(tmp_path, read):
    with pytest.raises(UserError, match="distill-at-scale select"):
        read(tmp_path / "none.parquet")
    (tmp_path / "text").write_text("text", encoding="utf-8")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read(tmp_path / "text")
    pq.write_table(pa.table({"sample_id": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="lacks the columns label, score, rank, kept"):
        read(tmp_path / "other.parquet")


def test_a_manifest_cut_short_is_not_read(tmp_path):
    manifest.write(tmp_path / "m", rows(900), {})
    data = (tmp_path / "m").read_bytes()
    (tmp_path / "m").write_bytes(data[: len(data) - 100])
    with pytest.raises(UserError, match="not a readable Parquet file"):
        manifest.kept(tmp_path / "m")
