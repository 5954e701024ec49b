"""Something-Something V2: both generations of lists, templates as classes, skipped files, and damaged lists."""

from __future__ import annotations

import json

import pytest

from distill_at_scale.config import load as configuration
from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.data.sources.base import LISTING

LABELS = {"Holding something": "1", "Moving part of something": "0", "Putting number of something onto something": "2"}
TEMPLATES = ["Holding [something]", "Moving [part] of [something]", "Putting [number of] [something] onto [something]"]
CLASSES = ["Moving part of something", "Holding something", "Putting number of something onto something"]
HOME = "20bn-something-something-v2"


def put(root, name, content="x"):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def entry(number, template):
    return {"id": str(number), "label": "holding a potato", "template": TEMPLATES[template], "placeholders": ["potato"]}


TRAIN = [entry(100, 0), entry(11, 1), entry(12, 2), entry(2, 0)]
VALIDATION = [entry(30, 1), entry(31, 0)]
TEST = [{"id": "40"}, {"id": "41"}]


def something(root, home=HOME, names="something-something-v2-{}.json", ending=".webm"):
    for kind, content in {"train": TRAIN, "validation": VALIDATION, "test": TEST, "labels": LABELS}.items():
        put(root, names.format(kind), content)
    for row in [*TRAIN, *VALIDATION, *TEST]:
        put(root, f"{home}/{row['id']}{ending}")
    return root


def source_of(root, **keys):
    return SOURCES["something_v2"](DataSection(source="something_v2", path=str(root), frames=4, **keys))


def aside(source, split):
    return {row["sample_id"]: (row["label"], row["reason"]) for row in source.set_aside(split).to_pylist()}


def ids(table):
    return table["sample_id"].to_pylist()


def plan(root, **data):
    return ingest.plan(
        configuration.validate({"data": {"source": "something_v2", "path": str(root), "frames": 4, **data}})
    )


def test_templates_without_brackets_are_the_classes_in_the_order_of_their_numbers(tmp_path):
    source = source_of(something(tmp_path))
    assert source.class_names == CLASSES
    assert source.splits() == ["train", "test"]
    table = source.listing("train")
    assert table.schema == LISTING
    assert ids(table) == [f"{HOME}/{number}.webm" for number in (11, 100, 2, 12)]
    assert table["label"].to_pylist() == [0, 1, 1, 2]
    assert ids(source.listing("test")) == [f"{HOME}/30.webm", f"{HOME}/31.webm"]
    assert source.read(table) == [b"x"] * 4
    assert aside(source, "train") == aside(source, "test") == {}


@pytest.mark.parametrize(
    ("home", "names", "ending"),
    [
        (HOME, "{}.json", ".webm"),
        (HOME, "labels/{}.json", ".mp4"),
        ("videos", "labels/something-something-v2-{}.json", ".webm"),
        (".", "something-something-v2-{}.json", ".webm"),
        (".", "labels/{}.json", ".mp4"),
        (".", "elsewhere/{}.json", ".webm"),
        (f"{HOME}/part 1", "{}.json", ".webm"),
    ],
)
def test_every_place_of_lists_and_clips_gives_the_same_samples(tmp_path, home, names, ending):
    keys = {"annotations": "elsewhere"} if "elsewhere" in names else {}
    source = source_of(something(tmp_path, home, names, ending), **keys)
    assert [path.rpartition("/")[2] for path in ids(source.listing("train"))] == [
        f"{n}{ending}" for n in (11, 100, 2, 12)
    ]
    assert source.listing("test")["label"].to_pylist() == [0, 1]
    assert aside(source, "train") == aside(source, "test") == {}


def test_lists_in_another_place_can_be_named(tmp_path):
    something(tmp_path / "set", names="../lists/{}.json")
    assert source_of(tmp_path / "set", annotations=str(tmp_path / "lists")).listing("test").num_rows == 2


def test_what_has_no_partner_is_set_aside(tmp_path):
    something(tmp_path)
    for number in (100, 31, 41):
        (tmp_path / HOME / f"{number}.webm").unlink()
    for name in ("999.webm", "11.mkv", "12.webm.part", ".hidden.webm"):
        put(tmp_path, f"{HOME}/{name}")
    source = source_of(tmp_path)
    assert aside(source, "train") == {
        f"{HOME}/100.webm": (1, "listed in 'something-something-v2-train.json' entry 1, no file; download it"),
        f"{HOME}/999.webm": (-1, "in no list (training, validation or test); complete the lists, or remove the file"),
        f"{HOME}/11.webm": (0, f"the same clip as '{HOME}/11.mkv', which is used; remove one of the two"),
        f"{HOME}/12.webm.part": (-1, "a download that was not finished; finish it, or remove the file"),
    }
    assert aside(source, "test") == {
        f"{HOME}/31.webm": (1, "listed in 'something-something-v2-validation.json' entry 2, no file; download it")
    }
    assert plan(tmp_path).known == plan(tmp_path).samples + 5 == 4 + 5


def test_the_validation_list_alone_is_enough(tmp_path):
    something(tmp_path)
    (tmp_path / "something-something-v2-train.json").unlink()
    source = source_of(tmp_path)
    assert source.splits() == ["test"]
    assert source.listing("test").num_rows == 2
    result = plan(tmp_path, train_split="val", classes=["Holding something"])
    assert ids(result.listings["train"]) == [f"{HOME}/31.webm"]
    assert result.aside["train"].num_rows == len(TRAIN)


def test_subsets_and_orders_work(tmp_path):
    something(tmp_path)
    put(tmp_path, "order.txt", "\n".join(reversed(CLASSES)))
    result = plan(tmp_path, class_names=str(tmp_path / "order.txt"), classes=CLASSES[:2])
    assert result.class_names == CLASSES[:2]
    assert result.source_class_names == CLASSES[::-1]
    assert result.listings["train"]["label"].to_pylist() == [0, 1, 1]
    result = plan(tmp_path, train_split="val", classes=CLASSES[:2])
    assert result.listings["train"]["label"].to_pylist() == [0, 1]


def test_numbers_as_ids_and_as_labels_are_taken(tmp_path):
    something(tmp_path, names="{}.json")
    put(tmp_path, "labels.json", {name: int(number) for name, number in LABELS.items()})
    put(tmp_path, "train.json", [{**row, "id": int(row["id"])} for row in TRAIN])
    assert source_of(tmp_path).listing("train")["label"].to_pylist() == [0, 1, 1, 2]


def test_ten_thousand_clips_keep_their_own_labels(tmp_path):
    put(tmp_path, "labels.json", LABELS)
    put(tmp_path, "train.json", [entry(number, number % 3) for number in range(10_000)])
    (tmp_path / HOME).mkdir()
    for number in range(0, 10_000, 7):
        (tmp_path / HOME / f"{number}.webm").touch()
    source = source_of(tmp_path)
    table = source.listing("train")
    numbers = [int(name.rpartition("/")[2][:-5]) for name in ids(table)]
    assert sorted(numbers) == list(range(0, 10_000, 7))
    assert table["label"].to_pylist() == [[1, 0, 2][number % 3] for number in numbers]
    assert source.set_aside("train").num_rows == 10_000 - len(numbers)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels", None, "labels.json is missing"),
        ("labels", {"Holding something": "1"}, 'labels.json must map every class to its number, "0", "1"'),
        ("labels", {"Holding something": "x"}, "must map every class to its number"),
        ("labels", {}, "must map every class to its number"),
        ("labels", [], "labels.json must hold a dict in JSON"),
        ("train", {}, "train.json must hold a list in JSON"),
        ("train", '[\n{"id": "1",\n]', "train.json, line 3: this is not JSON"),
        ("train", [entry(1, 0), {"id": "2"}], 'train.json, entry 2: {"id": "2"} has no id or no template; an entry is'),
        ("train", [{"template": "x"}], "entry 1:"),
        ("train", ["100"], "entry 1:"),
        ("train", [entry(1, 0), {"id": "2", "template": "Holdin [something]"}],
         "train.json, entry 2: 'Holdin something' is no class of labels.json (did you mean Holding something?)"),
        ("validation", [entry(2, 0)], "the clip '2' is listed twice, in 'train.json' entry 4 and 'validation.json' entry 1"),
        ("test", [{}], "test.json, entry 1:"),
    ],
)  # fmt: skip
def test_damage_is_one_error(tmp_path, name, content, message):
    something(tmp_path, names="{}.json")
    (tmp_path / f"{name}.json").unlink()
    if content is not None:
        put(tmp_path, f"{name}.json", content)
    with pytest.raises(UserError) as raised:
        plan(tmp_path)
    assert message in str(raised.value)


def test_missing_lists_and_clips_are_named(tmp_path):
    put(tmp_path, f"{HOME}/1.webm")
    with pytest.raises(
        UserError, match=r"holds no list such as something-something-v2-train\.json, nor does a folder labels"
    ):
        source_of(tmp_path).splits()
    put(tmp_path, "labels.json", LABELS)
    with pytest.raises(UserError, match=r"train\.json is missing"):
        source_of(tmp_path).splits()
    put(tmp_path, "train.json", TRAIN)
    with pytest.raises(
        UserError, match=rf"{HOME} holds none of the 4 clips that the lists name, for example .*100\.webm"
    ):
        plan(tmp_path)
