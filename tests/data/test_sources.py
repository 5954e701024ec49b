"""Which samples a layout holds, their ids and labels, and the raw bytes behind them."""

from __future__ import annotations

import errno
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import Unreachable, UserError
from distill_at_scale.data.codecs.image import ImageDecoder
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.data.sources.base import LISTING, listing


def png(level: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, labels, paths=None, names=None, image="image", label="label", kind=None, rows_per_group=None):
    """A file in Hugging Face's layout; image i is flat grey of level i."""
    fields = [("bytes", pa.binary())] + ([("path", pa.string())] if paths is not None else [])
    rows = [{"bytes": png(i), **({"path": paths[i]} if paths is not None else {})} for i in range(len(labels))]
    schema = pa.schema([(image, pa.struct(fields)), (label, kind or pa.int64())])
    if names:
        features = {label: {"_type": "ClassLabel", "names": names}}
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table([pa.array(rows, schema.field(0).type), pa.array(labels, kind)], schema=schema), path, rows_per_group
    )


def parquet(root, **keys):
    return SOURCES["parquet"](DataSection(source="parquet", path=str(root), **keys))


def imagefolder(root):
    return SOURCES["imagefolder"](DataSection(source="imagefolder", path=str(root)))


def touch(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(i))


def test_digits_are_the_embedded_set():
    source = SOURCES["digits"](DataSection())
    table = source.listing("train")
    assert source.splits() == ["train"]
    assert table.schema == LISTING
    assert table.num_rows == 1797
    assert np.bincount(table["label"].to_numpy()).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    images = np.stack(source.read(table.slice(0, 20)))
    assert (images.shape, images.dtype, images.min(), images.max()) == ((20, 8, 8), np.uint8, 0, 255)
    assert source.digest("train") == SOURCES["digits"](DataSection()).digest("train")


def test_digits_are_the_same_where_scikit_learn_keeps_its_file_elsewhere(monkeypatch):
    expected = SOURCES["digits"](DataSection()).digest("train")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert SOURCES["digits"](DataSection()).digest("train") == expected


def test_a_repeated_id_is_named():
    with pytest.raises(UserError, match="'b' occurs twice"):
        listing(["a", "b", "b"], [0, 0, 0], ["x"] * 3, [0, 1, 2])


@pytest.mark.parametrize("name", ["parquet", "imagefolder"])
def test_a_missing_path_is_an_error(name, tmp_path):
    with pytest.raises(UserError, match=r"data\.path is not set"):
        SOURCES[name](DataSection(source=name))
    with pytest.raises(UserError, match="no such folder"):
        SOURCES[name](DataSection(source=name, path=str(tmp_path / "none")))
    with pytest.raises(UserError, match="holds no"):
        SOURCES[name](DataSection(source=name, path=str(tmp_path)))


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


def test_parquet_columns_can_be_named(tmp_path):
    write_parquet(tmp_path / "train.parquet", [1, 0], ["a", "b"], image="img", label="fine")
    source = parquet(tmp_path, image_column="img", label_column="fine")
    assert source.listing("train")["label"].to_pylist() == [1, 0]
    assert source.read(source.listing("train"))[1] == png(1)


def test_a_missing_column_lists_the_existing_ones(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0], label="fine")
    with pytest.raises(UserError, match=r"no column 'label'; set data\.label_column to one of: image, fine"):
        parquet(tmp_path).listing("train")


def test_an_image_column_without_bytes_is_an_error(tmp_path):
    pq.write_table(pa.table({"image": [7], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="must be binary or a struct with the field bytes"):
        parquet(tmp_path).listing("train")


@pytest.mark.parametrize("bad", [-1, 2, None])
def test_a_bad_label_names_file_and_row(tmp_path, bad):
    write_parquet(tmp_path / "train.parquet", [0, 1, bad], names=["cat", "dog"])
    with pytest.raises(UserError, match=r"train\.parquet, row 2"):
        parquet(tmp_path).listing("train")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_labels_that_are_text_are_classes_sorted_by_name(tmp_path, kind):
    write_parquet(tmp_path / "train-0.parquet", ["dog", "cat", "dog"], kind=kind)
    write_parquet(tmp_path / "train-1.parquet", ["ape"], kind=kind)
    write_parquet(tmp_path / "test-0.parquet", ["cat"], kind=kind)
    source = parquet(tmp_path)
    assert source.class_names == ["ape", "cat", "dog"]
    assert source.listing("train")["label"].to_pylist() == [2, 1, 2, 0]
    assert source.listing("test")["label"].to_pylist() == [1]


@pytest.mark.parametrize("bad", ["cow", None, " "])
def test_a_text_that_is_not_a_class_names_file_row_and_action(tmp_path, bad):
    write_parquet(tmp_path / "train.parquet", ["cat", "dog"], kind=pa.string())
    write_parquet(tmp_path / "test.parquet", ["cat", bad], kind=pa.string())
    with pytest.raises(UserError, match=r"test\.parquet, row 1: the label .* is not a class of .*data\.label_column"):
        parquet(tmp_path).listing("test")


@pytest.mark.parametrize("first", [0, 1])
def test_text_and_numbers_are_not_mixed(tmp_path, first):
    write_parquet(tmp_path / f"train-{first}.parquet", [0, 1])
    write_parquet(tmp_path / f"train-{1 - first}.parquet", ["0", "dog"], kind=pa.string())
    with pytest.raises(UserError, match=rf"train-{first}\.parquet, row 0: the label 0 is not a text"):
        parquet(tmp_path).listing("train")


@pytest.mark.parametrize(("values", "kind"), [([0.5], "double"), ([[0, 1]], "list"), ([True], "bool")])
def test_labels_of_another_kind_name_file_column_and_action(tmp_path, values, kind):
    pq.write_table(pa.table({"image": [png(0)], "label": values}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=rf"train\.parquet: column 'label' holds {kind}.*set data\.label_column"):
        parquet(tmp_path).listing("train")


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64()])
def test_a_number_that_no_class_can_have_names_file_row_and_action(tmp_path, kind):
    write_parquet(tmp_path / "train-0.parquet", [0, 1])
    write_parquet(tmp_path / "train-1.parquet", [0, 3, 2**40], kind=kind)
    with pytest.raises(UserError, match=r"train-1\.parquet, row 2: the label 1099511627776 .*set data\.label_column"):
        parquet(tmp_path).listing("train")


def test_a_number_beyond_all_integers_is_not_a_declared_class(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 2**63 + 1], names=["a", "b"], kind=pa.uint64())
    with pytest.raises(UserError, match=r"row 1: the label 9223372036854775809 is not one of 0\.\.1"):
        parquet(tmp_path).listing("train")


@pytest.mark.parametrize(
    "metadata",
    [
        b"{cut",
        b"\xff",
        b"[1]",
        b'{"info": null}',
        json.dumps({"info": {"features": {"label": [{"names": ["a"]}]}}}).encode(),
        json.dumps({"info": {"features": {"label": {"names": "ab"}}}}).encode(),
    ],
)
def test_metadata_that_cannot_be_read_is_as_if_it_were_not_there(tmp_path, metadata):
    table = pa.table({"image": [png(0), png(1)], "label": [0, 1]}).replace_schema_metadata({b"huggingface": metadata})
    pq.write_table(table, tmp_path / "train.parquet")
    assert parquet(tmp_path).class_names == ["0", "1"]


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


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_an_image_column_may_be_plain_bytes(tmp_path, kind):
    table = pa.table({"image": pa.array([png(i) for i in range(5)], kind), "label": [0, 1, 0, 1, 0]})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=2)
    source = parquet(tmp_path)
    rows = source.listing("train")
    assert rows["sample_id"].to_pylist() == [f"train.parquet:{row}" for row in range(5)]
    assert source.read(rows.slice(1, 3)) == [png(1), png(2), png(3)]


def test_a_null_image_is_rejected(tmp_path):
    images = pa.array([{"bytes": png(0)}, None, {"bytes": None}], pa.struct([("bytes", pa.binary())]))
    pq.write_table(pa.table({"image": images, "label": [0, 0, 0]}), tmp_path / "train.parquet")
    source = parquet(tmp_path)
    first, *others = source.read(source.listing("train"))
    assert first == png(0)
    assert [str(item) for item in others] == ["the row holds no image: its bytes are null; remove the row"] * 2


def write_paths(path, paths, images):
    """A file of rows with a path, and an image or null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": image, "path": name} for image, name in zip(images, paths, strict=True)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(rows, kind), "label": [0] * len(rows)}), path)


def test_an_image_that_a_row_only_names_is_read_from_its_file(tmp_path):
    touch(tmp_path / "set", "data/near.png", "data/deep/near.png", "root.png", "data/root/file.png")
    touch(tmp_path, "outside.png")
    absolute = str(tmp_path / "set" / "root.png")
    names = ["near.png", "deep/near.png", "root.png", "../root.png", absolute, "inside.png"]
    lost = ["none.png", "../../outside.png", str(tmp_path / "outside.png"), "a\0b", "", None]
    images = [*[None] * 5, png(7), *[None] * len(lost)]
    write_paths(tmp_path / "set" / "data" / "train.parquet", [*names, *lost], images)
    source = parquet(tmp_path / "set")
    items = source.read(source.listing("train"))
    assert items[: len(names)] == [png(0), png(1), png(2), png(2), png(2), png(7)]
    for name, item in zip(lost, items[len(names) :], strict=True):
        reason = f"the row holds a path, not an image: {name!r} is missing in {tmp_path}/set; put the file there"
        assert str(item).startswith(reason if name else "the row holds no image: its bytes are null")


def test_a_named_file_that_is_too_large_is_rejected(tmp_path):
    touch(tmp_path, "a.png")
    write_paths(tmp_path / "train.parquet", ["a.png"], [None])
    source = parquet(tmp_path, max_bytes=10)
    (item,) = source.read(source.listing("train"))
    assert "'a.png', larger than data.max_bytes = 10; raise it" in str(item)


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


def test_a_path_that_is_missing_or_unset_is_an_error():
    for name in ("imagefolder", "parquet", "imagenet", "tiny_imagenet", "torchvision"):
        with pytest.raises(UserError, match=r"data\.path is not set"):
            SOURCES[name](DataSection(source=name))
        with pytest.raises(UserError, match="there is no such folder"):
            SOURCES[name](DataSection(source=name, path="/nowhere/at/all"))


def test_the_digest_of_parquet_follows_the_content(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1])
    before = parquet(tmp_path).digest("train")
    assert parquet(tmp_path).digest("train") == before
    write_parquet(tmp_path / "train.parquet", [0, 1, 1])
    assert parquet(tmp_path).digest("train") != before


def test_the_digest_does_not_depend_on_the_path(tmp_path):
    for place in ("here", "there"):
        write_parquet(tmp_path / place / "train.parquet", [0, 1])
        touch(tmp_path / f"images-{place}", "train/a/1.png", "train/b/2.png")
    assert parquet(tmp_path / "here").digest("train") == parquet(tmp_path / "there").digest("train")
    first, second = imagefolder(tmp_path / "images-here"), imagefolder(tmp_path / "images-there")
    assert first.digest("train") == second.digest("train")


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


def test_imagenette_is_listed_and_decoded(shared_data):
    source = imagefolder(shared_data / "imagenette")
    train, test = source.listing("train"), source.listing("test")
    assert (len(source.class_names), train.num_rows, test.num_rows) == (10, 2000, 600)
    assert train["sample_id"][0].as_py().startswith("train/n01440764/")
    decoder = ImageDecoder(64, resize="crop")
    images = [decoder(raw) for raw in source.read(test.take([0, 300, 599]))]
    assert {image.shape for image in images} == {(3, 64, 64)}
    assert min(image.std() for image in images) > 5
