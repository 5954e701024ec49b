"""Files named `train-00000-of-00003`: each part of a set is there once."""

from __future__ import annotations

import pytest

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.numbered_files import check_numbered
from distill_at_scale.storage.filesystem import Store


def check(tmp_path, *names):
    check_numbered(names, Store(str(tmp_path)))


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"],
        ["a/train-00000-of-00002.parquet", "b/train-00001-of-00002.parquet"],
        ["train/data-00000-of-00001.parquet", "test/data-00000-of-00002.parquet", "test/data-00001-of-00002.parquet"],
        ["train-00000-of-00001-0123456789abcdef.parquet", "train_extra-00000-of-00001.parquet"],
        ["a/0000.parquet", "b/0000.parquet", "part-00000.parquet"],
        ["train-00000-of-00001.parquet", "train-00000-of-00001.tar"],
    ],
    ids=["one each", "two folders", "folders of splits", "two names", "no total", "two kinds"],
)
def test_whole_sets_are_taken(tmp_path, names):
    check(tmp_path, *names)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("aaa/data/train-00000-of-00001.parquet", "bbb/data/train-00000-of-00001.parquet"),
        ("train-00000-of-00001-0123456789abcdef.parquet", "train-00000-of-00001-fedcba9876543210.parquet"),
        ("a/train-00000-of-00001.parquet", "b/train-00000-of-00002.parquet"),
        ("train-00000-of-00001.parquet", "x/train-00000-of-00001.parquet"),
    ],
    ids=["two snapshots", "two hashes", "two totals", "root and folder"],
)
def test_two_versions_of_a_part_are_both_named(tmp_path, first, second):
    pattern = rf"/{first} and .*/{second} are parts of two versions .*; give the folder of one of them in data\.path"
    with pytest.raises(UserError, match=pattern):
        check(tmp_path, second, first)


def test_a_missing_part_is_named(tmp_path):
    with pytest.raises(UserError, match=r"/x: train-00001-of-00003\.parquet is missing; download it"):
        check(tmp_path, "x/train-00000-of-00003.parquet", "x/train-00002-of-00003.parquet")
    with pytest.raises(UserError, match=r": train-00000-of-00300\.tar and 298 more of 300 files are missing"):
        check(tmp_path, "train-00007-of-00300.tar")
