"""WebDataset shards: their samples, all ways to name them, and faults, named with shard and sample."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.base import LISTING
from distill_at_scale.data.sources.folders import ImageFolder
from distill_at_scale.data.sources.image.webdataset import WebDataset, expand
from distill_at_scale.storage.filesystem import Store


def tar_of(members):
    """A tar of (name, bytes) pairs, which may repeat."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write(root, shard, *members):
    """A shard of (name, content) pairs; content is bytes, text, or an object for a json file."""
    raw = [
        (n, c if isinstance(c, bytes) else c.encode() if isinstance(c, str) else json.dumps(c).encode())
        for n, c in members
    ]
    (root / shard).parent.mkdir(parents=True, exist_ok=True)
    (root / shard).write_bytes(tar_of(raw))


def sample(key, label, image=b"jpeg"):
    return [(f"{key}.jpg", image), (f"{key}.cls", str(label))]


def source_of(path, **keys):
    """A source; a URI stands for remote storage, also where it leads to this disk."""
    source = WebDataset(DataSection(source="webdataset", path=str(path), **keys))
    source.store.local = "://" not in str(path)
    return source


def labels_of(source, split="train"):
    """{id: class name}"""
    table = source.listing(split)
    return {
        i: source.class_names[label]
        for i, label in zip(table["sample_id"].to_pylist(), table["label"].to_pylist(), strict=True)
    }


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


@pytest.mark.parametrize(
    ("shard", "split"),
    [
        ("train-000000.tar", "train"),
        ("imagenet1k-train-0000.tar", "train"),
        ("imagenet1k-validation-00.tar", "test"),
        ("imagenet_val_00.tar", "test"),
        ("val/000.tar", "test"),
        ("sets/validation/part/000.tar", "test"),
        ("train/test-pattern.tar", "test"),
        ("test-00.tar", "test"),
        ("eval-00.tar", "test"),
        ("training-00.tar", "train"),
    ],
)
def test_the_split_is_a_word_of_the_name_or_of_the_folder(tmp_path, shard, split):
    write(tmp_path, "train-a.tar", *sample("a", 0))
    write(tmp_path, shard, *sample("x", 0))
    assert "x" in source_of(tmp_path).listing(split)["sample_id"].to_pylist()


def test_a_shard_that_names_no_split_is_training_data_unless_others_say_so(tmp_path):
    write(tmp_path, "latest-contrained-00.tar", *sample("a", 0))
    write(tmp_path, "test-00.tar", *sample("b", 0))
    source = source_of(tmp_path)
    assert [source.listing(split)["sample_id"].to_pylist() for split in source.splits()] == [["a"], ["b"]]
    write(tmp_path, "train-00.tar", *sample("c", 0))
    with pytest.raises(UserError, match=r"latest-contrained-00\.tar: the name does not say whether"):
        source_of(tmp_path).splits()


def test_val_takes_precedence_over_test(tmp_path):
    for split in ("train", "val", "test"):
        write(tmp_path, f"{split}-0.tar", *sample(split, 0))
    assert source_of(tmp_path).listing("test")["sample_id"].to_pylist() == ["val"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a-{8..11}.tar", ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]),
        ("{000..002}", ["000", "001", "002"]),
        ("{8..010}", ["008", "009", "010"]),
        ("{train,val}-{0..1}", ["train-0", "train-1", "val-0", "val-1"]),
        ("{train-{0..1},val-{00..01}}.tar", ["train-0.tar", "train-1.tar", "val-00.tar", "val-01.tar"]),
        ("a{,b{1,2}}", ["a", "ab1", "ab2"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_patterns_stand_for_names(pattern, names):
    assert expand(pattern) == names


@pytest.mark.parametrize(
    "pattern", ["a{0..", "a}0", "{a}", "{5..3}", "{a..c}", "{}", "{0..9999999999}", "{0..9999}{0..9999}"]
)
def test_patterns_that_make_no_sense_are_named(pattern):
    with pytest.raises(UserError, match=r"the pattern .* in data\.path cannot be read"):
        expand(pattern)


def test_a_pattern_takes_only_the_shards_it_names(tmp_path, named):
    for i in range(4):
        write(tmp_path, f"sets/train-{i:03d}.tar", *sample(f"t{i}", i))
        write(tmp_path, f"sets/val-{i:02d}.tar", *sample(f"v{i}", i))
    source = source_of(named(tmp_path / "sets" / "{train-{000..002},val-{00..01}}.tar"))
    assert source.listing("train")["sample_id"].to_pylist() == ["t0", "t1", "t2"]
    assert source.listing("test")["sample_id"].to_pylist() == ["v0", "v1"]
    assert source.listing("train")["location"][0].as_py() == "train-000.tar"


def test_a_pattern_over_folders_has_its_root_above_them(tmp_path, named):
    write(tmp_path, "train/0.tar", *sample("t", 0))
    write(tmp_path, "val/0.tar", *sample("v", 0))
    source = source_of(named(tmp_path / "{train,val}" / "{0..0}.tar"))
    assert source.shards["train"].keys() | source.shards["test"].keys() == {"train/0.tar", "val/0.tar"}


def test_a_single_shard_can_be_named(tmp_path, named):
    write(tmp_path, "x.tar", *sample("a", 0))
    assert labels_of(source_of(named(tmp_path / "x.tar"))) == {"a": "0"}


@pytest.mark.parametrize(
    ("path", "root", "first"),
    [
        ("s3://b/f/t-{0..1}.tar?region=x&scheme=http", "s3://b/f?region=x&scheme=http", "t-0.tar"),
        ("s3://b/{a,b}/t.tar?region=x", "s3://b?region=x", "a/t.tar"),
        ("file:///t-{0..1}.tar", "file:///", "t-0.tar"),
        ("/t-{0..1}.tar", "/", "t-0.tar"),
        ("t-{0..1}.tar", ".", "t-0.tar"),
        ("~/f/t-{0..1}.tar", "~/f", "t-0.tar"),
    ],
)
def test_the_root_of_a_pattern_keeps_the_options_of_its_address(path, root, first, monkeypatch):
    monkeypatch.setattr(Store, "check", lambda self: None)  # nothing lies there
    source = WebDataset(DataSection(source="webdataset", path=path))
    assert source.store.path == root
    assert source.named_shards[0] == first
    assert source.config.path == path


def test_a_missing_shard_of_a_pattern_is_named(tmp_path, named):
    write(tmp_path, "train-0.tar", *sample("a", 0))
    with pytest.raises(UserError, match=r"train-1\.tar is missing; download it, or correct"):
        source_of(named(tmp_path / "train-{0..2}.tar")).splits()


def test_compressed_shards_are_refused(tmp_path):
    write(tmp_path, "train-0.tar", *sample("a", 0))
    for name in ("train-1.tar.gz", "train-1.tgz", "train-1.tar.zst"):
        (tmp_path / name).write_bytes(b"\x1f\x8b")
        with pytest.raises(UserError, match=rf"{name} is compressed.*unpack"):
            source_of(tmp_path).splits()
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="is compressed"):
        source_of(tmp_path / "train-{0..1}.tar.gz").splits()


def test_a_compressed_shard_under_a_plain_name_is_refused(tmp_path):
    (tmp_path / "train-0.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(UserError, match=r"train-0\.tar is compressed \(gzip\)"):
        source_of(tmp_path).listing("train")


def test_a_missing_path_folder_or_training_shard_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data\.path is not set"):
        WebDataset(DataSection(source="webdataset"))
    with pytest.raises(UserError, match="no such folder"):
        source_of(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such folder"):
        source_of(tmp_path / "nowhere" / "train-{0..1}.tar")
    with pytest.raises(UserError, match="holds no training shards"):
        source_of(tmp_path).splits()
    write(tmp_path, "train-0.tar", ("README", "words"))
    with pytest.raises(UserError, match="hold no samples"):
        source_of(tmp_path).listing("train")


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


def test_unused_splits_are_noted(tmp_path):
    for split in ("train", "val", "test"):
        write(tmp_path, f"{split}-0.tar", *sample(split, 0))
    (line,) = source_of(tmp_path).notes()
    assert line.startswith("val-0.tar is the test split; not used: test-0.tar")


def test_numbered_shards_are_complete_and_occur_once_unless_a_pattern_chooses_some(tmp_path):
    write(tmp_path, "train-00000-of-00002.tar", *sample("a", 0))
    with pytest.raises(UserError, match=r"train-00001-of-00002\.tar is missing"):
        source_of(tmp_path).splits()
    assert labels_of(source_of(tmp_path / "train-{00000..00000}-of-00002.tar")) == {"a": "0"}
    write(tmp_path, "more/train-00000-of-00002.tar", *sample("b", 0))
    with pytest.raises(
        UserError, match=r"more/train-00000-of-00002\.tar and .*/train-00000-of-00002\.tar are parts of two"
    ):
        source_of(tmp_path).splits()


def test_a_name_among_numbers_and_a_number_among_names_are_distinguished(tmp_path):
    write(tmp_path, "train-0.tar", *sample("a", "dog"), *sample("b", 3))
    with pytest.raises(
        UserError, match=r"sample 'b': the label '3' is a number, but the first one of the split is a name"
    ):
        source_of(tmp_path).listing("train")


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


def test_a_set_without_training_shards_is_named_without_its_credentials(tmp_path):
    write(tmp_path, "test-0.tar", *sample("a", 0))
    source = source_of(tmp_path)
    source.config = source.config.model_copy(update={"path": "s3://KEYID:sec/ret@bucket/x"})
    with pytest.raises(UserError, match=r"^s3://bucket/x holds no training shards"):
        source.splits()
