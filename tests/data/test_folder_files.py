"""Files in class folders: which are samples, which are set aside with a reason, which are passed over; levels and order."""

from __future__ import annotations

import numpy as np
import pytest

from distill_at_scale.config import load as configuration
from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.codecs.image import encode
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.ingest.chunks import ingest_chunk, part_path, recipe_of
from distill_at_scale.data.ingest.merge import write_rejected
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.pipeline import validate

JPEG = encode(np.full((3, 8, 8), 99, np.uint8), 90)


def folder(root, *files, source="imagefolder"):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(JPEG)
    return SOURCES[source](DataSection(source=source, path=str(root)))


@pytest.mark.parametrize(
    "name",
    ["x.jpg", "x.JPEG", "x.jfif", "x.jpe", "X.JIF", "x.pjpeg", "x.dib", "x.pbm", "x", "x.JPG_large", "x.jpg_orig", "x.JPG~1",
     "x.jpg.1", "x.jpg?width=640", "img.2020-01-01", "x.png"],
)  # fmt: skip
def test_other_endings_and_none_are_images(tmp_path, name):
    source = folder(tmp_path, f"train/a/{name}")
    assert source.listing("train")["sample_id"].to_pylist() == [f"train/a/{name}"]
    assert source.read(source.listing("train")) == [JPEG]
    assert source.set_aside("train").num_rows == 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a/x.avif", "AVIF is not read; convert it to JPEG or PNG"),
        ("a/x.HEIC", "HEIC is not read; convert it to JPEG or PNG"),
        ("a/deep/x.svg", "SVG is not read; convert it to JPEG or PNG"),
        ("a/x.cr2", "a camera's raw format, which is not read; convert it to JPEG or PNG"),
        ("a/x.mp4", "a video; set data.source to videofolder to use videos"),
        ("a/x.jpg.part", "a download that was not finished; finish it, or remove the file"),
        ("a/x.zip", "an archive, which is not read here; unpack it"),
        ("a/x.dat", "no image by its name, which ends in '.dat'; rename or remove the file"),
        ("x.jpg", "an image in no class folder; move it into one"),
        ("x.jfif", "an image in no class folder; move it into one"),
        ("x.avif", "AVIF is not read; convert it to JPEG or PNG"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("source", ["imagefolder", "imagenet"])
def test_what_looks_like_a_sample_is_set_aside_with_its_reason(tmp_path, name, reason, split, source):
    own = folder(tmp_path, "train/a/0.jpg", "val/a/0.jpg", f"{split}/{name}", source=source)
    split, label = ("train" if split == "train" else "test"), 0 if name.startswith("a/") else -1
    rows = own.set_aside(split).to_pylist()
    assert [(row["sample_id"], row["label"], row["reason"]) for row in rows] == [
        (f"{'train' if split == 'train' else 'val'}/{name}", label, reason)
    ]
    assert own.listing(split).num_rows == 1


@pytest.mark.parametrize(
    "name",
    ["a/README", "a/license", "a/x.txt", "a/X.JSON", "a/x.xml", "a/SHA256SUMS", "a/x.md5", "a/x.jpg~", "a/x.jpg_original",
     "a/Thumbs.db", "a/.DS_Store", "a/._0.jpg", "@eaDir/0.jpg", "README", "list", "x.tar", "x.dat", "labels.csv"],
)  # fmt: skip
def test_companions_are_passed_over_without_a_word(tmp_path, name):
    source = folder(tmp_path, "train/a/0.jpg", f"train/{name}")
    assert source.listing("train")["sample_id"].to_pylist() == ["train/a/0.jpg"]
    assert source.set_aside("train").num_rows == 0


def test_samples_that_were_passed_over_are_counted(tmp_path):
    folder(tmp_path, "train/a/0.jpg", "train/a/1.avif", "train/2.jpg")
    config = configuration.validate({"data": {"source": "imagefolder", "path": str(tmp_path), "size": 8}})
    plan = ingest.plan(config)
    assert (plan.samples, plan.known) == (1, 3)
    part = part_path(tmp_path, "train", 0)
    ingest_chunk(ingest.open_source(config.data), recipe_of(config), plan.listings["train"], part, check=True)
    listed = write_rejected(plan, tmp_path, tmp_path / "listed.parquet", config.data.chunk)
    assert "2 of 3 samples cannot be used" in validate.summary(plan, listed, tmp_path)[0]


def test_an_image_in_an_unread_format_explains_an_empty_class(tmp_path):
    with pytest.raises(UserError, match=r"the class 'b' has no .* \(train/b/0\.avif: AVIF is not read; convert it"):
        folder(tmp_path, "train/a/0.jpg", "train/b/0.avif").listing("train")
    with pytest.raises(UserError, match=r"holds no images in class folders \(train/a/0\.heic: HEIC is not read"):
        folder(tmp_path / "all", "train/a/0.heic", "train/b/0.heic").listing("train")


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ("nette/train/a/0.jpg nette/train/b/1.jpg", "", "nette would be a class, .* data.path=.*/nette?"),
        ("nette/train/a/0.jpg nette/val/a/1.jpg other/x/2.jpg", "", "nette would be a class, .* train, val: did you mean"),
        ("up/nette/train/a/0.jpg up/nette/val/a/1.jpg", "", "up would be a class, .* data.path=.*/up/nette?"),
        ("cats/a/0.jpg cats/b/1.jpg", "", r"cats would be a class, but holds the folders a, b: did you mean .*/cats\?"),
        ("a/train/0.jpg a/test/1.jpg b/train/2.jpg b/test/3.jpg", "", r"a would be .* Otherwise the layout is train/<class>"),
        ("train/train/a/0.jpg train/train/b/1.jpg", "", "train/train would be a class"),
        ("train/a/0.jpg train/b/1.jpg", "train/a", r"train/a holds no class folders; .* did you mean the folder above it"),
    ],
)  # fmt: skip
def test_a_root_at_another_level_is_an_error(tmp_path, files, path, message):
    folder(tmp_path / "unused", "train/a/0.jpg")
    for file in files.split():
        (tmp_path / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / file).write_bytes(JPEG)
    with pytest.raises(UserError, match=message):
        folder(tmp_path / "data" / path).listing("train")


def test_imagenet_names_the_folder_that_holds_train(tmp_path):
    with pytest.raises(UserError, match=r"has no folder train/; .* Did you mean data\.path=.*/nette\?"):
        folder(tmp_path, "nette/train/n01/0.JPEG", "zoo/readme.txt", source="imagenet")
    with pytest.raises(UserError, match=r"Did you mean data\.path=.*/ILSVRC/Data/CLS-LOC\?"):
        folder(tmp_path / "b", "ILSVRC/Data/CLS-LOC/train/n01/0.JPEG", "ILSVRC/Annotations/x.xml", source="imagenet")


def test_one_class_with_folders_and_samples_is_a_class(tmp_path):
    assert (
        folder(tmp_path, "train/a/0.jpg", "train/a/deep/1.jpg", "train/a/deeper/2.jpg").listing("train").num_rows == 3
    )
    nested = folder(tmp_path / "b", "train/a/images/1.jpg", "train/b/images/2.jpg", "train/b/more/3.jpg")
    assert nested.listing("train")["label"].to_pylist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("names", "order", "said"),
    [
        ("0 1 10 11 2", "0 1 2 10 11", True),
        ("00 1 010 2", "00 1 2 010", True),
        ("00 01 02 10", "00 01 02 10", False),
        ("1 01 2", "01 1 2", False),
        ("0 1 10 2 x", "0 1 10 2 x", False),
        ("-1 0 10 2", "-1 0 10 2", False),
        ("1.5 10 2", "1.5 10 2", False),
        ("² 10 2", "10 2 ²", False),
    ],
)
@pytest.mark.parametrize("root", ["", "train/"])
def test_class_folders_named_by_whole_numbers_follow_their_values(tmp_path, names, order, said, root):
    source = folder(tmp_path, *(f"{root}{name}/0.jpg" for name in names.split()))
    assert source.class_names == order.split()
    assert source.listing("train")["sample_id"].to_pylist() == [f"{root}{name}/0.jpg" for name in order.split()]
    notes = [line for line in source.notes() if "whole numbers" in line]
    assert len(notes) == said
    if said:
        assert "data.class_names sets another order" in notes[0]
