"""The score table: complete by id, the same bytes for any cut into parts, exact values, never half-written."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import tiny_config

from distill_at_scale.core.errors import UserError
from distill_at_scale.pruning.scoring import score_table
from distill_at_scale.pruning.scoring.columns import lists_to_matrix


def rows(count, values=4, classes=3, seed=0):
    """Scored rows as in part files, in order of label and id, with `values` losses per sample."""
    losses = np.random.default_rng(seed).random((count, values), np.float32)
    labels = pa.array(np.arange(count) * classes // count, pa.int32())
    lists = pa.FixedSizeListArray.from_arrays(pa.array(losses.reshape(-1)), values)
    return pa.table({"sample_id": [f"s{k:06d}" for k in range(count)], "label": labels, "loss": lists})


def cut(folder, table, ends):
    """The rows as part files that end at `ends`, and the ids that each must hold."""
    folder.mkdir(exist_ok=True)
    pieces, ids = [], []
    for start, end in zip([0, *ends], [*ends, table.num_rows], strict=True):
        pieces.append(folder / f"{start:06d}.parquet")
        part = table.slice(start, end - start)
        pq.write_table(part, pieces[-1])
        ids.append(part["sample_id"].combine_chunks())
    return pieces, ids


def piece(path, ids, labels=None):
    table = rows(len(ids)).set_column(0, "sample_id", pa.array(ids, pa.string()))
    pq.write_table(table if labels is None else table.set_column(1, "label", pa.array(labels, pa.int32())), path)
    return path


def write(folder, pieces, expected, **overrides):
    return score_table.write_scores(folder / "scores.parquet", pieces, expected, tiny_config(folder, **overrides))


@pytest.mark.parametrize("ends", [[], [1], [10, 20, 30, 40], [64]])
def test_the_table_holds_every_row_in_order_with_its_mean(tmp_path, ends):
    table = rows(70)
    result = write(tmp_path, *cut(tmp_path / "pieces", table, ends))
    scores, facts = score_table.read(tmp_path / "scores.parquet")
    losses = lists_to_matrix(table["loss"])
    mean = losses.astype(np.float64).mean(1)
    assert scores.column_names == ["sample_id", "label", "loss", "score", "loss_values"]
    assert scores["sample_id"].to_pylist() == table["sample_id"].to_pylist()
    assert scores["label"].to_pylist() == table["label"].to_pylist()
    assert scores["loss"].to_numpy().tolist() == scores["score"].to_numpy().tolist() == mean.astype(np.float32).tolist()
    assert np.array_equal(lists_to_matrix(scores["loss_values"]), losses)
    assert result == {"rows": 70, "mean_score": pytest.approx(float(mean.mean()), rel=1e-7)}
    assert facts.pop("agreement").keys() == {"classes", "trials", "all"}
    expected = {"criteria": ["loss"], "useful": {"loss": "low"}, "observed": {"loss": [0, 1]}}
    assert facts == {"trials": 2, "epochs": 2, "seed": 0, **expected}


def test_the_bytes_do_not_depend_on_the_part_files(tmp_path, monkeypatch):
    monkeypatch.setattr(score_table, "ROWS", 1000)
    table, contents = rows(5300), set()
    for name, ends in {"one": [], "even": range(500, 5300, 500), "odd": [1, 999, 1000, 1001, 4000]}.items():
        write(tmp_path / name, *cut(tmp_path / name, table, list(ends)))
        contents.add((tmp_path / name / "scores.parquet").read_bytes())
        groups = pq.read_metadata(tmp_path / name / "scores.parquet")
        assert [groups.row_group(k).num_rows for k in range(groups.num_row_groups)] == [1000] * 5 + [300]
    assert len(contents) == 1


def test_two_criteria_have_columns_of_their_own(tmp_path):
    table = rows(9)
    table = table.append_column("test_score_table:Last", table["loss"])
    write(tmp_path, *cut(tmp_path / "p", table, [4]), score__criterion=["test_score_table:Last", "loss"])
    scores, facts = score_table.read(tmp_path / "scores.parquet")
    assert facts["useful"] == {"Last": "high", "loss": "low"}
    assert scores["score"].to_pylist() == scores["Last"].to_pylist() != scores["loss"].to_pylist()
    assert scores["Last"].to_numpy() == pytest.approx(lists_to_matrix(table["loss"])[:, [1, 3]].mean(1))


class Last:
    """A plug-in criterion that returns double precision."""

    useful = "high"

    def observe(self, seen):
        return seen.logits.max(1).values

    def aggregate(self, values):
        return values[:, :, -1].mean(1, dtype=np.float64)


class Total(Last):
    """Breaks the contract: one number for all."""

    def aggregate(self, values):
        return values.sum()


def test_a_criterion_that_does_not_score_every_sample_is_refused(tmp_path):
    table = rows(9).rename_columns(["sample_id", "label", "test_score_table:Total"])
    with pytest.raises(UserError, match=r"Total returns scores of shape .. for 9 samples"):
        write(tmp_path, *cut(tmp_path / "p", table, []), score__criterion="test_score_table:Total")


def test_given_weights_are_trials_of_one_epoch(tmp_path):
    table = rows(6, values=3)
    write(tmp_path, *cut(tmp_path / "p", table, []), score__weights=["a", "b", "c"])
    _, facts = score_table.read(tmp_path / "scores.parquet")
    assert (facts["trials"], facts["epochs"]) == (3, 1)


def test_values_of_another_number_of_checkpoints_are_an_error(tmp_path):
    with pytest.raises(UserError, match=r"holds 3 values of loss per sample, not 4; it was renamed to .*damaged"):
        write(tmp_path, *cut(tmp_path / "p", rows(6, values=3), []))


def test_rows_of_a_piece_are_joined_by_id(tmp_path):
    part = piece(tmp_path / "1", ["c", "a", "b"], [1, 0, 0])
    write(tmp_path, [part], [pa.array(["a", "b", "c"])])
    scores, _ = score_table.read(tmp_path / "scores.parquet")
    assert scores["sample_id"].to_pylist() == ["a", "b", "c"]
    assert scores["label"].to_pylist() == [0, 0, 1]
    assert lists_to_matrix(scores["loss_values"]).tolist() == lists_to_matrix(rows(3)["loss"])[[1, 2, 0]].tolist()


@pytest.mark.parametrize(
    ("have", "expected", "message"),
    [
        (["a", "b", "c"], ["a", "b", "c", "d"], "1 samples have no score, for example 'd' in .*second"),
        (["a", "b", "c"], ["a", "b"], "1 scores belong to no sample.*'c' in .*second"),
        (["a", "b", "b"], ["a", "b"], "1 samples are scored more than once in .*second"),
        (["a", "b", "b"], ["a", "b", "c"], "1 samples have no score, for example 'c' in .*second"),
        ([], ["c"], "1 samples have no score, for example 'c'"),
    ],
)
def test_a_piece_with_other_ids_is_an_error_and_nothing_is_published(tmp_path, have, expected, message):
    pieces = [piece(tmp_path / "first", ["0", "1"]), piece(tmp_path / "second", have)]
    with pytest.raises(UserError, match=message):
        write(tmp_path, pieces, [pa.array(["0", "1"]), pa.array(expected)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_a_missing_or_damaged_piece_is_an_error_and_the_old_table_stays(tmp_path):
    pieces, ids = cut(tmp_path / "p", rows(3000), [1000, 2000])
    write(tmp_path, pieces, ids)
    before = (tmp_path / "scores.parquet").read_bytes()
    data = pieces[1].read_bytes()
    pieces[1].write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"001000.parquet is not a readable Parquet file"):
        write(tmp_path, pieces, ids)
    pieces[1].unlink()
    with pytest.raises(UserError, match=r"001000.parquet is missing; run `distill-at-scale score CONFIG`"):
        write(tmp_path, pieces, ids)
    assert (tmp_path / "scores.parquet").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "scores.parquet"]


POOLS = []  # kept to the end: a buffer that outlives its pool crashes the process


def test_memory_holds_a_small_share_of_many_part_files(tmp_path, monkeypatch):
    monkeypatch.setattr(score_table, "ROWS", 1000)
    table, before = rows(100_000), pa.default_memory_pool()
    pieces, ids = cut(tmp_path, table, list(range(500, 100_000, 500)))
    POOLS.append(pa.proxy_memory_pool(before))
    pa.set_memory_pool(POOLS[-1])
    try:
        write(tmp_path, pieces, ids)
    finally:
        pa.set_memory_pool(before)
    assert POOLS[-1].max_memory() < table.nbytes / 5


def test_a_file_that_is_not_a_score_table_is_refused(tmp_path):
    with pytest.raises(UserError, match="distill-at-scale score"):
        score_table.read(tmp_path / "none")
    (tmp_path / "text").write_text("text", encoding="utf-8")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        score_table.read(tmp_path / "text")
    with pytest.raises(UserError, match="lacks the columns score"):
        score_table.facts(piece(tmp_path / "1", ["a"]))


def test_chosen_columns_are_read_alone(tmp_path):
    write(tmp_path, *cut(tmp_path / "p", rows(6), []))
    scores, facts = score_table.read(tmp_path / "scores.parquet", ["label", "loss"])
    assert scores.column_names == ["label", "loss"]
    assert facts == score_table.facts(tmp_path / "scores.parquet")
    with pytest.raises(UserError, match="lacks the columns el2n"):
        score_table.read(tmp_path / "scores.parquet", ["el2n"])


def test_only_lists_of_equal_length_become_a_matrix():
    lists = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    for kind in (pa.list_(pa.float32()), pa.list_(pa.float32(), 2)):
        column = pa.chunked_array([lists[:1], lists[1:]], kind)
        assert lists_to_matrix(column).tolist() == lists
        assert lists_to_matrix(column.slice(1)).tolist() == lists[1:]
        assert lists_to_matrix(column.slice(0, 0)).shape[0] == 0
    with pytest.raises(ValueError, match="differ in length"):
        lists_to_matrix(pa.chunked_array([[[1.0], [2.0, 3.0, 4.0]]], pa.list_(pa.float32())))


def test_the_facts_are_plain_json(digits_run):
    metadata = pq.read_metadata(digits_run.dir / "scores.parquet").metadata
    assert json.loads(metadata[b"scores"])["seed"] == 0


def test_a_score_table_whose_ids_are_not_text_is_refused(tmp_path):
    pq.write_table(pa.table({"sample_id": [b"a"], "label": [0], "score": [0.5]}), tmp_path / "scores.parquet")
    with pytest.raises(UserError, match="binary and int64, not text and numbers; run `score` again"):
        score_table.read(tmp_path / "scores.parquet")
