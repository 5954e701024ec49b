"""Folders of images by class: ids, splits, sizes, and folders that are empty."""

from __future__ import annotations

import pytest
from source_cases import imagefolder, png, touch

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.codecs.image import ImageDecoder
from distill_at_scale.data.sources import SOURCES


def test_imagefolder_ids_are_posix_paths_with_the_split(tmp_path):
    touch(tmp_path, "train/dog/2.png", "train/cat/b/1.JPEG", "train/cat/0.png", "val/cat/9.png", "train/cat/notes.txt")
    source = imagefolder(tmp_path)
    assert source.class_names == ["cat", "dog"]
    assert source.splits() == ["train", "test"]
    assert source.listing("train")["sample_id"].to_pylist() == [
        "train/cat/0.png",
        "train/cat/b/1.JPEG",
        "train/dog/2.png",
    ]
    assert source.listing("train")["label"].to_pylist() == [0, 0, 1]
    assert source.listing("test")["sample_id"].to_pylist() == ["val/cat/9.png"]
    assert source.read(source.listing("train"))[2] == png(0)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_every_name_of_the_test_split_is_known(tmp_path, name):
    touch(tmp_path, "train/cat/0.png", f"{name}/cat/1.png")
    assert imagefolder(tmp_path).listing("test")["sample_id"].to_pylist() == [f"{name}/cat/1.png"]


def test_class_folders_right_below_the_root_are_training_data(tmp_path):
    touch(tmp_path, "cat/0.png", "dog/1.png", "test/cat/2.png", ".hidden/3.png")
    source = imagefolder(tmp_path)
    assert source.class_names == ["cat", "dog"]
    assert source.listing("train")["sample_id"].to_pylist() == ["cat/0.png", "dog/1.png"]


def test_several_training_folders_are_an_error_and_train_itself_wins(tmp_path):
    touch(tmp_path, "train.X1/cat/0.png", "train.X2/dog/1.png")
    with pytest.raises(UserError, match=r"several training folders \(train\.X1, train\.X2\)"):
        imagefolder(tmp_path)
    touch(tmp_path, "train/cow/0.png", "test/cow/1.png", "val/cow/2.png")
    source = imagefolder(tmp_path)
    assert source.class_names == ["cow"]
    assert source.listing("test")["sample_id"].to_pylist() == ["val/cow/2.png"]


def test_a_folder_without_images_is_an_error(tmp_path):
    touch(tmp_path, "train/cat/notes.txt")
    with pytest.raises(UserError, match="holds no images"):
        imagefolder(tmp_path).listing("train")


def test_an_empty_class_folder_is_named(tmp_path):
    touch(tmp_path, "train/cat/0.png", "train/dog/.hidden.png", "train/dog/notes.txt")
    with pytest.raises(UserError, match="train/dog is missing or holds no image; complete the split, or remove"):
        imagefolder(tmp_path).listing("train")


def test_an_empty_class_folder_outside_the_wanted_classes_does_not_matter(tmp_path):
    touch(tmp_path, "train/cat/0.png", "train/dog/notes.txt")
    source = SOURCES["imagefolder"](DataSection(source="imagefolder", path=str(tmp_path), classes=["cat"]))
    assert source.listing("train")["label"].to_pylist() == [0]


def test_a_flat_val_is_sent_to_the_right_source(tmp_path):
    touch(tmp_path, "train/cat/0.png", "val/1.png")
    with pytest.raises(UserError, match=r"val holds images but no class folders; .*set data\.source to imagenet"):
        imagefolder(tmp_path).listing("test")


def test_sizes_are_listed(tmp_path):
    touch(tmp_path, "train/cat/0.png", "train/cat/1.png")
    sizes = imagefolder(tmp_path).listing("train")["size"].to_pylist()
    assert sizes == [len(png(0)), len(png(1))]


def test_classes_whose_names_sort_around_the_slash_stay_together(tmp_path):
    touch(tmp_path, "train/a/0.png", "train/a-b/1.png", "train/a/z.png", "train/a b/2.png")
    table = imagefolder(tmp_path).listing("train")
    assert table["label"].to_pylist() == [0, 0, 1, 2]
    assert [i.split("/")[1] for i in table["sample_id"].to_pylist()] == ["a", "a", "a b", "a-b"]


def test_a_class_that_only_the_test_split_has_is_an_error(tmp_path):
    touch(tmp_path, "train/cat/0.png", "val/cat/1.png", "val/dog/2.png")
    with pytest.raises(UserError, match="dog"):
        imagefolder(tmp_path).listing("test")


def test_the_digest_of_a_folder_follows_the_content(tmp_path):
    touch(tmp_path, "train/cat/0.png")
    before = imagefolder(tmp_path).digest("train")
    touch(tmp_path, "train/cat/0.png", "train/cat/1.png")
    assert imagefolder(tmp_path).digest("train") != before


def test_imagenette_is_listed_and_decoded(shared_data):
    source = imagefolder(shared_data / "imagenette")
    train, test = source.listing("train"), source.listing("test")
    assert (len(source.class_names), train.num_rows, test.num_rows) == (10, 2000, 600)
    assert train["sample_id"][0].as_py().startswith("train/n01440764/")
    decoder = ImageDecoder(64, resize="crop")
    images = [decoder(raw) for raw in source.read(test.take([0, 300, 599]))]
    assert {image.shape for image in images} == {(3, 64, 64)}
    assert min(image.std() for image in images) > 5
