"""ImageNet's two archives, read in place: ids and labels equal the unpacked folders', and damage is an error."""

from __future__ import annotations

import io
import os
import pickle
import tarfile

import numpy as np
import pytest

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.base import LISTING
from distill_at_scale.data.sources.folders import ImageFolder
from distill_at_scale.data.sources.image import imagenet
from distill_at_scale.data.sources.image.imagenet import TRAIN, VAL, ImagenetTar

IMAGES = {
    "n02": {"n02_7.JPEG": b"seven" * 300, "n02_3.JPEG": b"three"},
    "n01": {"n01_1.JPEG": b"one"},
    "n03": {"n03_5.JPEG": b"five", "n03_6.JPEG": b"six" * 999, "n03_8.JPEG": b"eight"},
}
VALIDATION = {f"ILSVRC2012_val_0000000{i}.JPEG": b"v%d" % i for i in (1, 2, 3)}


def tar_of(contents):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in dict(contents).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def train_tar(images):
    return tar_of({f"{wnid}.tar": tar_of(files) for wnid, files in images.items()})


def source_of(root):
    """A source; a URI stands for remote storage, also where it leads to this disk."""
    source = ImagenetTar(DataSection(source="imagenet_tar", path=str(root)))
    source.store.local = "://" not in str(root)
    return source


@pytest.fixture(params=["local", "uri"])
def root(request, tmp_path):
    """The folder with both archives, as a path or as a URI (the way of remote storage)."""
    (tmp_path / TRAIN).write_bytes(train_tar(IMAGES))
    (tmp_path / VAL).write_bytes(tar_of(VALIDATION))
    return tmp_path if request.param == "local" else tmp_path.as_uri()


@pytest.fixture
def calls(monkeypatch):
    """Replaces `val_labels` by one that returns 2, 1, 0, 2, 1, …; the arguments of its calls."""
    calls = []

    def val_labels(store, config, file_names, class_names):
        calls.append((store.path, config.source, list(file_names), list(class_names)))
        return [2 - i % 3 for i in range(len(file_names))]

    monkeypatch.setattr(imagenet, "val_labels", val_labels)
    return calls


def test_ids_labels_and_places_are_those_of_the_unpacked_folders(root):
    source = source_of(root)
    table = source.listing("train")
    assert table.schema == LISTING
    assert source.class_names == ["n01", "n02", "n03"]
    expected = {f"train/{wnid}/{name}": label for label, wnid in enumerate(sorted(IMAGES)) for name in IMAGES[wnid]}
    assert dict(zip(table["sample_id"].to_pylist(), table["label"].to_pylist(), strict=True)) == expected
    assert set(table["location"].to_pylist()) == {TRAIN}
    assert np.all(np.diff(table["row"].to_numpy()) > 0)
    assert [len(b) for b in source.read(table)] == table["size"].to_pylist()


def test_the_bytes_are_read_in_any_order(root):
    source = source_of(root)
    table = source.listing("train").take([5, 0, 3, 3])
    contents = {f"train/{wnid}/{name}": raw for wnid, files in IMAGES.items() for name, raw in files.items()}
    assert source.read(table) == [contents[i] for i in table["sample_id"].to_pylist()]


def test_val_gets_its_labels_from_the_list(root, calls):
    source = source_of(root)
    table = source.listing("test")
    assert source.splits() == ["train", "test"]
    assert table["sample_id"].to_pylist() == [f"val/{name}" for name in VALIDATION]
    assert table["label"].to_pylist() == [2, 1, 0]
    assert calls == [(str(root), "imagenet_tar", list(VALIDATION), ["n01", "n02", "n03"])]
    assert source.read(table) == list(VALIDATION.values())


def test_the_lists_that_go_with_the_folders_label_the_archive_too(tmp_path):
    pytest.importorskip("distill_at_scale.data.sources.image.imagenet", reason="the source imagenet is not here")
    wnids = ["n00000001", "n00000002"]
    (tmp_path / TRAIN).write_bytes(train_tar({wnid: {f"{wnid}_1.JPEG": b"x"} for wnid in wnids}))
    (tmp_path / VAL).write_bytes(tar_of(VALIDATION))
    rows = [f"{name.removesuffix('.JPEG')},{wnids[i % 2]} 1 2 3 4" for i, name in enumerate(VALIDATION)]
    (tmp_path / "LOC_val_solution.csv").write_text(
        "\n".join(["ImageId,PredictionString", *reversed(rows)]), encoding="utf-8"
    )
    assert source_of(tmp_path).listing("test")["label"].to_pylist() == [0, 1, 0]
    (tmp_path / "LOC_val_solution.csv").unlink()
    with pytest.raises(UserError, match="no list"):
        source_of(tmp_path).listing("test")


def test_without_the_val_archive_there_is_only_train(root, tmp_path):
    (tmp_path / VAL).unlink()
    assert source_of(root).splits() == ["train"]


def test_an_actor_reads_without_its_own_index(root, monkeypatch):
    source = source_of(root)
    table = source.listing("train")
    copy = pickle.loads(pickle.dumps(source))
    monkeypatch.setattr("distill_at_scale.data.archives.tar.members", None)
    assert copy.read(table.slice(0, 1)) == source_of(root).read(table.slice(0, 1)) == [IMAGES["n02"]["n02_7.JPEG"]]


def test_the_digest_depends_on_the_content_and_not_on_the_path(tmp_path, calls):
    digests = []
    for name, images in [("a", IMAGES), ("b", IMAGES), ("c", {**IMAGES, "n01": {"n01_2.JPEG": b"one"}})]:
        (tmp_path / name).mkdir()
        (tmp_path / name / TRAIN).write_bytes(train_tar(images))
        (tmp_path / name / VAL).write_bytes(tar_of(VALIDATION))
        digests.append([source_of(tmp_path / name).digest(split) for split in ("train", "test")])
    (a, va), (b, vb), (c, vc) = digests
    assert a == b != c
    assert va == vb == vc != a


def test_hidden_and_other_files_are_not_images(tmp_path):
    inner = tar_of({"./n01_1.JPEG": b"1", "._n01_1.JPEG": b"mac", "list.txt": b"text"})
    (tmp_path / TRAIN).write_bytes(tar_of({"._n01.tar": b"mac", "./n01.tar": inner}))
    assert source_of(tmp_path).listing("train")["sample_id"].to_pylist() == ["train/n01/n01_1.JPEG"]


def test_names_that_lead_outside_are_only_ids(tmp_path, calls, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / TRAIN).write_bytes(tar_of({"n01.tar": tar_of({"../../x.JPEG": b"1", "/abs.JPEG": b"2"})}))
    (tmp_path / VAL).write_bytes(tar_of({"../../y.JPEG": b"3"}))
    source = source_of(tmp_path)
    assert source.listing("train")["sample_id"].to_pylist() == ["train/n01/../../x.JPEG", "train/n01//abs.JPEG"]
    assert source.read(source.listing("train")) == [b"1", b"2"]
    assert source.listing("test")["sample_id"].to_pylist() == ["val/y.JPEG"]
    assert sorted(os.listdir(tmp_path)) == [TRAIN, VAL]


def test_a_missing_archive_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"{TRAIN} is missing; data.path must be"):
        source_of(tmp_path)
    with pytest.raises(UserError, match=r"data\.path is not set"):
        ImagenetTar(DataSection(source="imagenet_tar"))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.7])
def test_an_archive_cut_anywhere_is_refused(tmp_path, share):
    raw = train_tar(IMAGES)
    (tmp_path / TRAIN).write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(UserError, match=rf"{TRAIN} is damaged: .* it is cut.*Download"):
        source_of(tmp_path).listing("train")


def test_a_cut_val_archive_is_refused(tmp_path, calls):
    (tmp_path / TRAIN).write_bytes(train_tar(IMAGES))
    (tmp_path / VAL).write_bytes(tar_of(VALIDATION)[:2000])
    with pytest.raises(UserError, match=rf"{VAL} is damaged"):
        source_of(tmp_path).listing("test")


def test_a_damaged_inner_archive_names_archive_and_byte(root, tmp_path):
    raw = bytearray(train_tar(IMAGES))
    place = raw.index(b"n03_6.JPEG")
    raw[place] ^= 1
    (tmp_path / TRAIN).write_bytes(bytes(raw))
    with pytest.raises(UserError, match=rf"{TRAIN} is damaged: there is no valid header at byte {place:,}"):
        source_of(root).listing("train")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("n01_1.JPEG", b"1")], "holds 'n01_1.JPEG'; it must be a tar of one tar of images per class"),
        ([], "is empty"),
        ([("n01.tar", tar_of({}))], "n01.tar at byte 512 holds no images"),
        ([("n01.tar", tar_of({"a.JPEG": b"1"}))] * 2, "holds 'n01.tar' twice"),
        ([("n01.tar", b"\x1f\x8b" + bytes(2000))], "is compressed"),
    ],
    ids=["flat", "empty", "empty-class", "twice", "gz"],
)
def test_another_layout_is_refused(tmp_path, members, message):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (tmp_path / TRAIN).write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match=message):
        source_of(tmp_path).listing("train")


def test_an_image_twice_is_refused(tmp_path):
    first = tar_of({"n01_1.JPEG": b"1"})[:1024]
    (tmp_path / TRAIN).write_bytes(tar_of({"n01.tar": first + tar_of({"n01_1.JPEG": b"1"})}))
    with pytest.raises(UserError, match=r"'train/n01/n01_1.JPEG' occurs twice"):
        source_of(tmp_path).listing("train")


def test_imagenette_packed_the_official_way_equals_its_folders(shared_data, tmp_path, monkeypatch):
    folder = shared_data / "imagenette"
    wnids = sorted(p.name for p in (folder / "train").iterdir())
    images = {w: {p.name: p.read_bytes() for p in sorted((folder / "train" / w).iterdir())[:20]} for w in wnids}
    val = {p.name: p for w in wnids for p in sorted((folder / "val" / w).iterdir())[:5]}
    (tmp_path / TRAIN).write_bytes(train_tar({w: images[w] for w in reversed(wnids)}))
    (tmp_path / VAL).write_bytes(tar_of({name: path.read_bytes() for name, path in sorted(val.items())}))

    def val_labels(store, config, file_names, class_names):
        return [class_names.index(val[name].parent.name) for name in file_names]

    monkeypatch.setattr(imagenet, "val_labels", val_labels)
    folders, archives = ImageFolder(DataSection(source="imagefolder", path=str(folder))), source_of(tmp_path)
    assert archives.class_names == folders.class_names
    table, expected = archives.listing("train"), by_id(folders, "train")
    assert table.num_rows == 200
    for key, label, raw in zip(
        table["sample_id"].to_pylist(), table["label"].to_pylist(), archives.read(table), strict=True
    ):
        assert (label, raw) == (expected[key], (folder / key).read_bytes())
    table, expected = archives.listing("test"), by_id(folders, "test")
    for key, label in zip(table["sample_id"].to_pylist(), table["label"].to_pylist(), strict=True):
        name = key.removeprefix("val/")
        assert label == expected[f"val/{val[name].parent.name}/{name}"]


def by_id(source, split):
    table = source.listing(split)
    return dict(zip(table["sample_id"].to_pylist(), table["label"].to_pylist(), strict=True))


def test_archives_on_a_real_s3_server_are_those_on_the_disk(s3, tmp_path, calls):
    (tmp_path / TRAIN).write_bytes(train_tar(IMAGES))
    (tmp_path / VAL).write_bytes(tar_of(VALIDATION))
    s3.upload(tmp_path, "archives", "set/")
    local, remote = source_of(tmp_path), source_of(s3("archives/set"))
    assert remote.splits() == ["train", "test"]
    for split in remote.splits():
        assert remote.digest(split) == local.digest(split)
        assert remote.read(remote.listing(split)) == local.read(local.listing(split))
    with pytest.raises(UserError, match="no such folder"):
        source_of(s3("archives/elsewhere"))
