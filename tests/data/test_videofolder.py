"""Folders of videos by class: every layout, skipped files, damage, and the join of lists and files that others share."""

from __future__ import annotations

import pyarrow as pa
import pytest

from distill_at_scale.config import load as configuration
from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.data.sources.base import LISTING, SET_ASIDE
from distill_at_scale.data.sources.media import VIDEO_EXTENSIONS
from distill_at_scale.data.sources.video.base import FILES, ROWS, join_rows


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def videos(root, **keys):
    return SOURCES["videofolder"](DataSection(source="videofolder", path=str(root), frames=4, **keys))


def aside(source, split):
    table = source.set_aside(split)
    assert table.schema == SET_ASIDE
    return {row["sample_id"]: (row["label"], row["reason"]) for row in table.to_pylist()}


def list_all(root):
    source = videos(root)
    return [source.listing(split) for split in source.splits()]


def plan(root, **data):
    data = {"source": "videofolder", "path": str(root), "frames": 4, **data}
    return ingest.plan(configuration.validate({"data": data}))


def ids(table):
    return table["sample_id"].to_pylist()


def test_ids_are_posix_paths_with_the_split_and_classes_are_sorted(tmp_path):
    touch(tmp_path, "train/run far/2.mp4", "train/hop/deep/1.WEBM", "train/hop/0.avi", "val/hop/9.mkv")
    source = videos(tmp_path)
    assert source.class_names == ["hop", "run far"]
    assert source.splits() == ["train", "test"]
    table = source.listing("train")
    assert table.schema == LISTING
    assert ids(table) == ["train/hop/0.avi", "train/hop/deep/1.WEBM", "train/run far/2.mp4"]
    assert table["label"].to_pylist() == [0, 0, 1]
    assert table["size"].to_pylist() == [15, 21, 19]
    assert ids(source.listing("test")) == ["val/hop/9.mkv"]
    assert source.read(table)[2] == b"train/run far/2.mp4"
    assert aside(source, "train") == aside(source, "test") == {}


@pytest.mark.parametrize("extension", VIDEO_EXTENSIONS)
def test_every_ending_of_a_video_is_known(tmp_path, extension):
    touch(tmp_path, f"train/a/x{extension}", f"train/a/y{extension.upper()}")
    assert videos(tmp_path).listing("train").num_rows == 2


def test_files_that_are_not_videos_are_set_aside_with_their_class_and_hidden_ones_are_not(tmp_path):
    touch(tmp_path, "train/a/0.mp4", "train/a/clip.mp4.part", "train/b/clip.jpg", "train/b/1.mp4", "train/b/clip")
    touch(
        tmp_path, "train/b/.hidden.txt", "train/.cache/x.txt", "train/labels.csv", "train/b/README", "train/loose.mp4"
    )
    touch(tmp_path, "val/a/2.gif", "val/a/2.ts")
    source = videos(tmp_path)
    assert ids(source.listing("train")) == ["train/a/0.mp4", "train/b/1.mp4"]
    assert aside(source, "train") == {
        "train/a/clip.mp4.part": (0, "a download that was not finished; finish it, or remove the file"),
        "train/b/clip.jpg": (1, "no video by its name, which ends in '.jpg'; rename or remove the file"),
        "train/b/clip": (1, "no video by its name, which has no ending; rename or remove the file"),
        "train/loose.mp4": (-1, "a video in no class folder; move it into one"),
    }
    assert aside(source, "test") == {
        "val/a/2.gif": (0, "no video by its name, which ends in '.gif'; rename or remove the file")
    }
    result = plan(tmp_path, classes=["a"])
    assert ids(result.aside["train"]) == ["train/a/clip.mp4.part", "train/loose.mp4"]
    assert result.known == 2 + 3


def test_an_empty_video_stays_in_the_listing(tmp_path):
    touch(tmp_path, "train/a/0.mp4")
    (tmp_path / "train/a/1.mp4").write_bytes(b"")
    source = videos(tmp_path)
    assert source.listing("train")["size"].to_pylist() == [13, 0]
    assert aside(source, "train") == {}


def test_class_folders_right_below_the_root_are_training_data(tmp_path):
    touch(tmp_path, "a/0.mp4", "b/1.mp4", "b/x.dat", "test/a/2.mp4", "test/a/y.dat", "labels.csv", "loose.mp4")
    source = videos(tmp_path)
    assert source.class_names == ["a", "b"]
    assert source.splits() == ["train", "test"]
    assert ids(source.listing("train")) == ["a/0.mp4", "b/1.mp4"]
    assert list(aside(source, "train")) == ["b/x.dat", "loose.mp4"]
    assert list(aside(source, "test")) == ["test/a/y.dat"]


def test_a_validation_split_alone_can_be_chosen(tmp_path):
    touch(tmp_path, "val/a/0.mp4", "val/b/1.mp4", "val/b/1.mp4.part", "val/b/1.txt", "val.csv", "annotations/x.csv")
    source = videos(tmp_path)
    assert source.splits() == ["test"]
    assert source.class_names == ["a", "b"]
    with pytest.raises(UserError, match="holds no split 'train', only val"):
        plan(tmp_path)
    result = plan(tmp_path, train_split="val", class_names=None)
    assert ids(result.listings["train"]) == ["val/a/0.mp4", "val/b/1.mp4"]
    assert ids(result.aside["train"]) == ["val/b/1.mp4.part"]


def test_subsets_orders_and_a_held_out_part_work(tmp_path):
    touch(tmp_path, *(f"train/{name}/{i}.mp4" for name in "abc" for i in range(10)))
    (tmp_path / "order.txt").write_text("c\na\nb\n", encoding="utf-8")
    result = plan(tmp_path, classes=["a", "c"], class_names=str(tmp_path / "order.txt"), holdout=0.2)
    assert result.class_names == ["a", "c"]
    assert result.source_class_names == ["c", "a", "b"]
    assert {split: table.num_rows for split, table in result.listings.items()} == {"train": 16, "test": 4}
    assert {(i[6], label) for i, label in zip(ids(result.listings["train"]), result.listings["train"]["label"].to_pylist(),
                                              strict=True)} == {("a", 0), ("c", 1)}  # fmt: skip


def test_the_digest_covers_ids_labels_and_sizes_and_not_the_place(tmp_path):
    for place in ("here", "there"):
        touch(tmp_path / place, "train/a/0.mp4", "train/b/1.mp4", "train/b/notes.txt")
    before = videos(tmp_path / "here").digest("train")
    assert videos(tmp_path / "there").digest("train") == before
    (tmp_path / "there/train/b/1.mp4").write_bytes(b"longer than it was before")
    assert videos(tmp_path / "there").digest("train") != before
    touch(tmp_path / "here", "train/b/2.mp4")
    assert videos(tmp_path / "here").digest("train") != before


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/notes.txt"], "train holds no class folders; the layout is train/<class>/<video>.mp4"),
        (["train/a/notes.txt"], "holds no videos in class folders; the layout is "),
        (
            ["train/a/0.mp4", "train/b/x.jpg"],
            "train/b is missing or holds no video (train/b/x.jpg: no video by its name, which ends in '.jpg'; rename",
        ),
        (["train/a/0.mp4", "val/b/0.mp4"], "val/b is a class that the training split lacks"),
        (["train/a/0.mp4", "val/0.mp4"], "val holds no class folders"),
        (["train.X1/a/0.mp4", "train.X2/a/0.mp4"], "several training folders"),
        (["val/a/0.txt"], "holds no videos in class folders"),
        (["train/a/0.jpg"], "train holds no videos in class folders, but images; set data.source to imagefolder"),
    ],
)
def test_damage_is_one_error(tmp_path, names, message):
    touch(tmp_path, *names)
    with pytest.raises(UserError) as raised:
        list_all(tmp_path)
    assert message in str(raised.value)


def test_an_empty_root_and_a_missing_one_are_errors(tmp_path):
    with pytest.raises(UserError, match="holds no class folders"):
        videos(tmp_path)
    with pytest.raises(UserError, match="there is no such folder"):
        videos(tmp_path / "none")
    with pytest.raises(UserError, match=r"data\.path is not set"):
        SOURCES["videofolder"](DataSection(source="videofolder"))


def test_a_set_on_s3_is_the_set_on_disk(s3, tmp_path):
    touch(tmp_path, "a b/0.mp4", "a b/x.dat", "c/1.mp4", "val/c/2.mp4", "val/c/3.mp4.part", "c/.hidden.txt")
    s3.upload(tmp_path, "videofolder-set", "deep/set/")
    here, there = videos(tmp_path), videos(s3("videofolder-set/deep/set"))
    assert there.class_names == here.class_names
    for split in ("train", "test"):
        assert there.listing(split).equals(here.listing(split))
        assert there.digest(split) == here.digest(split)
        assert there.set_aside(split).equals(here.set_aside(split))
        assert there.set_aside(split).num_rows == 1
    assert there.read(there.listing("train")) == here.read(here.listing("train"))


def test_real_clips_of_the_validation_split(shared_data):
    root = shared_data / "kinetics400"
    result = plan(root, train_split="val")
    assert result.class_names == ["arm wrestling", "bungee jumping"]
    assert result.listings["train"].num_rows == 8
    assert result.aside["train"].num_rows == 0
    source = videos(root)
    assert all(source.read(source.listing("test").slice(0, 2)))


def rows(*entries):
    return pa.Table.from_pylist([dict(zip(ROWS.names, entry, strict=True)) for entry in entries], ROWS)


def files(*paths):
    return pa.table([[p.split(".")[0] for p in paths], list(paths), [len(p) for p in paths]], schema=FILES)


def test_rows_and_files_are_joined_by_their_keys():
    listed = rows(
        ("c", 1, "test", "c.mp4", "line 1"), ("a", 0, "train", "a.mp4", "line 2"), ("x", 0, "train", "x.mp4", "line 3")
    )
    joined = join_rows(listed, files("a.mp4", "a.webm", "b.mp4", "c.mp4", "b.avi"))
    assert joined.used.select(["key", "label", "split", "path", "size"]).to_pylist() == [
        {"key": "c", "label": 1, "split": "test", "path": "c.mp4", "size": 5},
        {"key": "a", "label": 0, "split": "train", "path": "a.mp4", "size": 5},
    ]
    assert joined.missing["place"].to_pylist() == ["line 3"]
    assert joined.spare.select(["path", "instead", "label"]).to_pylist() == [
        {"path": "a.webm", "instead": "a.mp4", "label": 0}
    ]
    assert joined.unlisted["path"].to_pylist() == ["b.mp4", "b.avi"]


def test_a_join_of_nothing_is_nothing():
    joined = join_rows(ROWS.empty_table(), files())
    assert [t.num_rows for t in (joined.used, joined.missing, joined.spare, joined.unlisted)] == [0, 0, 0, 0]
    assert join_rows(rows(("a", 0, "train", "a", "1")), files()).missing.num_rows == 1
    assert join_rows(ROWS.empty_table(), files("a.mp4")).unlisted.num_rows == 1


def test_a_clip_that_is_listed_twice_is_named_with_both_places():
    listed = rows(
        ("a", 0, "train", "a", "'l' line 1"), ("b", 0, "train", "b", "'l' line 2"), ("a", 1, "test", "a", "'m' line 7")
    )
    with pytest.raises(UserError, match="the clip 'a' is listed twice, in 'l' line 1 and 'm' line 7"):
        join_rows(listed, files("a.mp4"))


def test_a_repeated_clip_is_found_among_rows_of_several_chunks():
    listed = pa.concat_tables([rows(("a", 0, "train", "a", "1")), rows(("b", 0, "train", "b", "2"))])
    joined = join_rows(listed, pa.concat_tables([files("b.mp4"), files("a.mp4", "b.avi")]))
    assert joined.used["path"].to_pylist() == ["a.mp4", "b.mp4"]
    assert joined.spare["instead"].to_pylist() == ["b.mp4"]
