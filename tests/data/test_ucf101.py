"""UCF-101's folders and lists: the official layout in all its places, skipped files, and damaged lists."""

from __future__ import annotations

import shutil

import pytest

from distill_at_scale.config import load as configuration
from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.data.sources.base import LISTING, SET_ASIDE

CLASSES = ["Typing", "ApplyEyeMakeup", "HandstandPushups"]  # not sorted: the order is the list's
TRAIN = ["Typing/v_Typing_g08_c01.avi 1", "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 2",
         "HandstandPushups/v_HandStandPushups_g08_c01.avi 3", "Typing/v_Typing_g08_c02.avi 1"]  # fmt: skip
TEST = ["Typing/v_Typing_g01_c01.avi", "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi"]


def put(root, name, content="x"):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content, encoding="utf-8", newline="")


def lists(root, folder="ucfTrainTestlist", end="\r\n"):
    put(root, f"{folder}/classInd.txt", "".join(f"{i} {name}{end}" for i, name in enumerate(CLASSES, 1)))
    for fold in (1, 2, 3):
        train, test = (TRAIN, TEST) if fold == 1 else (TRAIN[:3], [TEST[0], TRAIN[3].split()[0]])
        put(root, f"{folder}/trainlist{fold:02d}.txt", "".join(f"{line}{end}" for line in train))
        put(root, f"{folder}/testlist{fold:02d}.txt", "".join(f"{line}{end}" for line in test))
    return root


def clips(root, home="UCF-101", ending=".avi"):
    for line in [*TRAIN, *TEST]:
        put(root, f"{home}/{line.split()[0].replace('.avi', ending)}")
    return root


def ucf(root, **keys):
    return SOURCES["ucf101"](DataSection(source="ucf101", path=str(root), frames=4, **keys))


def aside(source, split):
    table = source.set_aside(split)
    assert table.schema == SET_ASIDE
    return {row["sample_id"]: (row["label"], row["reason"]) for row in table.to_pylist()}


def ids(table):
    return table["sample_id"].to_pylist()


def plan(root, **data):
    return ingest.plan(configuration.validate({"data": {"source": "ucf101", "path": str(root), "frames": 4, **data}}))


def test_classes_and_splits_are_those_of_the_lists(tmp_path):
    source = ucf(clips(lists(tmp_path)))
    assert source.class_names == CLASSES
    assert source.splits() == ["train", "test"]
    table = source.listing("train")
    assert table.schema == LISTING
    assert ids(table) == [f"UCF-101/{TRAIN[i].split()[0]}" for i in (0, 3, 1, 2)]
    assert table["label"].to_pylist() == [0, 0, 1, 2]
    assert ids(source.listing("test")) == [f"UCF-101/{name}" for name in TEST]
    assert source.read(table) == [b"x"] * 4
    assert aside(source, "train") == aside(source, "test") == {}


def test_the_fold_picks_the_lists(tmp_path):
    clips(lists(tmp_path))
    source = ucf(tmp_path, fold=2)
    assert source.listing("train").num_rows == 3
    assert ids(source.listing("test")) == [f"UCF-101/{TEST[0]}", "UCF-101/Typing/v_Typing_g08_c02.avi"]
    assert aside(source, "train") == {f"UCF-101/{TEST[1]}": (1, "in no list of fold 2; data.fold chooses another one")}
    assert aside(source, "test") == {}
    assert source.digest("train") != ucf(tmp_path).digest("train")


@pytest.mark.parametrize(
    "where", ["inside", "flat inside", "beside", "annotations", "relative annotations", "absolute"]
)
def test_the_root_may_be_the_folder_of_the_clips(tmp_path, where):
    root = clips(tmp_path) / "UCF-101"
    keys = {}
    if where in ("inside", "beside"):
        lists(root if where == "inside" else tmp_path)
    elif where == "flat inside":
        lists(root, ".")
    else:
        folder = root if where == "relative annotations" else tmp_path
        lists(folder, "my lists")
        keys["annotations"] = "my lists" if folder == root else "../my lists"
        if where == "absolute":
            keys["annotations"] = str(tmp_path / "my lists")
    source = ucf(root, **keys)
    assert source.listing("train").num_rows == 4
    assert ids(source.listing("test")) == TEST
    assert aside(source, "train") == aside(source, "test") == {}


def test_a_set_on_s3_is_the_set_on_disk(s3, tmp_path):
    clips(lists(tmp_path))
    put(tmp_path, "UCF-101/Typing/extra.avi")
    (tmp_path / "UCF-101" / TRAIN[3].split()[0]).unlink()
    s3.upload(tmp_path, "ucf-set", "deep/set/")
    pairs = [(ucf(tmp_path), ucf(s3("ucf-set/deep/set"))),
             (ucf(tmp_path / "UCF-101"), ucf(s3("ucf-set/deep/set/UCF-101"))),
             (ucf(tmp_path), ucf(s3("ucf-set/deep/set"), annotations="ucfTrainTestlist")),
             (ucf(tmp_path), ucf(s3("ucf-set/deep/set"), annotations=s3("ucf-set/deep/set/ucfTrainTestlist"))),
             (ucf(tmp_path), ucf(s3("ucf-set/deep/set"), annotations=str(tmp_path / "ucfTrainTestlist")))]  # fmt: skip
    for here, there in pairs:
        assert there.class_names == here.class_names
        for split in here.splits():
            assert there.listing(split).equals(here.listing(split))
            assert there.digest(split) == here.digest(split)
            assert there.set_aside(split).equals(here.set_aside(split))
        assert there.set_aside("train").num_rows == 2
    assert there.read(there.listing("train")) == [b"x"] * 3


def test_clips_in_another_container_are_found(tmp_path):
    source = ucf(clips(lists(tmp_path), ending=".mp4"))
    assert ids(source.listing("test")) == [f"UCF-101/{name.replace('.avi', '.mp4')}" for name in TEST]


def test_what_has_no_partner_is_set_aside(tmp_path):
    clips(lists(tmp_path))
    (tmp_path / "UCF-101" / TRAIN[3].split()[0]).unlink()
    (tmp_path / "UCF-101" / TEST[1]).unlink()
    put(tmp_path, "UCF-101/Typing/v_Typing_g99_c01.avi")
    put(tmp_path, "UCF-101/Typing/v_Typing_g08_c01.mp4")
    put(tmp_path, "UCF-101/Typing/v_Typing_g99_c02.avi.part")
    put(tmp_path, "UCF-101/Juggling/v_Juggling_g01_c01.avi")
    put(tmp_path, "UCF-101/README")
    put(tmp_path, "UCF-101/Typing/.hidden.avi")
    source = ucf(tmp_path)
    assert ids(source.listing("train")) == [f"UCF-101/{TRAIN[i].split()[0]}" for i in (0, 1, 2)]
    assert aside(source, "train") == {
        "UCF-101/Typing/v_Typing_g08_c02.avi": (0, "listed in 'trainlist01.txt' line 4, no file; download it"),
        "UCF-101/Typing/v_Typing_g99_c01.avi": (0, "in no list of fold 1; data.fold chooses another one"),
        "UCF-101/Typing/v_Typing_g08_c01.mp4": (
            0,
            "the same clip as 'UCF-101/Typing/v_Typing_g08_c01.avi', which is used; remove one of the two",
        ),
        "UCF-101/Typing/v_Typing_g99_c02.avi.part": (
            0,
            "a download that was not finished; finish it, or remove the file",
        ),
        "UCF-101/Juggling/v_Juggling_g01_c01.avi": (-1, "in no list of fold 1; data.fold chooses another one"),
    }
    assert aside(source, "test") == {
        "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi": (
            1,
            "listed in 'testlist01.txt' line 2, no file; download it",
        )
    }
    result = plan(tmp_path)
    assert result.known == result.samples + 6 == 4 + 6


def test_files_without_a_row_are_reported_with_the_distilled_split(tmp_path):
    clips(lists(tmp_path))
    put(tmp_path, "UCF-101/Typing/extra.avi")
    result = plan(tmp_path, train_split="test", classes=["Typing", "ApplyEyeMakeup"])
    assert ids(result.listings["train"]) == [f"UCF-101/{name}" for name in TEST]
    assert ids(result.aside["train"]) == ["UCF-101/Typing/extra.avi"]


def test_subsets_and_orders_work(tmp_path):
    clips(lists(tmp_path))
    put(tmp_path, "UCF-101/HandstandPushups/extra.avi")
    put(tmp_path, "order.txt", "\n".join(sorted(CLASSES)))
    result = plan(tmp_path, class_names=str(tmp_path / "order.txt"))
    assert result.class_names == sorted(CLASSES)
    assert result.listings["train"]["label"].to_pylist() == [2, 2, 0, 1]
    assert result.aside["train"]["label"].to_pylist() == [1]
    result = plan(tmp_path, classes=["ApplyEyeMakeup", "Typing"])
    assert result.listings["train"]["label"].to_pylist() == [1, 1, 0]
    assert result.aside["train"].num_rows == 0


def test_a_test_split_without_files_is_ignored(tmp_path):
    clips(lists(tmp_path))
    for name in TEST:
        (tmp_path / "UCF-101" / name).unlink()
    result = plan(tmp_path)
    assert list(result.listings) == ["train"]
    assert result.aside["test"].num_rows == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("classInd.txt", None, "classInd.txt is missing"),
        ("trainlist01.txt", None, "trainlist01.txt is missing; download it again, or set data.annotations"),
        ("testlist01.txt", None, "testlist01.txt is missing"),
        ("classInd.txt", "1 Typing\n3 ApplyEyeMakeup\n", "numbered 1, 2, 3"),
        ("classInd.txt", "", "numbered 1, 2, 3"),
        ("classInd.txt", "1 Typing\n1 ApplyEyeMakeup\n", "classInd.txt, line 2: '1 ApplyEyeMakeup' is not a new number"),
        ("classInd.txt", "Typing\n", "classInd.txt, line 1: 'Typing' is not a new number and class"),
        ("trainlist01.txt", "\nTyping/x.avi 1\nTypin/y.avi 1\n",
         "trainlist01.txt, line 3: 'Typin' is no class of classInd.txt (did you mean Typing?)"),
        ("trainlist01.txt", "Typing/x.avi 2\n", "line 1: the number is 2, but Typing has 1 in classInd.txt"),
        ("trainlist01.txt", "x.avi 1\n", "line 1: 'x.avi 1' is malformed; a line is ApplyEyeMakeup/"),
        ("testlist01.txt", "Typing/x.txt\n", "testlist01.txt, line 1: 'Typing/x.txt' is malformed"),
        ("testlist01.txt", f"{TEST[0]}\n{TRAIN[0]}\n",
         "'Typing/v_Typing_g08_c01' is listed twice, in 'trainlist01.txt' line 1 and 'testlist01.txt' line 2"),
        ("testlist01.txt", b"\xff\xfe", "testlist01.txt is not a text file in UTF-8"),
    ],
)  # fmt: skip
def test_damage_is_one_error(tmp_path, name, content, message):
    clips(lists(tmp_path))
    path = tmp_path / "ucfTrainTestlist" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as raised:
        plan(tmp_path)
    assert message in str(raised.value)


def test_a_byte_order_mark_does_not_matter(tmp_path):
    clips(lists(tmp_path))
    path = tmp_path / "ucfTrainTestlist" / "classInd.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert ucf(tmp_path).class_names == CLASSES


def test_missing_lists_or_clips_are_named(tmp_path):
    clips(tmp_path)
    with pytest.raises(
        UserError, match=r"holds no list such as classInd\.txt, nor does a folder ucfTrainTestlist in it"
    ):
        ucf(tmp_path).splits()
    with pytest.raises(UserError, match=r"data\.annotations = 'none': there is no folder .*none; give the folder"):
        ucf(tmp_path, annotations="none").splits()
    lists(tmp_path)
    shutil.rmtree(tmp_path / "UCF-101")
    (tmp_path / "UCF-101").mkdir()
    with pytest.raises(
        UserError, match=r"UCF-101 holds none of the 6 clips that the lists name, for example .*Typing/"
    ):
        ucf(tmp_path).listing("train")
