"""Which shards a WebDataset source reads: their splits, patterns of names, numbers, and what is refused."""

from __future__ import annotations

import pytest
from webdataset_cases import labels_of, sample, source_of, write

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.image.webdataset import WebDataset, expand
from distill_at_scale.storage.filesystem import Store


@pytest.fixture(params=["local", "uri"])
def named(request):
    """A path as it is, or as a URI (the way of remote storage)."""
    return lambda path: str(path) if request.param == "local" else "file://" + str(path)


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


def test_a_set_without_training_shards_is_named_without_its_credentials(tmp_path):
    write(tmp_path, "test-0.tar", *sample("a", 0))
    source = source_of(tmp_path)
    source.config = source.config.model_copy(update={"path": "s3://KEYID:sec/ret@bucket/x"})
    with pytest.raises(UserError, match=r"^s3://bucket/x holds no training shards"):
        source.splits()
