"""The columns of Parquet files: labels as numbers and texts, images as bytes and as paths."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_cases import parquet, png, touch, write_parquet

from distill_at_scale.core.errors import UserError


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
