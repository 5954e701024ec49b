"""Lists of classes: known subsets, text files, explicit orders."""

from __future__ import annotations

import re

import pytest

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.class_subsets import SUBSETS, class_list, explicit_order


def test_a_list_is_itself():
    assert class_list(["b", "a"]) == ["b", "a"]


def test_imagenette_is_in_the_fields_order(shared_data):
    names = class_list("imagenette")
    assert names == sorted(p.name for p in (shared_data / "imagenette" / "train").iterdir())


@pytest.mark.parametrize("name", sorted(SUBSETS))
def test_every_subset_holds_that_many_wordnet_ids_once(name):
    names = class_list(name)
    assert len(names) == len(set(names)) == (100 if name == "imagenet100" else 10)
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in names)


def test_subsets_keep_the_order_of_the_literature():
    assert class_list("ImageWoof")[:2] == ["n02096294", "n02093754"]  # Australian terrier, border terrier
    assert class_list("imagefruit")[0] == "n07753275"  # pineapple
    assert class_list("ImageNet-100") == sorted(class_list("imagenet100"))


def test_a_text_file_names_classes_with_comments(tmp_path):
    (tmp_path / "list.txt").write_text("# mine\nn02\n\n  n01 # tench\nc#\n", encoding="utf-8")
    assert class_list(str(tmp_path / "list.txt")) == ["n02", "n01", "c#"]


@pytest.mark.parametrize(
    ("text", "message"), [("# none\n", "names no class"), ("a\nb\na\n", "'a' twice"), (b"\xff\xfe\x00", "UTF-8")]
)
def test_a_bad_list_is_one_error(tmp_path, text, message):
    path = tmp_path / "list.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        class_list(str(path))


def test_an_unknown_subset_names_the_nearest():
    with pytest.raises(UserError, match=r"'imagenete' is neither.*did you mean imagenette\?"):
        class_list("imagenete")


def test_an_explicit_order_moves_labels(tmp_path):
    (tmp_path / "order.txt").write_text("c\na\nb\n", encoding="utf-8")
    assert explicit_order(["a", "b", "c"], str(tmp_path / "order.txt")) == (["c", "a", "b"], [1, 2, 0])


def test_numbered_classes_are_named(tmp_path):
    (tmp_path / "order.txt").write_text("cat\ndog\n", encoding="utf-8")
    assert explicit_order(["0", "1"], str(tmp_path / "order.txt")) == (["cat", "dog"], [0, 1])


def test_numbered_classes_can_be_reordered_by_their_numbers(tmp_path):
    (tmp_path / "order.txt").write_text("1\n0\n", encoding="utf-8")
    assert explicit_order(["0", "1"], str(tmp_path / "order.txt")) == (["1", "0"], [1, 0])


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("a\nb\n", ["a", "b", "c"], "lacks the class 'c'"),
        ("a\nb\nc\nd\n", ["a", "b", "c"], "unknown class: 'd'"),
        ("cat\n", ["0", "1"], "names 1 classes, the data set has 2"),
    ],
)
def test_an_order_of_other_classes_is_one_error(tmp_path, text, names, message):
    (tmp_path / "order.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        explicit_order(names, str(tmp_path / "order.txt"))


def test_a_missing_order_is_one_error(tmp_path):
    with pytest.raises(UserError, match=r"data\.class_names.*cannot be read"):
        explicit_order(["a"], str(tmp_path / "none.txt"))
