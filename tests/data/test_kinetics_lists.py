"""The lists of Kinetics: their forms, broken lines, and the names by which they are found."""

from __future__ import annotations

import pytest
from kinetics_cases import CLIPS, HEADER, LABELS, TRAIN, VAL, kinetics, labels, put

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.label_files import LabelFile
from distill_at_scale.data.sources.video.kinetics_csv import read_list


@pytest.fixture
def k400(tmp_path):
    return put(tmp_path, {**CLIPS, "train.csv": TRAIN, "val.csv": VAL})


WILD = {
    "unquoted, five columns": "label,youtube_id,time_start,time_end,split\narm wrestling,-abcdefghij,28,38,train\n",
    "everything quoted": '"label","youtube_id","time_start","time_end","split"\n'
    '"arm wrestling","-abcdefghij","28","38","train"\n',
    "other order": "split,time_end,youtube_id,time_start,label\ntrain,38,-abcdefghij,28,arm wrestling\n",
    "byte-order mark": "\ufefflabel,youtube_id,time_start,time_end,split\narm wrestling,-abcdefghij,28,38,train\n",
    "CRLF and empty lines": "label,youtube_id,time_start,time_end,split\r\n\r\narm wrestling,-abcdefghij,28,38,train\r\n\r\n",
    "times as decimals": "label,youtube_id,time_start,time_end,split\narm wrestling,-abcdefghij,28.0,38.0,train\n",
    "no split column": "label,youtube_id,time_start,time_end\narm wrestling,-abcdefghij,028,38\n",
    "spaces and capitals": "Label, youtube_id, time_start, time_end, Split\narm wrestling, -abcdefghij, 28, 38, Train\n",
    "an empty last column": "label,youtube_id,time_start,time_end,split\narm wrestling,-abcdefghij,28,38,train,\n",
}


@pytest.mark.parametrize("form", WILD)
def test_lists_in_every_form_give_the_same_labels(form):
    (row,) = read_list(LabelFile("x/k400_train.csv", WILD[form].encode()))
    assert (row.word, row.key, row.label) == ("train", "-abcdefghij_28_38", "arm wrestling")
    assert row.line == (3 if form.startswith("CRLF") else 2)


def test_lines_are_counted_as_an_editor_counts_them():
    text = HEADER + '\n"two\nlines",x,1,2,train,0\n\na,y,1,2,train,0\n'
    assert [row.line for row in read_list(LabelFile("all.csv", text.encode()))] == [3, 6]


def test_labels_may_hold_commas_quotes_and_parentheses():
    text = HEADER + '"a, b (c)",x,1,2,train,0\n"say ""hi""",y,1,2,validate,0\n"massaging person\'s head",z,1,2,test,0\n'
    rows = list(read_list(LabelFile("all.csv", text.encode())))
    assert [row.label for row in rows] == ["a, b (c)", 'say "hi"', "massaging person's head"]
    assert [row.word for row in rows] == ["train", "val", "test"]


BROKEN = {
    "": "train.csv has no column 'label'; .*it is ''",
    "name,youtube_id,time_start,time_end\n": "train.csv has no column 'label'",
    "label,youtube_id,time_start,split\n": "train.csv has no column 'time_end'",
    HEADER + "a,x,1,2,train,0\n\na,y,ten,20,train,0\n": "train.csv, line 4: the times are 'ten' and '20'",
    HEADER + "a,x,1.5,2,train,0\n": "line 2: the times are '1.5' and '2'; write whole seconds",
    HEADER + "a, b,x,1,2,train,0\n": "line 2: it has more columns than the first line; quote",
    HEADER + "a,#NAME?,1,2,train,0\n": "line 2: youtube_id is '#NAME\\?'",
    HEADER + "a,x,1,2,holdout,0\n": "line 2: split is 'holdout'; it must be train, val or test",
    HEADER + ",x,1,2,train,0\n": "line 2: it has no label",
    HEADER + "a,x\n": "line 2: the times are '' and ''",
    HEADER + 'a,x,1,2,train,0\n"b,y,1,2,train,0\nc,z,1,2,train,0\n': "line 3: .*close every quotation mark",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_line_that_cannot_be_read_is_named(tmp_path, text):
    put(tmp_path, {"train.csv": text, **CLIPS})
    with pytest.raises(UserError, match=BROKEN[text]):
        kinetics(tmp_path).splits()


def test_a_list_that_is_not_text_is_one_error(tmp_path):
    put(tmp_path, {"train.csv": b"\xff\xfe\x00\x80", **CLIPS})
    with pytest.raises(UserError, match=r"train\.csv is not a text file in UTF-8"):
        kinetics(tmp_path).splits()


def test_one_clip_with_two_labels_is_one_error_and_one_listed_twice_counts_once(k400):
    put(k400, {"train.csv": TRAIN + TRAIN.partition("\n")[2]})
    assert labels(kinetics(k400)) == LABELS
    put(k400, {"train.csv": TRAIN + "abseiling,-3B32lodo2M,28,38,train,0\n"})
    wanted = (
        r"train\.csv, line 6: the clip -3B32lodo2M_28_38 is 'abseiling', but .*train\.csv, line 2, says 'arm wrestling'"
    )
    with pytest.raises(UserError, match=wanted):
        kinetics(k400).splits()


PLACES = [
    ("annotations/train.csv", "annotations/val.csv"),
    ("annotations/k400_train.csv", "k400_validate.csv"),
    ("kinetics400/train.csv", "kinetics400/validate.csv"),
    ("annotations/deepmind/kinetics700_2020/train.csv", "annotations/deepmind/kinetics700_2020/validate.csv"),
    ("kinetics_700_2020_train.csv", "kinetics_700_2020_val.csv"),
    ("annotations/train.txt", "annotations/val.txt"),
]


@pytest.mark.parametrize(("train", "val"), PLACES)
def test_lists_are_found_by_their_usual_names(tmp_path, train, val):
    source = kinetics(
        put(tmp_path, {**CLIPS, train: TRAIN, val: VAL, "train/k400_train_path.txt": "train/part_0.tar.gz"})
    )
    assert labels(source) == LABELS
    assert len(labels(source, "test")) == 1


def test_the_plainest_name_is_the_list(k400):
    put(k400, {"tiny_train.csv": TRAIN.replace(",7,17,", ",8,18,"), "train.txt": "train/part_0.tar.gz"})
    put(k400, {"annotations/train.csv": "an older one, further below"})
    assert labels(kinetics(k400)) == LABELS


def test_one_list_may_hold_all_splits(tmp_path):
    put(tmp_path, {**CLIPS, "kinetics400.csv": TRAIN + VAL.removeprefix(HEADER)})
    source = kinetics(tmp_path)
    assert (labels(source), len(labels(source, "test"))) == (LABELS, 1)


@pytest.mark.parametrize(
    "named", ["lists/mine.csv", "lists", "{root}/lists/mine.csv", "{root}/lists", "file://{root}/lists"]
)
def test_lists_may_be_named(tmp_path, named):
    put(tmp_path, {**CLIPS, "lists/mine.csv": TRAIN + VAL.removeprefix(HEADER), "train.csv": "not this one"})
    if not named.endswith(".csv"):
        (tmp_path / "lists/mine.csv").rename(tmp_path / "lists/annotations.csv")
    assert labels(kinetics(tmp_path, annotations=named.format(root=tmp_path))) == LABELS


def test_a_missing_list_is_one_error_that_says_what_to_do(tmp_path):
    put(tmp_path, CLIPS)
    with pytest.raises(
        UserError, match=r"holds no list of clips: put the official train\.csv .* or set data\.annotations"
    ):
        kinetics(tmp_path).splits()
    for named in ("none.csv", "none", str(tmp_path / "none.csv"), str(tmp_path / "none")):
        with pytest.raises(UserError, match=r"data\.annotations = '.*none"):
            kinetics(tmp_path, annotations=named).splits()
    with pytest.raises(UserError, match=r"train holds no list of clips: give a file such as train\.csv"):
        kinetics(tmp_path, annotations="train").splits()
