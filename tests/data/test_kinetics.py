"""Kinetics from folders: which clips are listed, labelled and set aside, whatever lists and folders look like."""

from __future__ import annotations

import pickle

import pyarrow as pa
import pytest
from kinetics_cases import CLIPS, HEADER, LABELS, TRAIN, VAL, aside, kinetics, labels, put

from distill_at_scale.config import load as configuration
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.sources.base import LISTING, SET_ASIDE

MISSING = ("train/abseiling/gonegonegon_000100_000110.mp4", 0, "listed in train.csv line 5, no file; download it")


@pytest.fixture
def k400(tmp_path):
    return put(tmp_path, {**CLIPS, "train.csv": TRAIN, "val.csv": VAL})


def test_clips_have_the_labels_of_their_list_and_the_rest_is_set_aside(k400):
    source = kinetics(k400)
    assert source.splits() == ["train", "test"]
    assert source.class_names == ["abseiling", "arm wrestling", "petting animal (not cat)"]
    assert labels(source) == LABELS
    assert labels(source, "test") == {"val/abseiling/vvvvvvvvvvv_000003_000013.mp4": 0}
    assert aside(source) == [MISSING]
    assert aside(source, "test") == []
    table = source.listing("train")
    assert table.schema == LISTING
    assert source.set_aside("train").schema == SET_ASIDE
    assert table["size"].to_pylist() == [0, 3, 3]
    assert source.read(table.take(pa.array([2, 0, 1]))) == [b"cat", b"", b"arm"]


def test_the_real_clips_are_listed_from_their_list(shared_data):
    source = kinetics(shared_data / "kinetics400")
    assert source.splits() == ["test"]
    assert source.class_names == ["arm wrestling", "bungee jumping"]
    by_id = labels(source, "test")
    assert len(by_id) == 8
    assert by_id["val/arm wrestling/C4lCVBZ3ux0_000028_000038.mp4"] == 0
    assert by_id["val/bungee jumping/zkXOcxGnUhs_000025_000035.mp4"] == 1
    assert list(by_id.values()) == [0] * 4 + [1] * 4
    assert aside(source, "test") == []
    table = source.listing("test")
    assert list(map(len, source.read(table))) == table["size"].to_pylist()
    assert sum(table["size"].to_pylist()) == 14_738_218


def test_the_real_clips_are_planned_as_training_data_when_val_is_chosen(shared_data, tmp_path):
    data = {"source": "kinetics", "path": str(shared_data / "kinetics400"), "frames": 4, "train_split": "val"}
    plan = ingest.plan(configuration.validate({"run": {"dir": str(tmp_path)}, "data": data}))
    assert {split: table.num_rows for split, table in plan.listings.items()} == {"train": 8}
    data.pop("train_split")
    with pytest.raises(UserError, match=r"holds no split 'train', only val; .*data\.train_split"):
        ingest.plan(configuration.validate({"run": {"dir": str(tmp_path)}, "data": data}))


@pytest.mark.parametrize(
    "flat", ["{split}/{name}", "{name}", "videos/{name}", "{split}_256/{label_}/{name}", "k400/{split}/x/{name}"]
)
def test_other_layouts_give_the_same_labels(tmp_path, flat):
    for path, content in CLIPS.items():
        split, label, name = path.split("/")
        label_ = label.replace(" ", "_").replace("(", "").replace(")", "")
        put(tmp_path, {flat.format(split=split, label_=label_, name=name): content})
    source = kinetics(put(tmp_path, {"train.csv": TRAIN, "val.csv": VAL}))
    assert sorted(labels(source).values()) == [0, 1, 2]
    assert len(labels(source, "test")) == 1
    assert aside(source) == [MISSING]


@pytest.mark.parametrize("folder", ["training dog", "training_dog"])
def test_a_folder_named_like_a_label_is_no_split(tmp_path, folder):
    lists = {
        "train.csv": HEADER + "training dog,ttttttttttt,0,10,train,0\n",
        "val.csv": HEADER + "training dog,vvvvvvvvvvv,0,10,val,0\n",
    }
    source = kinetics(put(tmp_path, {f"{folder}/{c * 11}_0_10.mp4": b"x" for c in "tv"} | lists))
    assert [list(labels(source, split)) for split in source.splits()] == [
        [f"{folder}/ttttttttttt_0_10.mp4"], [f"{folder}/vvvvvvvvvvv_0_10.mp4"]
    ]  # fmt: skip
    assert aside(source) == aside(source, "test") == []


def test_a_test_split_beside_val_is_said_to_be_unused(k400):
    assert kinetics(k400).notes() == []
    put(k400, {"test/lllllllllll_000000_000010.mp4": b"x", "test/mmmmmmmmmmm_000000_000010.mp4": b"x"})
    source = kinetics(k400)
    assert list(labels(source, "test")) == ["val/abseiling/vvvvvvvvvvv_000003_000013.mp4"]
    assert "not used: test (2 clips)" in source.notes()[0]


@pytest.mark.parametrize("folder", ["validate", "validation", "Valid", "VAL_256", "k400_val", "dev", "Evaluation"])
def test_the_folder_of_val_has_many_names(k400, folder):
    (k400 / "val").rename(k400 / folder)
    source = kinetics(k400)
    assert list(labels(source, "test")) == [f"{folder}/abseiling/vvvvvvvvvvv_000003_000013.mp4"]
    (k400 / folder / "abseiling").rename(k400 / folder / "arm wrestling")
    put(k400, {f"{folder}/_dbcJuKJQNs_000000_000010.mp4": b"x"})
    reasons = [reason for *_, reason in aside(kinetics(k400), "test")]
    assert f"in {folder}/, but train.csv line 3 lists it; move the file" in reasons


def test_names_without_padding_are_the_same_clips(k400):
    (k400 / "val/abseiling/vvvvvvvvvvv_000003_000013.mp4").rename(k400 / "val/abseiling/vvvvvvvvvvv_3_13.MP4")
    assert labels(kinetics(k400), "test") == {"val/abseiling/vvvvvvvvvvv_3_13.MP4": 0}


def test_a_folder_that_disagrees_with_the_list_sets_the_clip_aside(k400):
    (k400 / "val/arm wrestling").mkdir()
    (k400 / "val/abseiling/vvvvvvvvvvv_000003_000013.mp4").rename(
        k400 / "val/arm wrestling/vvvvvvvvvvv_000003_000013.mp4"
    )
    name = "val/arm wrestling/vvvvvvvvvvv_000003_000013.mp4"
    reason = "the folder says 'arm wrestling', val.csv line 2 says 'abseiling'; move the file, or correct the list"
    assert aside(kinetics(k400), "test") == [(name, 0, reason)]
    put(k400, {"val/abseiling/vvvvvvvvvvv_000003_000013.mp4": b"right"})
    source = kinetics(k400)
    assert labels(source, "test") == {"val/abseiling/vvvvvvvvvvv_000003_000013.mp4": 0}
    assert aside(source, "test") == [(name, 0, reason)]


def test_files_that_no_list_has_are_set_aside_with_their_reasons(k400):
    put(k400, {
        "train/abseiling/unlistedxxx_000001_000011.mp4": b"x",
        "train/abseiling/holiday.avi": b"x",
        "train/abseiling/gonegonegon_000100_000110.mp4.part": b"x",
        "train/abseiling/gonegonegon_000100_000110.f137.mp4": b"x",
        "val/abseiling/_dbcJuKJQNs_000000_000010.mp4": b"x",
        "train/readme.txt": b"x",
    })  # fmt: skip
    source = kinetics(k400)
    assert labels(source) == LABELS
    assert aside(source) == [
        (
            "train/abseiling/gonegonegon_000100_000110.f137.mp4",
            -1,
            "a download that was not finished; finish it, or remove the file",
        ),
        MISSING,
        (
            "train/abseiling/gonegonegon_000100_000110.mp4.part",
            -1,
            "a download that was not finished; finish it, or remove the file",
        ),
        ("train/abseiling/holiday.avi", -1, "no CSV can list a name that is not <id>_<start>_<end>; rename it"),
        (
            "train/abseiling/unlistedxxx_000001_000011.mp4",
            -1,
            "not listed in any CSV; complete the CSV, or remove the file",
        ),
    ]
    lies = (
        "val/abseiling/_dbcJuKJQNs_000000_000010.mp4",
        0,
        "in val/, but train.csv line 3 lists it; move the file",
    )
    assert aside(source, "test") == [lies]
    (k400 / "train/abseiling/_dbcJuKJQNs_000000_000010.webm").unlink()
    moved = (
        "train/abseiling/_dbcJuKJQNs_000000_000010.mp4",
        0,
        "listed in train.csv line 3, its file is in another split; move it",
    )
    assert moved in aside(kinetics(k400))


def test_replacements_win_over_and_complete_other_files(k400):
    put(k400, {
        "replacement/replacement_for_corrupted_k400/-3B32lodo2M_000028_000038.mp4": b"mended",
        "replacement/replacement_for_corrupted_k400/gonegonegon_000100_000110.mp4": b"found",
    })  # fmt: skip
    source = kinetics(k400)
    table = source.listing("train")
    contents = dict(zip(table["sample_id"].to_pylist(), source.read(table), strict=True))
    assert sorted(contents.values()) == [b"", b"cat", b"found", b"mended"]
    used = "replacement/replacement_for_corrupted_k400/-3B32lodo2M_000028_000038.mp4"
    original = "train/arm wrestling/-3B32lodo2M_000028_000038.mp4"
    assert aside(source) == [(original, 1, f"the same clip as '{used}', which is used; remove one of the two")]
    put(k400, {used: b""})
    assert aside(kinetics(k400)) == [(used, 1, f"the same clip as '{original}', which is used; remove one of the two")]


def test_of_two_files_of_a_clip_the_one_with_bytes_is_used(k400):
    put(
        k400,
        {"train/abseiling/_dbcJuKJQNs_000000_000010.mp4": b"x", "train/abseiling/_dbcJuKJQNs_000000_000010.avi": b""},
    )
    source = kinetics(k400)
    assert "train/abseiling/_dbcJuKJQNs_000000_000010.mp4" in labels(source)
    assert [
        name for name, _, reason in aside(source) if reason.endswith("10.mp4', which is used; remove one of the two")
    ] == [
        "train/abseiling/_dbcJuKJQNs_000000_000010.avi",
        "train/abseiling/_dbcJuKJQNs_000000_000010.webm",
    ]


def test_a_test_list_without_labels_has_no_use_and_with_labels_gives_way_to_val(k400):
    put(
        k400,
        {
            "test/tttttttttt_000001_000011.mp4": b"t",
            "test.csv": "youtube_id,time_start,time_end,split\ntttttttttt,1,11,test\n",
        },
    )
    assert labels(kinetics(k400), "test") == {"val/abseiling/vvvvvvvvvvv_000003_000013.mp4": 0}
    put(k400, {"test.csv": HEADER + "abseiling,tttttttttt,1,11,test,0\n"})
    source = kinetics(k400)
    assert labels(source, "test") == {"val/abseiling/vvvvvvvvvvv_000003_000013.mp4": 0}
    assert (aside(source), aside(source, "test")) == ([MISSING], [])
    (k400 / "val/abseiling/vvvvvvvvvvv_000003_000013.mp4").unlink()
    assert labels(kinetics(k400), "test") == {"test/tttttttttt_000001_000011.mp4": 0}


def test_clips_of_an_unused_test_list_are_known_in_a_flat_folder(tmp_path):
    put(tmp_path, {path.rpartition("/")[2]: content for path, content in CLIPS.items()})
    put(tmp_path, {"tttttttttt_000001_000011.mp4": b"t", "train.csv": TRAIN, "val.csv": VAL})
    put(tmp_path, {"test.csv": "youtube_id,time_start,time_end\ntttttttttt,1,11\n"})
    source = kinetics(tmp_path)
    assert (source.splits(), aside(source), aside(source, "test")) == (["train", "test"], [MISSING], [])


def test_a_list_without_files_makes_no_split(k400):
    (k400 / "val/abseiling/vvvvvvvvvvv_000003_000013.mp4").unlink()
    assert kinetics(k400).splits() == ["train"]


def test_a_folder_without_a_list_is_set_aside(k400):
    (k400 / "val.csv").unlink()
    source = kinetics(k400)
    assert (labels(source), labels(source, "test")) == (LABELS, {})
    assert aside(source, "test") == [
        (
            "val/abseiling/vvvvvvvvvvv_000003_000013.mp4",
            -1,
            "not listed in any CSV; complete the CSV, or remove the file",
        )
    ]


def test_a_label_that_training_lacks_is_one_error(k400):
    put(k400, {"val.csv": VAL.replace("abseiling", "zumba")})
    with pytest.raises(UserError, match=r"val\.csv, line 2: the label 'zumba' does not occur in the training list"):
        kinetics(k400).listing("test")


def test_nothing_that_is_listed_is_one_error(tmp_path):
    put(tmp_path, {"train.csv": TRAIN})
    with pytest.raises(UserError, match=r"holds no clips \(mp4, m4v, mkv.*the layout is train/<label>/"):
        kinetics(tmp_path).splits()
    put(tmp_path, {"train/abseiling/movie.mp4": b"x"})
    with pytest.raises(
        UserError, match=r"none of the 1 clips in .* is listed in .*train\.csv.*first is 'train/abseiling/movie"
    ):
        kinetics(tmp_path).splits()


def test_clips_of_an_unlabelled_test_list_alone_are_one_error(tmp_path):
    put(tmp_path, {"test/tttttttttt_000001_000011.mp4": b"t", "train.csv": TRAIN})
    put(tmp_path, {"test.csv": "youtube_id,time_start,time_end\ntttttttttt,1,11\n"})
    with pytest.raises(UserError, match=r"holds only clips of a test split without labels; add train/ or val/"):
        kinetics(tmp_path).splits()


def test_every_listed_clip_and_every_video_is_somewhere(k400):
    source = kinetics(k400)
    named = [*labels(source), *labels(source, "test"), *(i for s in ("train", "test") for i, *_ in aside(source, s))]
    assert sorted(named) == sorted([*CLIPS, MISSING[0]])


def test_the_digest_follows_labels_and_sizes_and_a_pickle_reads(k400):
    source = kinetics(k400)
    before = source.digest("train")
    assert kinetics(k400).digest("train") == before
    rows = source.listing("train")
    assert pickle.loads(pickle.dumps(source)).read(rows) == source.read(rows)
    assert len(pickle.dumps(source)) < 2000
    put(k400, {"train/abseiling/_dbcJuKJQNs_000000_000010.webm": b"larger"})
    larger = kinetics(k400).digest("train")
    put(k400, {"train.csv": TRAIN.replace("abseiling,_db", "arm wrestling,_db")})
    (k400 / "train/abseiling/_dbcJuKJQNs_000000_000010.webm").rename(k400 / "train/_dbcJuKJQNs_000000_000010.webm")
    assert len({before, larger, kinetics(k400).digest("train")}) == 3


def test_a_set_on_s3_is_the_set_on_disk(s3, k400):
    put(k400, {"train/abseiling/unlistedxxx_000001_000011.mp4": b"x"})
    s3.upload(k400, "kinetics-folders", "deep/k400/")
    here, there = kinetics(k400), kinetics(s3("kinetics-folders/deep/k400"))
    for split in ("train", "test"):
        assert there.listing(split).equals(here.listing(split))
        assert aside(there, split) == aside(here, split)
        assert there.digest(split) == here.digest(split)
        assert there.read(there.listing(split)) == here.read(here.listing(split))


def test_a_list_that_cannot_be_opened_is_one_error(k400):
    (k400 / "val.csv").unlink()
    (k400 / "val.csv").symlink_to(k400 / "nowhere")
    with pytest.raises(UserError, match=r"val\.csv cannot be read \(No such file or directory\); check the file"):
        kinetics(k400).splits()


def test_a_plan_keeps_what_was_set_aside_and_subsets_it(k400, tmp_path):
    put(k400, {"train/abseiling/unlistedxxx_000001_000011.mp4": b"x"})
    data = {
        "source": "kinetics",
        "path": str(k400),
        "frames": 4,
        "classes": ["arm wrestling", "petting animal (not cat)"],
    }
    plan = ingest.plan(configuration.validate({"run": {"dir": str(tmp_path / "run")}, "data": data}))
    assert plan.listings["train"]["label"].to_pylist() == [0, 1]
    assert plan.aside["train"]["reason"].to_pylist() == ["not listed in any CSV; complete the CSV, or remove the file"]
