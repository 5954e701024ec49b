"""Which split a file or folder belongs to: words in names, unclear names, and folders of samples beside class folders."""

from __future__ import annotations

import re

import pytest

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.data.sources.base import by_split, split_word, unused_split
from distill_at_scale.storage.filesystem import Store


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("train", "train Training TRAINING tr trn train-0-of-1.parquet Train_1 train2017 my-train trainImages train.X1"),
        ("val", "val valid validation validate Validation-0.parquet images_val val2017 2017val valset"),
        ("dev", "dev devel development dev-00000.parquet parquet_dev/0.parquet DevSet_dev"),
        ("eval", "eval evaluation evaluate imagenet-eval-000.tar"),
        ("test", "test Testing tst test.parquet TestImages test_A sets/testing/part/000.tar train/test-pattern.tar"),
        ("train", "train/0.tar train/data/0.tar test/train-0.tar train_noisy train_unlabeled"),
        ("unclear", "holdout holdout-0.parquet trainval train_val unlabeled Extra query/0.tar gallery minival val-of-train"),
        (None, "trained valley tester data.parquet n01440764 latest-contrained.tar métré device evaluated interest"),
    ],
)  # fmt: skip
def test_words_that_name_a_split(word, names):
    assert {name: split_word(name) for name in names.split(" ")} == dict.fromkeys(names.split(" "), word)


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        ("train-0 val-0 test-0", {"train": ["train-0"], "test": ["val-0"], "unused": ["test-0"]}),
        ("training dev eval testing", {"train": ["training"], "test": ["dev"], "unused": ["eval", "testing"]}),
        ("train eval test-0 test-1", {"train": ["train"], "test": ["eval"], "unused": ["test-0", "test-1"]}),
        ("a b test/0 test/1", {"train": ["a", "b"], "test": ["test/0", "test/1"]}),
        ("train-0 train-1 val validation", {"train": ["train-0", "train-1"], "test": ["val", "validation"]}),
        ("test", {"test": ["test"]}),
        ("a", {"train": ["a"]}),
    ],
)
def test_files_by_split(tmp_path, files, splits):
    assert by_split(files.split(), Store(str(tmp_path))) == splits
    assert by_split([], Store(str(tmp_path))) == {}


@pytest.mark.parametrize(
    ("files", "named"), [("train b.parquet", "b"), ("a holdout", "holdout"), ("train_val", "train_val")]
)
def test_a_file_that_may_hold_evaluation_data_is_named(tmp_path, files, named):
    with pytest.raises(UserError, match=rf"/{named}.*: the name does not say whether .*; rename it"):
        by_split(files.split(), Store(str(tmp_path)))


def test_unused_splits_are_said_with_the_order_of_precedence():
    line = "val/ is the test split; not used: test/ (the order of precedence is val, dev, eval, test)"
    assert unused_split("val/", ["test/"]) == line
    assert "not used: 0, 1, 2 and 2 more (" in unused_split("val", list("01234"))


def folder(root, files):
    for file in files.split():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"x")
    return SOURCES["imagefolder"](DataSection(source="imagefolder", path=str(root)))


@pytest.mark.parametrize(
    ("files", "train", "test", "classes", "said"),
    [
        ("Training/a/0.png Training/b/1.png TEST/a/2.png", "Training/a/0.png Training/b/1.png", "TEST/a/2.png", "a b", ""),
        ("train2017/a/0.png val2017/a/1.png", "train2017/a/0.png", "val2017/a/1.png", "a", ""),
        ("my-train/a/0.png images_val/a/1.png", "my-train/a/0.png", "images_val/a/1.png", "a", ""),
        ("a/0.png b/1.png training/2.png", "a/0.png b/1.png training/2.png", "", "a b training", "training/ is taken as a"),
        ("a/0.png test/1.png holdout/2.png", "a/0.png holdout/2.png test/1.png", "", "a holdout test", "test/ is taken as a"),
        ("a/0.png train/1.png test/a/2.png test/train/3.png", "a/0.png train/1.png", "test/a/2.png test/train/3.png", "a train",
         "train/ is taken as a"),
        ("a/0.png val/a/1.png test/a/2.png", "a/0.png", "val/a/1.png", "a", "val/ is the test .*used: test/"),
        ("train/a/0.png dev/a/1.png test/2.png", "train/a/0.png", "dev/a/1.png", "a", "dev/ is the test .*used: test/"),
        ("train/a/0.png b/1.png b/2.png", "train/a/0.png", "", "a", r"b/ is next to .* not used \(images: 2\)"),
        ("train/a/0.png unlabeled/x/1.png docs/x.txt", "train/a/0.png", "", "a", r"unlabeled/ is next .* \(images: 1\)"),
        ("train/a/0.png test/1.png", "train/a/0.png", "", "a", "test/ holds no class folders, so its images have no labels"),
        ("train/a/0.png train_big/a/1.png", "train/a/0.png", "", "a", "train_big/ is next to the splits' folders: not used"),
    ],
)  # fmt: skip
def test_folders_of_the_root(tmp_path, files, train, test, classes, said):
    source = folder(tmp_path, files)
    assert source.class_names == classes.split()
    listings = {split: source.listing(split)["sample_id"].to_pylist() for split in source.splits()}
    assert listings == {"train": train.split()} | ({"test": test.split()} if test else {})
    assert len(notes := source.notes()) == (2 if "holdout" in classes else 1 if said else 0)
    assert not said or re.search(said, "\n".join(notes))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("a/0.png holdout/a/1.png", "holdout: the name does not say whether"),
        ("query/0.png gallery/1.png", "gallery: the name does not say whether"),
        ("trainval/a/0.png test/a/1.png", "trainval: the name does not say whether .* rename it"),
        ("train/0.png test/1.png", "train holds no class folders"),
        ("train-a/a/0.png train-b/b/1.png", r"several training folders \(train-a, train-b\); merge"),
    ],
)
def test_folders_that_cannot_be_used_are_named(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        folder(tmp_path, files)
