"""WebDataset shards: their samples, all ways to name them, and faults, named with shard and sample."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from webdataset_cases import labels_of, sample, source_of, tar_of, write

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.base import LISTING
from distill_at_scale.data.sources.folders import ImageFolder


@pytest.fixture(params=["local", "uri"])
def named(request):
    """A path as it is, or as a URI (the way of remote storage)."""
    return lambda path: str(path) if request.param == "local" else "file://" + str(path)


def test_samples_are_listed_and_read(tmp_path, named):
    write(tmp_path, "train-000000.tar", *sample("a", 2, b"A" * 900), *sample("b", 0, b"B"))
    write(tmp_path, "train-000001.tar", *sample("c", 1, b"C" * 70_000))
    write(tmp_path, "val-000000.tar", *sample("v", 1, b"V"))
    source = source_of(named(tmp_path))
    table = source.listing("train")
    assert source.splits() == ["train", "test"]
    assert table.schema == LISTING
    assert table["sample_id"].to_pylist() == ["a", "b", "c"]
    assert table["label"].to_pylist() == [2, 0, 1]
    assert table["location"].to_pylist() == ["train-000000.tar"] * 2 + ["train-000001.tar"]
    assert source.read(table.take([2, 0, 1])) == [b"C" * 70_000, b"A" * 900, b"B"]
    assert source.read(source.listing("test")) == [b"V"]
    assert source.class_names == ["0", "1", "2"]


def test_class_names_are_sorted_and_come_from_all_training_shards(tmp_path):
    write(tmp_path, "train-0.tar", *sample("a", "snake"), *sample("b", " bee\n"))
    write(tmp_path, "train-1.tar", *sample("c", "ant"))
    write(tmp_path, "val-0.tar", *sample("v", "bee"))
    source = source_of(tmp_path)
    assert source.class_names == ["ant", "bee", "snake"]
    assert source.listing("train")["label"].to_pylist() == [2, 1, 0]
    assert source.listing("test")["label"].to_pylist() == [1]


def test_numbers_that_leave_classes_out_keep_their_places(tmp_path):
    write(tmp_path, "train-0.tar", *sample("a", 3), *sample("b", "001"))
    assert source_of(tmp_path).class_names == ["0", "1", "2", "3"]
    assert source_of(tmp_path).listing("train")["label"].to_pylist() == [3, 1]


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "JPEG", "Png"])
def test_every_image_format_is_taken(tmp_path, extension):
    write(tmp_path, "train-0.tar", (f"a.{extension}", b"image"), ("a.cls", "0"))
    source = source_of(tmp_path)
    assert source.read(source.listing("train")) == [b"image"]


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"label": 4}, {}),
        ({"cls": 4}, {}),
        ({"label": "4", "cls": 9}, {}),
        ({"fine": 4, "label": 1}, {"label_column": "fine"}),
        ({"cls": 4, "label": 1}, {"label_column": "fine"}),
    ],
)
def test_labels_of_json_are_found_by_key(tmp_path, values, keys):
    write(tmp_path, "train-0.tar", ("a.jpg", b"1"), ("a.json", values))
    assert labels_of(source_of(tmp_path, **keys)) == {"a": "4"}


def test_a_class_name_that_is_not_valid_text_is_escaped(tmp_path):
    write(tmp_path, "train-0.tar", ("a.jpg", b"1"), ("a.json", b'{"label": "x\\ud800"}'))
    assert labels_of(source_of(tmp_path)) == {"a": "x\\ud800"}


def test_cls_takes_precedence_over_json_and_other_files_are_skipped(tmp_path):
    files = [("a.cls", "1"), ("a.jpg", b"image"), ("a.json", b"{broken"), ("a.txt", "text"), ("a.seg.png", b"mask")]
    write(tmp_path, "train-0.tar", *files, ("README", "words"), ("notes.txt", "words"), ("._b.jpg", b"mac"))
    assert labels_of(source_of(tmp_path)) == {"a": "1"}


def test_the_files_of_a_sample_come_in_any_order_and_folders_count(tmp_path):
    files = [("./x/a.cls", "1"), ("./x/a.jpg", b"1"), ("y/a.jpg", b"2"), ("y/a.cls", "0")]
    write(tmp_path, "train-0.tar", *files)
    assert labels_of(source_of(tmp_path)) == {"x/a": "1", "y/a": "0"}


def test_keys_that_repeat_in_another_shard_get_the_shard_before_them(tmp_path):
    write(tmp_path, "train/0.tar", *sample("a", 0), *sample("b", 1))
    write(tmp_path, "train/1.tar", *sample("a", 1))
    write(tmp_path, "val/0.tar", *sample("a", 1))
    source = source_of(tmp_path)
    assert source.listing("train")["sample_id"].to_pylist() == ["train/0.tar:a", "train/0.tar:b", "train/1.tar:a"]
    assert source.listing("test")["sample_id"].to_pylist() == ["a"]


GOOD = sample("good", 1)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("bad.jpg", b"1")], "has no label"),
        ([("bad.cls", "1")], "has no image"),
        ([("bad.json", {"label": 1})], "has no image"),
        ([("bad.cls", "1"), ("bad.heic", b"1")], "bad.heic: HEIC is not read; convert it to JPEG"),
        ([("bad.avif", b"1")], "bad.avif: AVIF is not read; convert it to JPEG"),
        ([("bad.jpg", b"1"), ("bad.png", b"1"), ("bad.cls", "1")], "has a second file 'bad.png'"),
        ([*sample("bad", 1), *sample("bad", 1)], "has a second file 'bad.cls'"),
        ([("bad.jpg", b"1"), ("bad.cls", "1"), ("bad.cls", "1")], "has a second file 'bad.cls'"),
        (sample("bad", -1), "has the label -1, outside"),
        (sample("bad", 10**7), "has the label 10000000, outside"),
        (sample("bad", ""), "has the label '', which is neither"),
        ([("bad.jpg", b"1"), ("bad.cls", b"\xff\xfe")], "has a cls file that is not UTF-8 text"),
        ([("bad.jpg", b"1"), ("bad.json", b"{broken")], "has a json file that cannot be read"),
        ([("bad.jpg", b"1"), ("bad.json", b"[" * 100_000)], "has a json file that cannot be read"),
        (
            [("bad.jpg", b"1"), ("bad.json", {"kind": 1})],
            "has a json file without 'label' or 'cls'; set data.label_col",
        ),
        ([("bad.jpg", b"1"), ("bad.json", [1])], "has a json file without 'label'"),
        ([("bad.jpg", b"1"), ("bad.json", {"label": 1.5})], "has the label 1.5, which is neither"),
        ([("bad.jpg", b"1"), ("bad.json", {"label": True})], "has the label True, which is neither"),
        ([("bad.jpg", b"1"), ("bad.json", {"label": None})], "has the label None, which is neither"),
        ([("bad.jpg", b"1"), ("bad.json", {"label": [1]})], "has the label"),
    ],
)
def test_a_faulty_sample_is_set_aside_and_all_others_are_used(tmp_path, members, message):
    write(tmp_path, "train-0.tar", *GOOD)
    write(tmp_path, "train-1.tar", *sample("fine", 0), *members)
    source = source_of(tmp_path)
    assert labels_of(source) == {"good": "1", "fine": "0"}
    (row,) = source.set_aside("train").to_pylist()
    assert (row["sample_id"], row["label"], row["location"]) == (f"train-1.tar:{members[0][0]}", -1, "train-1.tar")
    assert row["reason"].startswith("the sample 'bad' cannot be used: ")
    assert message in row["reason"]
    write(tmp_path, "train-0.tar")
    write(tmp_path, "train-1.tar", *members)
    with pytest.raises(
        UserError, match=rf"hold no samples that can be used; the first one is train-1\.tar:bad.*{message}"
    ):
        source_of(tmp_path).listing("train")


def test_a_sample_whose_files_do_not_follow_each_other_is_used_once(tmp_path):
    write(tmp_path, "train-0.tar", *sample("a", 1), *sample("other", 0), *sample("a", 0))
    source = source_of(tmp_path)
    assert labels_of(source) == {"a": "1", "other": "0"}
    assert "occurs twice, or its files are not in sequence" in source.set_aside("train")["reason"][0].as_py()


@pytest.mark.parametrize("extension", ["bmp", "tif", "gif", "ppm"])
def test_other_images_that_the_decoder_reads_are_taken_unless_the_sample_has_a_usual_one(tmp_path, extension):
    write(tmp_path, "train-0.tar", (f"a.{extension}", b"image"), *sample("b", 1, b"usual"), (f"b.{extension}", b"other"),
          ("a.cls", "0"))  # fmt: skip
    write(tmp_path, "train-1.tar", (f"c.{extension}", b"image"), ("c.cls", "0"))
    source = source_of(tmp_path)
    images = dict(
        zip(source.listing("train")["sample_id"].to_pylist(), source.read(source.listing("train")), strict=True)
    )
    assert images == {"b": b"usual", "c": b"image"}
    assert "has no label" in source.set_aside("train")["reason"][0].as_py()  # its files do not follow each other


def test_images_whose_names_have_further_dots_are_set_aside_with_the_rule(tmp_path):
    mask = ("d.seg.png", b"mask")  # another file of the sample d, not a sample of its own
    write(tmp_path, "train-0.tar", *sample("x/a.v2", 1), *sample("b", 0), *sample("c", 0), *sample("c.v2", 1), *sample("d", 1),
          mask, ("e.v2.jpg", b"1"), ("e.cls", "1"))  # fmt: skip
    source = source_of(tmp_path)
    assert labels_of(source) == {"b": "0", "c": "0", "d": "1"}
    aside = dict(zip(*(source.set_aside("train")[name].to_pylist() for name in ("sample_id", "reason")), strict=True))
    assert list(aside) == ["train-0.tar:x/a.v2.jpg", "train-0.tar:c.v2.jpg", "train-0.tar:e.v2.jpg"]
    assert "its key ends at the first dot (WebDataset's rule); rename it to 'x/a_v2.jpg'" in next(iter(aside.values()))


def test_where_all_names_have_dots_the_error_says_so(tmp_path):
    write(tmp_path, "train-0.tar", *sample("photo.0001", 0), *sample("photo.0002", 1))
    with pytest.raises(
        UserError, match=r"photo\.0001\.jpg: its key ends at the first dot.*rename it to 'photo_0001\.jpg'"
    ):
        source_of(tmp_path).listing("train")


def test_a_val_label_whose_training_samples_were_set_aside_names_one_of_them(tmp_path):
    write(tmp_path, "train-0.tar", *sample("a", 0), *sample("b.v2", 1))
    write(tmp_path, "val-0.tar", *sample("c", 1))
    with pytest.raises(
        UserError, match=r"'1' is not in the training split.* \(1 of its samples cannot be used: .*b\.v2\.jpg"
    ):
        source_of(tmp_path).listing("test")


@pytest.mark.parametrize(("train", "val"), [(1, 2), (3, 0), ("cat", "dog"), ("cat", 1), (1, "cat")])
def test_a_val_label_that_train_does_not_have_is_named(tmp_path, train, val):
    write(tmp_path, "train-0.tar", *sample("a", train))
    write(tmp_path, "val-0.tar", *sample("v", train), *sample("bad", val))
    with pytest.raises(UserError, match=rf"val-0\.tar, sample 'bad': the label '{val}' "):
        source_of(tmp_path).listing("test")


@pytest.mark.parametrize("length", [0, 700, 1024, 1500, 2048])
def test_a_cut_shard_is_named(tmp_path, named, length):
    write(tmp_path, "train-0.tar", *GOOD)
    (tmp_path / "train-1.tar").write_bytes(tar_of([("a.jpg", b"1"), ("a.cls", b"1")])[:length])
    with pytest.raises(UserError, match=r"train-1\.tar is damaged: .* it is cut.*Download"):
        source_of(named(tmp_path)).listing("train")


def test_names_that_lead_outside_are_only_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "train-0.tar", *sample("../../x", 0), *sample("/etc/y", 0))
    source = source_of(tmp_path)
    assert source.listing("train")["sample_id"].to_pylist() == ["../../x", "/etc/y"]
    assert source.read(source.listing("train")) == [b"jpeg", b"jpeg"]
    assert os.listdir(tmp_path) == ["train-0.tar"]


def test_an_actor_reads_without_its_own_index(tmp_path, named, monkeypatch):
    write(tmp_path, "train-0.tar", *sample("a", 0, b"A"))
    source = source_of(named(tmp_path))
    table = source.listing("train")
    copy = pickle.loads(pickle.dumps(source))
    monkeypatch.setattr("distill_at_scale.data.archives.tar.members", None)
    assert copy.read(table) == [b"A"]


def test_the_digest_depends_on_the_content_and_not_on_the_path(tmp_path):
    def digest_of(name, *members):
        write(tmp_path / name, "train-0.tar", *members)
        return source_of(tmp_path / name).digest("train")

    first = digest_of("a", *sample("a", 0), *sample("b", 1))
    assert digest_of("b", *sample("a", 0), *sample("b", 1)) == first
    others = [
        sample("a", 1) + sample("b", 0),
        sample("a", 0) + sample("c", 1),
        sample("a", 0, b"larger") + sample("b", 1),
    ]
    assert len({first, *(digest_of(f"o{i}", *other) for i, other in enumerate(others))}) == 4


def test_many_shards_are_read_in_order_by_any_number_of_threads(tmp_path, named):
    for i in range(60):
        write(tmp_path, f"train-{i:03d}.tar", *[pair for j in range(3) for pair in sample(f"{i:03d}{j}", j)])
    table = source_of(named(tmp_path)).listing("train")
    assert table["sample_id"].to_pylist() == [f"{i:03d}{j}" for i in range(60) for j in range(3)]


def test_imagenette_in_shards_equals_its_folders(shared_data, tmp_path):
    folder = shared_data / "imagenette"
    folders = ImageFolder(DataSection(source="imagefolder", path=str(folder)))
    table = folders.listing("train")
    labels, ids = table["label"].to_numpy(), table["sample_id"].to_pylist()
    chosen = np.concatenate([np.flatnonzero(labels == c)[:20] for c in range(len(folders.class_names))])
    for shard, part in enumerate(np.array_split(np.random.default_rng(0).permutation(chosen), 4)):
        files = [
            ((ids[i].removesuffix(".JPEG")), (folder / ids[i]).read_bytes(), folders.class_names[labels[i]])
            for i in part
        ]
        pairs = [((f"{key}.jpg", raw), (f"{key}.json", {"label": name})) for key, raw, name in files]
        write(tmp_path, f"imagenette-train-{shard:04d}.tar", *[pair for both in pairs for pair in both])
    source = source_of(tmp_path / "imagenette-train-{0000..0003}.tar")
    table = source.listing("train")
    assert source.class_names == folders.class_names
    assert sorted(f"{key}.JPEG" for key in table["sample_id"].to_pylist()) == sorted(ids[i] for i in chosen)
    expected = {ids[i]: (labels[i], (folder / ids[i]).read_bytes()) for i in chosen}
    for key, label, raw in zip(
        table["sample_id"].to_pylist(), table["label"].to_pylist(), source.read(table), strict=True
    ):
        assert (label, raw) == expected[f"{key}.JPEG"]


def test_shards_on_a_real_s3_server_are_those_on_the_disk(s3, tmp_path):
    for i in range(3):
        write(
            tmp_path,
            f"train-{i:02d}.tar",
            *[pair for j in range(40) for pair in sample(f"{i}x{j}", j % 3, bytes(900 * j))],
        )
    write(tmp_path, "val-00.tar", *sample("v", 1))
    s3.upload(tmp_path, "webdataset", "set/")
    local = source_of(tmp_path)
    for path in (s3("webdataset/set"), s3("webdataset/set/{train-{00..02},val-00}.tar")):
        remote = source_of(path)
        assert (remote.splits(), remote.class_names) == (local.splits(), local.class_names)
        assert [remote.digest(split) for split in remote.splits()] == [local.digest(split) for split in local.splits()]
        table = remote.listing("train").take(np.random.default_rng(0).permutation(120))
        assert remote.read(table) == local.read(table)
    with pytest.raises(UserError, match=r"s3://webdataset/set/train-03\.tar is missing"):
        source_of(s3("webdataset/set/train-{00..03}.tar")).splits()
