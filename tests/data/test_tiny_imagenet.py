"""Tiny-ImageNet's layout, as unpacked and with sorted validation images, and damaged."""

from __future__ import annotations

import pytest

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources import SOURCES

WNIDS = ["n02", "n01", "n03"]  # not sorted, as in wnids.txt


def put(root, name, content=""):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content, encoding="utf-8")


def tiny(root, annotated=(("a.JPEG", "n01"), ("b.JPEG", "n02"))):
    put(root, "wnids.txt", "\n".join(WNIDS))
    put(root, "words.txt", "n01\ttench")
    for wnid in WNIDS:
        put(root, f"train/{wnid}/images/{wnid}_0.JPEG", wnid)
        put(root, f"train/{wnid}/{wnid}_boxes.txt", "x")
    for name, _ in annotated:
        put(root, f"val/images/{name}", name)
    put(root, "val/val_annotations.txt", "".join(f"{name}\t{wnid}\t0\t0\t9\t9\n" for name, wnid in annotated))
    put(root, "test/images/test_0.JPEG")
    return root


def source_of(root):
    return SOURCES["tiny_imagenet"](DataSection(source="tiny_imagenet", path=str(root)))


def list_all(root):
    source = source_of(root)
    return [source.listing(split) for split in source.splits()]


def test_classes_are_in_the_order_of_the_list(tmp_path):
    source = source_of(tiny(tmp_path))
    assert source.class_names == WNIDS
    assert source.splits() == ["train", "test"]
    table = source.listing("train")
    assert table["sample_id"].to_pylist() == [f"train/{w}/images/{w}_0.JPEG" for w in WNIDS]
    assert table["label"].to_pylist() == [0, 1, 2]
    assert source.read(table) == [b"n02", b"n01", b"n03"]


def test_validation_labels_come_from_the_annotations(tmp_path):
    table = source_of(tiny(tmp_path)).listing("test")
    assert table["sample_id"].to_pylist() == ["val/images/a.JPEG", "val/images/b.JPEG"]
    assert table["label"].to_pylist() == [1, 0]


def test_class_folders_under_val_work_too(tmp_path):
    tiny(tmp_path, ())
    (tmp_path / "val" / "val_annotations.txt").unlink()
    for wnid in WNIDS:
        put(tmp_path, f"val/{wnid}/x.JPEG")
    assert source_of(tmp_path).listing("test")["label"].to_pylist() == [0, 1, 2]


def test_without_val_there_is_no_test_split(tmp_path):
    put(tmp_path, "wnids.txt", "n01")
    put(tmp_path, "train/n01/images/a.JPEG")
    put(tmp_path, "test/images/b.JPEG")
    assert source_of(tmp_path).splits() == ["train"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("wnids.txt", None, "has no wnids.txt"),
        ("wnids.txt", "n01\nn02\nn02\n", "every class once"),
        ("wnids.txt", "n01\nn02\n", "train/n03 is a class that"),
        ("wnids.txt", "n01\nn02\nn03\nn04\n", "train/n04 is missing or holds no image"),
        ("train/n03/images/n03_0.JPEG", None, "train/n03 is missing or holds no image"),
        ("val/val_annotations.txt", None, "has no val/val_annotations.txt"),
        ("val/val_annotations.txt", "a.JPEG\tn01\n", "has 1 lines for 2 images"),
        ("val/val_annotations.txt", "a.JPEG\tn01\nc.JPEG\tn01\n", "has no class for the image b.JPEG"),
        ("val/val_annotations.txt", "a.JPEG\tn01\nb.JPEG\tn9\n", "the class 'n9', which is not in wnids.txt"),
        ("val/val_annotations.txt", "a.JPEG\nb.JPEG\n", "line 1: no class"),
        ("val/images/a.JPEG", None, "has 2 lines for 1 images"),
    ],
)
def test_damage_is_one_error(tmp_path, name, content, message):
    tiny(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        put(tmp_path, name, content)
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        list_all(tmp_path)
