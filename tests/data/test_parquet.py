"""Parquet files of Hugging Face's layout: ids, splits, rows in any order, and files that are damaged or missing."""

from __future__ import annotations

import errno

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_cases import parquet, png, write_parquet

from distill_at_scale.core.errors import Unreachable, UserError
from distill_at_scale.data.codecs.image import ImageDecoder


def test_parquet_ids_are_the_paths_where_they_are_unique(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", [0, 1, 0], ["a.png", "b.png", "c.png"], ["cat", "dog"])
    source = parquet(tmp_path)
    assert source.class_names == ["cat", "dog"]
    assert source.listing("train").to_pydict() == {
        "sample_id": ["a.png", "b.png", "c.png"],
        "label": [0, 1, 0],
        "location": ["train-0.parquet"] * 3,
        "row": [0, 1, 2],
        "size": [0, 0, 0],
    }


@pytest.mark.parametrize("paths", [None, ["a", "b", "a"], ["a", None, "c"]], ids=["no field", "repeated", "a null"])
def test_parquet_ids_are_file_and_row_otherwise(tmp_path, paths):
    write_parquet(tmp_path / "train" / "x.parquet", [0, 1, 0], paths)
    assert parquet(tmp_path).listing("train")["sample_id"].to_pylist() == [f"train/x.parquet:{row}" for row in range(3)]


def test_parquet_paths_repeated_across_files_are_not_ids(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", [0], ["a"])
    write_parquet(tmp_path / "train-1.parquet", [1], ["a"])
    assert parquet(tmp_path).listing("train")["sample_id"].to_pylist() == ["train-0.parquet:0", "train-1.parquet:0"]


def test_parquet_splits_come_from_file_or_folder_names(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", [0, 1])
    write_parquet(tmp_path / "validation" / "0.parquet", [1, 1, 0])
    source = parquet(tmp_path)
    assert source.splits() == ["train", "test"]
    assert source.listing("test").num_rows == 3


def test_parquet_files_without_a_split_name_are_training_data(tmp_path):
    write_parquet(tmp_path / "data.parquet", [0, 1])
    assert parquet(tmp_path).splits() == ["train"]


def test_parquet_classes_without_names_are_numbered(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 2, 1])
    assert parquet(tmp_path).class_names == ["0", "1", "2"]


def test_parquet_reads_any_rows_in_any_order(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", [0] * 7, rows_per_group=3)
    write_parquet(tmp_path / "train-1.parquet", [0] * 2)
    source = parquet(tmp_path)
    table = source.listing("train").take([8, 0, 6, 3, 2, 7])
    assert source.read(table) == [png(level) for level in (1, 0, 6, 3, 2, 0)]


def test_validation_is_a_word_not_a_part_of_one(tmp_path):
    for name in ("retrieval/train-0", "retrieval/test-0", "retrieval/val/0"):
        write_parquet(tmp_path / f"{name}.parquet", [0])
    assert parquet(tmp_path).files["test"] == ["retrieval/val/0.parquet"]


def test_an_unreadable_disk_is_not_taken_for_a_damaged_parquet_file(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train.parquet", [0, 1])
    source = parquet(tmp_path)
    errors = [
        OSError("AWS Error SLOW_DOWN during GetObject operation"),
        PermissionError(errno.EACCES, "Permission denied"),
    ]
    for error in errors:

        def refuse(*_, error=error, **__):
            raise error

        monkeypatch.setattr(pq, "ParquetFile", refuse)
        with pytest.raises(Unreachable, match=r"cannot be read: .*(SLOW_DOWN|Permission denied)"):
            source.listing("train")


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(UserError, match=r"train\.parquet is not a readable Parquet file"):
        parquet(tmp_path)


def test_a_second_file_that_is_not_parquet_is_named(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", [0, 1], names=["a", "b"])
    (tmp_path / "train-1.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"train-1\.parquet is not a readable Parquet file"):
        parquet(tmp_path).listing("train")


def test_two_versions_of_a_parquet_set_and_a_missing_part_are_errors(tmp_path):
    for folder in ("snapshots/aaa/data", "snapshots/bbb/data"):
        write_parquet(tmp_path / folder / "train-00000-of-00001.parquet", [0, 1])
    with pytest.raises(UserError, match=r"aaa/data/train-00000-of-00001\.parquet and .*bbb/data/train-00000-of-00001"):
        parquet(tmp_path)
    assert parquet(tmp_path / "snapshots" / "aaa").splits() == ["train"]
    write_parquet(tmp_path / "cut" / "train-00000-of-00002.parquet", [0, 1])
    with pytest.raises(UserError, match=r"cut: train-00001-of-00002\.parquet is missing"):
        parquet(tmp_path / "cut")


def test_a_parquet_split_that_is_not_used_is_noted(tmp_path):
    for split in ("train", "validation", "test"):
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", [0, 1])
    (line,) = parquet(tmp_path).notes()
    assert line.startswith("validation-00000-of-00001.parquet is the test split; not used: test-00000-of-00001.parquet")
    write_parquet(tmp_path / "unlabeled-00000-of-00001.parquet", [0, 1])
    with pytest.raises(UserError, match=r"unlabeled-00000-of-00001\.parquet: the name does not say"):
        parquet(tmp_path)


def test_many_files_read_in_any_order_give_the_requested_rows(tmp_path):
    for part in range(9):
        write_parquet(tmp_path / f"train-{part}.parquet", [part % 3] * (part + 1), rows_per_group=2)
    source = parquet(tmp_path)
    table = source.listing("train")
    assert table["label"].to_pylist() == [part % 3 for part in range(9) for _ in range(part + 1)]
    shuffled = table.take(pa.array(np.random.default_rng(0).permutation(table.num_rows)))
    assert source.read(shuffled) == [png(row) for row in shuffled["row"].to_pylist()]
    assert source.read(table.slice(0, 0)) == []


def test_a_column_missing_from_one_of_many_files_names_that_file(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", [0, 1], names=["a", "b"])
    write_parquet(tmp_path / "train-1.parquet", [0, 1], label="fine")
    with pytest.raises(UserError, match=r"train-1\.parquet has no column 'label'"):
        parquet(tmp_path).listing("train")


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_truncated_parquet_file_is_named(tmp_path, keep):
    write_parquet(tmp_path / "train-0.parquet", [0, 1], names=["a", "b"])
    write_parquet(tmp_path / "train-1.parquet", [0, 1], names=["a", "b"])
    content = (tmp_path / "train-1.parquet").read_bytes()
    (tmp_path / "train-1.parquet").write_bytes(content[: int(keep * len(content))])
    with pytest.raises(UserError, match=r"train-1\.parquet is not a readable Parquet file.*Download it again"):
        parquet(tmp_path).listing("train")


def test_a_parquet_file_damaged_inside_is_named_when_read(tmp_path):
    pq.write_table(
        pa.table({"image": [png(i) for i in range(50)], "label": [0] * 50}), tmp_path / "train.parquet",
        use_dictionary=False, compression="zstd",
    )  # fmt: skip
    source = parquet(tmp_path)
    rows = source.listing("train")
    content = bytearray((tmp_path / "train.parquet").read_bytes())
    content[40:140] = bytes(100)
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"train\.parquet is not a readable Parquet file"):
        source.read(rows)


def test_a_parquet_file_that_shrank_after_listing_is_named(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0] * 5)
    source = parquet(tmp_path)
    rows = source.listing("train")
    write_parquet(tmp_path / "train.parquet", [0] * 3)
    with pytest.raises(UserError, match=r"train\.parquet has no row 3"):
        source.read(rows)


def test_hidden_parquet_files_are_left_out(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1])
    (tmp_path / ".train-1.parquet").write_bytes(b"x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "train.parquet").write_bytes(b"x")
    assert parquet(tmp_path).files == {"train": ["train.parquet"]}


def test_the_digest_of_parquet_follows_the_content(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1])
    before = parquet(tmp_path).digest("train")
    assert parquet(tmp_path).digest("train") == before
    write_parquet(tmp_path / "train.parquet", [0, 1, 1])
    assert parquet(tmp_path).digest("train") != before


def test_cifar10_is_read_in_the_original_order(shared_data):
    source = parquet(shared_data / "cifar10")
    assert source.class_names[:3] == ["airplane", "automobile", "bird"]
    assert len(source.class_names) == 10
    train, test = source.listing("train"), source.listing("test")
    assert (train.num_rows, test.num_rows) == (50_000, 10_000)
    assert np.bincount(train["label"].to_numpy()).tolist() == [5000] * 10
    assert train["row"].to_pylist() == list(range(50_000))
    assert train["label"].to_pylist()[:10] == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]  # the first of data_batch_1
    assert len(set(train["sample_id"].to_pylist())) == 50_000
    image = ImageDecoder(32)(source.read(train.slice(0, 1))[0])
    assert image.shape == (3, 32, 32)
