"""HMDB-51's folders and its lists per class and fold: odd file names, unused clips, skipped files, damage."""

from __future__ import annotations

import pytest

from distill_at_scale.config import load as configuration
from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.data.sources.base import LISTING

ODD = [
    'a b\'s "best" (1)_brush_hair_u_nm_np1_ba_goo_0.avi',
    "#437_[x]&;=+!_brush_hair_f_cm_np1_le_goo_1.avi",
    "ärger 1.avi",
]
FOLDER = "testTrainMulti_7030_splits"
SPLITS = {  # class -> file, the flag in fold 1, in fold 2
    "brush_hair": [(ODD[0], 1, 2), (ODD[1], 2, 1), (ODD[2], 1, 0), ("unused_0.avi", 0, 1)],
    "clap": [("clap_0.avi", 1, 1), ("clap_1.avi", 2, 0)],
}


def put(root, name, content="x"):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content, encoding="utf-8", newline="")


def hmdb(root, home="hmdb51_org", lists=FOLDER):
    for owner, rows in SPLITS.items():
        for name, _, _ in rows:
            put(root, f"{home}/{owner}/{name}")
        for fold in (1, 2):
            put(root, f"{lists}/{owner}_test_split{fold}.txt", "".join(f"{row[0]} {row[fold]} \n" for row in rows))
    return root


def source_of(root, **keys):
    return SOURCES["hmdb51"](DataSection(source="hmdb51", path=str(root), frames=4, **keys))


def aside(source, split):
    return {row["sample_id"]: (row["label"], row["reason"]) for row in source.set_aside(split).to_pylist()}


def ids(table):
    return table["sample_id"].to_pylist()


def plan(root, **data):
    return ingest.plan(configuration.validate({"data": {"source": "hmdb51", "path": str(root), "frames": 4, **data}}))


def test_flags_define_the_splits_and_unused_clips_are_skipped(tmp_path):
    source = source_of(hmdb(tmp_path))
    assert source.class_names == ["brush_hair", "clap"]
    assert source.splits() == ["train", "test"]
    train, test = source.listing("train"), source.listing("test")
    assert train.schema == LISTING
    assert ids(train) == [*(f"hmdb51_org/brush_hair/{ODD[i]}" for i in (0, 2)), "hmdb51_org/clap/clap_0.avi"]
    assert train["label"].to_pylist() == [0, 0, 1]
    assert ids(test) == [f"hmdb51_org/brush_hair/{ODD[1]}", "hmdb51_org/clap/clap_1.avi"]
    assert source.read(train) == [b"x"] * 3
    assert aside(source, "train") == aside(source, "test") == {}


def test_the_fold_picks_the_lists(tmp_path):
    source = source_of(hmdb(tmp_path), fold=2)
    assert ids(source.listing("train")) == [
        f"hmdb51_org/brush_hair/{ODD[1]}",
        "hmdb51_org/brush_hair/unused_0.avi",
        "hmdb51_org/clap/clap_0.avi",
    ]
    assert ids(source.listing("test")) == [f"hmdb51_org/brush_hair/{ODD[0]}"]
    with pytest.raises(UserError, match=r"brush_hair_test_split3\.txt is missing \(data\.fold = 3\)"):
        source_of(tmp_path, fold=3).splits()


@pytest.mark.parametrize("lists", [FOLDER, "test_train_splits", "."])
def test_class_folders_may_be_in_the_root_next_to_the_lists(tmp_path, lists):
    source = source_of(hmdb(tmp_path, ".", lists))
    assert "clap/clap_0.avi" in ids(source.listing("train"))
    assert aside(source, "train") == {}


def test_lists_may_be_next_to_the_root_or_elsewhere(tmp_path):
    hmdb(tmp_path / "set")
    assert ids(source_of(tmp_path / "set" / "hmdb51_org").listing("test"))[1] == "clap/clap_1.avi"
    hmdb(tmp_path / "other", "x", "y/z")
    (tmp_path / "other" / "x").rename(tmp_path / "other" / "hmdb51_org")
    source = source_of(tmp_path / "other", annotations="y/z")
    assert source.listing("train").num_rows == 3
    assert aside(source, "train") == {}


def test_what_has_no_partner_is_set_aside(tmp_path):
    hmdb(tmp_path)
    (tmp_path / "hmdb51_org" / "brush_hair" / ODD[0]).unlink()
    (tmp_path / "hmdb51_org" / "brush_hair" / "unused_0.avi").unlink()  # unused and not there: no matter
    put(tmp_path, "hmdb51_org/clap/clap_9.avi")
    put(tmp_path, "hmdb51_org/clap/clap_9.tif")
    put(tmp_path, "hmdb51_org/walk/walk_0.avi")
    put(tmp_path, "hmdb51_org/walk.rar")
    source = source_of(tmp_path)
    assert aside(source, "train") == {
        f"hmdb51_org/brush_hair/{ODD[0]}": (0, "listed in 'brush_hair_test_split1.txt' line 1, no file; download it"),
        "hmdb51_org/clap/clap_9.avi": (1, "in no list of fold 1; data.fold chooses another one"),
        "hmdb51_org/clap/clap_9.tif": (1, "no video by its name, which ends in '.tif'; rename or remove the file"),
        "hmdb51_org/walk/walk_0.avi": (-1, "in no list of fold 1; data.fold chooses another one"),
    }
    assert aside(source, "test") == {}
    assert plan(tmp_path).known == plan(tmp_path).samples + 4


def test_subsets_orders_and_the_other_split_work(tmp_path):
    hmdb(tmp_path)
    put(tmp_path, "order.txt", "clap\nbrush_hair\n")
    result = plan(tmp_path, class_names=str(tmp_path / "order.txt"))
    assert (result.class_names, result.listings["train"]["label"].to_pylist()) == (["clap", "brush_hair"], [1, 1, 0])
    result = plan(tmp_path, classes=["clap"], train_split="test")
    assert ids(result.listings["train"]) == ["hmdb51_org/clap/clap_1.avi"]
    assert list(result.listings) == ["train"]


def test_a_class_without_any_file_is_named(tmp_path):
    hmdb(tmp_path)
    for path in (tmp_path / "hmdb51_org" / "clap").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="the class 'clap' has no training sample"):
        plan(tmp_path)
    assert plan(tmp_path, classes=["brush_hair"]).samples == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "clap_0.avi 3\n",
            "line 1: 'clap_0.avi 3' is not a file name and 1 (training), 2",
        ),
        ("clap_0.avi 1\n\nclap_1.avi\n", "clap_test_split1.txt, line 3: 'clap_1.avi' is not a file name and"),
        ("clap_0.txt 1\n", "line 1: 'clap_0.txt 1' is not a file name and"),
        (
            "clap_0.avi 1\nclap_0.avi 2\n",
            "'clap/clap_0' is listed twice, in 'clap_test_split1.txt' line 1 and 'clap_test",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, message):
    put(hmdb(tmp_path), f"{FOLDER}/clap_test_split1.txt", content)
    with pytest.raises(UserError) as raised:
        plan(tmp_path)
    assert message in str(raised.value)


def test_missing_lists_and_packed_clips_are_named(tmp_path):
    put(tmp_path, "hmdb51_org/clap.rar")
    with pytest.raises(UserError, match=r"holds no list such as brush_hair_test_split1\.txt, nor does a folder"):
        source_of(tmp_path).splits()
    put(tmp_path, f"{FOLDER}/clap_test_split1.txt", "clap_0.avi 1\n")
    with pytest.raises(
        UserError, match=r"hmdb51_org holds none of the 1 clips that the lists name, .*unpack the videos"
    ):
        plan(tmp_path)
