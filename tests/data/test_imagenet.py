"""ImageNet's and Tiny-ImageNet's folders: all forms of label list, the two numberings, and damaged layouts."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from scipy.io import savemat

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources import SOURCES, label_files
from distill_at_scale.data.sources.image.imagenet_labels import val_labels
from distill_at_scale.storage.filesystem import Store

WNIDS = ["n01440764", "n01443537", "n02119789"]  # sorted: tench, goldfish, kit fox
DEVKIT = ["n02119789", "n01440764", "n01443537"]  # ILSVRC2012_ID 1, 2, 3
TRUTH = [2, 0, 1, 2, 0]  # labels of the images 1..5 in sorted order
NAMES = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 6)]
DEVKIT_NUMBERS = [DEVKIT.index(WNIDS[label]) + 1 for label in TRUTH]
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def put(root, name, content=b"x"):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content.encode() if isinstance(content, str) else content)


def flat(root, names=NAMES):
    for wnid in WNIDS:
        put(root, f"train/{wnid}/{wnid}_1.JPEG")
    for name in names:
        put(root, f"val/{name}")
    return root


def meta(pairs, inner=()):
    """meta.mat as in the devkit: leaves first, then inner nodes with children."""
    rows = [(number, wnid, 0) for number, wnid in pairs] + [(number, wnid, 2) for number, wnid in inner]
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array([tuple(row) for row in rows], dtype=kinds).reshape(-1, 1)})
    return buffer.getvalue()


META = meta(list(enumerate(DEVKIT, 1)), inner=[(4, "n00001740")])


def lines(*rows):
    return "".join(f"{row}\n" for row in rows)


def imagenet(root, **keys):
    return SOURCES["imagenet"](DataSection(source="imagenet", path=str(root), **keys))


def labels(root, **keys):
    return imagenet(root, **keys).listing("test")["label"].to_pylist()


FORMS = {
    "devkit numbers and meta.mat": {GROUND_TRUTH: lines(*DEVKIT_NUMBERS), "meta.mat": META},
    "the devkit as unpacked": {
        f"ILSVRC2012_devkit_t12/data/{GROUND_TRUTH}": lines(*DEVKIT_NUMBERS),
        "ILSVRC2012_devkit_t12/data/meta.mat": META,
    },
    "devkit numbers and map_clsloc.txt": {
        GROUND_TRUTH: lines(*DEVKIT_NUMBERS),
        "map_clsloc.txt": lines(*(f"{w} {i} word" for i, w in sorted(enumerate(DEVKIT, 1), key=lambda p: p[1]))),
    },
    "devkit numbers, a list in devkit order beside a sorted one": {
        GROUND_TRUTH: lines(*DEVKIT_NUMBERS),
        "LOC_synset_mapping.txt": lines(*(f"{w} a, b" for w in WNIDS)),
        "synsets.txt": lines(*DEVKIT),
    },
    "a wnid per line": {"imagenet_2012_validation_synset_labels.txt": lines(*(WNIDS[t] for t in TRUTH))},
    "Caffe's val.txt": {"val.txt": lines(*(f"{n} {t}" for n, t in zip(NAMES, TRUTH, strict=True)))},
    "Caffe's val.txt beside meta.mat": {
        "caffe/val.txt": lines(*(f"val/{n} {t}" for n, t in zip(NAMES, TRUTH, strict=True))),
        "caffe/synset_words.txt": lines(*(f"{w} a, b c" for w in WNIDS)),
        "meta.mat": META,
    },
    "names and wnids, shuffled": {
        "val/val.txt": lines(*sorted((f"{n} {WNIDS[t]}" for n, t in zip(NAMES, TRUTH, strict=True)), reverse=True))
    },
    "Kaggle's CSV before bare numbers": {
        "LOC_val_solution.csv": lines(
            "ImageId,PredictionString",
            *reversed([f"{n[:-5]},{WNIDS[t]} 1 2 3 4 {WNIDS[t]} 5 6 7 8 " for n, t in zip(NAMES, TRUTH, strict=True)]),
        ),
        GROUND_TRUTH: lines(1, 1, 1, 1, 1),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_list_gives_the_same_labels(tmp_path, form):
    flat(tmp_path)
    for name, content in FORMS[form].items():
        put(tmp_path, name, content)
    source = imagenet(tmp_path)
    assert source.class_names == WNIDS
    table = source.listing("test")
    assert table["sample_id"].to_pylist() == [f"val/{name}" for name in NAMES]
    assert table["label"].to_pylist() == TRUTH
    assert source.read(table) == [b"x"] * 5


def test_the_devkit_is_read_inside_its_archive(tmp_path):
    flat(tmp_path)
    with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        for name, content in ((GROUND_TRUTH, lines(*DEVKIT_NUMBERS).encode()), ("meta.mat", META)):
            member = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    before = sorted(p.name for p in tmp_path.iterdir())
    assert labels(tmp_path) == TRUTH
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_damaged_devkit_archive_is_named(tmp_path):
    put(flat(tmp_path), "ILSVRC2012_devkit_t12.tar.gz", b"\x1f\x8b cut")
    with pytest.raises(UserError, match=r"devkit_t12\.tar\.gz cannot be read .*download it again"):
        labels(tmp_path)


@pytest.mark.parametrize("absolute", [False, True])
def test_list_and_mapping_can_be_named(tmp_path, absolute):
    root = flat(tmp_path / "data")
    folder = tmp_path / "elsewhere" if absolute else root / "my"
    put(folder, "list", lines(*DEVKIT_NUMBERS))
    put(folder, "ids.mat", META)
    keys = {"val_labels": "my/list", "synsets": "my/ids.mat"}
    if absolute:
        keys = {"val_labels": str(folder / "list"), "synsets": str(folder / "ids.mat")}
    assert labels(root, **keys) == TRUTH


def test_numbers_next_to_names_follow_an_explicit_mapping(tmp_path):
    put(flat(tmp_path), "val.txt", lines(*(f"{n} {d}" for n, d in zip(NAMES, DEVKIT_NUMBERS, strict=True))))
    put(tmp_path, "meta.mat", META)
    assert labels(tmp_path, synsets="meta.mat") == TRUTH


def test_val_labels_take_the_images_in_any_order(tmp_path):
    put(flat(tmp_path), GROUND_TRUTH, lines(*DEVKIT_NUMBERS))
    put(tmp_path, "meta.mat", META)
    order = [3, 0, 4, 2, 1]
    result = val_labels(Store(str(tmp_path)), DataSection(), [NAMES[i] for i in order], WNIDS)
    assert result == [TRUTH[i] for i in order]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"have no list: put the devkit .* or set data\.val_labels"),
        ({GROUND_TRUTH: lines(*DEVKIT_NUMBERS)}, r"nothing near .* says what the numbers mean: put the devkit"),
        (
            {GROUND_TRUTH: lines(*DEVKIT_NUMBERS), "synset_words.txt": lines(*WNIDS)},
            r"synset_words\.txt lists them in the order of their WordNet ids, which would give wrong labels",
        ),
        (
            {GROUND_TRUTH: lines(1, 2, 3, 4, 1), "meta.mat": META},
            r"label 4: 4 is outside 1\.\.3, the numbers of .*meta",
        ),
        ({GROUND_TRUTH: lines(1, 0, 3, 2, 1), "meta.mat": META}, r"label 2: 0 is outside 1\.\.3"),
        ({GROUND_TRUTH: lines(1, 2), "meta.mat": META}, r"has 2 labels for 5 validation images .* complete the images"),
        ({GROUND_TRUTH: ""}, "holds no labels"),
        ({GROUND_TRUTH: b"\xff\xfe"}, "is not a text file"),
        ({GROUND_TRUTH: lines(1, 2, "n01440764", 1, 1)}, r"label 3: 'n01440764' has another form than the first, '1'"),
        ({GROUND_TRUTH: lines(1, 2, "-1", 1, 1)}, r"label 3: '-1' has another form"),
        ({GROUND_TRUTH: lines(*DEVKIT_NUMBERS), "meta.mat": META[:60]}, r"meta\.mat is not the devkit's meta\.mat"),
        ({GROUND_TRUTH: lines(1, 1, 1, 1, 1), "meta.mat": meta([(1, "n1"), (3, "n2")])}, r"not numbered 1\.\.2"),
        ({"val.txt": lines(*(f"{n} {i}" for i, n in enumerate(NAMES, 1)))}, "it seems to number the images"),
        ({"val.txt": lines(*(f"{n}x.JPEG 0" for n in NAMES))}, r"val\.txt has no label for ILSVRC2012_val_00000001"),
        (
            {"imagenet_2012_validation_synset_labels.txt": lines(*["n01440764"] * 4, "n09999999")},
            r"the class 'n09999999' of ILSVRC2012_val_00000005\.JPEG is not one of the 3 training classes",
        ),
        (
            {"val.txt": lines(*(f"{n} 0" for n in NAMES)), "synsets.txt": lines("n1", "n1")},
            "must name every class once",
        ),
    ],
)
def test_a_bad_list_is_one_error_with_the_next_action(tmp_path, files, message):
    flat(tmp_path)
    for name, content in files.items():
        put(tmp_path, name, content)
    with pytest.raises(UserError, match=message):
        labels(tmp_path)


@pytest.mark.parametrize("key", ["val_labels", "synsets"])
def test_a_named_file_that_is_not_there_names_the_key(tmp_path, key):
    put(flat(tmp_path), GROUND_TRUTH, lines(*DEVKIT_NUMBERS))
    for path in ("none.txt", str(tmp_path / "none.txt")):
        with pytest.raises(UserError, match=rf"data\.{key} = .*none\.txt' cannot be read"):
            labels(tmp_path, **{key: path})


def test_class_folders_under_val_need_no_list(tmp_path):
    flat(tmp_path, [])
    for i, wnid in enumerate(WNIDS):
        put(tmp_path, f"val/{wnid}/{i}.JPEG")
    assert labels(tmp_path) == [0, 1, 2]


def test_a_missing_class_folder_in_val_is_named(tmp_path):
    flat(tmp_path, [])
    put(tmp_path, f"val/{WNIDS[0]}/a.JPEG")
    with pytest.raises(UserError, match=rf"val/{WNIDS[1]} is missing or holds no image \(and 1 more classes\)"):
        labels(tmp_path)


def test_an_extra_class_folder_in_val_is_named(tmp_path):
    flat(tmp_path, [])
    for wnid in [*WNIDS, "n09999999"]:
        put(tmp_path, f"val/{wnid}/a.JPEG")
    with pytest.raises(UserError, match="val/n09999999 is a class that the training split lacks"):
        labels(tmp_path)


def test_images_next_to_class_folders_in_val_are_set_aside(tmp_path):
    flat(tmp_path, ["stray.JPEG"])
    for wnid in WNIDS:
        put(tmp_path, f"val/{wnid}/a.JPEG")
    aside = imagenet(tmp_path).set_aside("test")
    assert aside["sample_id"].to_pylist() == ["val/stray.JPEG"]
    assert aside["reason"].to_pylist() == ["an image in no class folder; move it into one"]


def test_the_official_test_folder_is_not_a_split(tmp_path):
    flat(tmp_path, [])
    put(tmp_path, "test/ILSVRC2012_test_00000001.JPEG")
    assert imagenet(tmp_path).splits() == ["train"]


def test_an_empty_training_class_is_named(tmp_path):
    (flat(tmp_path) / "train" / "n05000000").mkdir()
    with pytest.raises(UserError, match="train/n05000000 is missing or holds no image"):
        imagenet(tmp_path).listing("train")


def test_a_root_without_train_is_an_error(tmp_path):
    put(tmp_path, "val/a.JPEG")
    with pytest.raises(UserError, match="has no folder train/"):
        imagenet(tmp_path)


def test_the_digest_follows_the_labels(tmp_path):
    put(flat(tmp_path), "val.txt", lines(*(f"{n} {t}" for n, t in zip(NAMES, TRUTH, strict=True))))
    before = imagenet(tmp_path).digest("test")
    assert imagenet(tmp_path).digest("test") == before
    put(tmp_path, "val.txt", lines(*(f"{n} {(t + 1) % 3}" for n, t in zip(NAMES, TRUTH, strict=True))))
    assert imagenet(tmp_path).digest("test") != before


@pytest.mark.parametrize("form", ["wnids", "devkit"])
def test_a_flat_val_of_real_images_has_the_labels_of_its_class_folders(tmp_path, shared_data, form):
    real = shared_data / "imagenette"
    folders = SOURCES["imagefolder"](DataSection(source="imagefolder", path=str(real)))
    table = folders.listing("test")
    (tmp_path / "train").symlink_to(real / "train")
    (tmp_path / "val").mkdir()
    rows = sorted(
        (path.rpartition("/")[2], folders.class_names[label], path)
        for path, label in zip(table["location"].to_pylist(), table["label"].to_pylist(), strict=True)
    )
    for name, _, path in rows:
        (tmp_path / "val" / name).symlink_to(real / path)
    order = folders.class_names[::-1]  # the numbering of a synthetic devkit
    if form == "wnids":
        put(tmp_path, "imagenet_2012_validation_synset_labels.txt", lines(*(wnid for _, wnid, _ in rows)))
    else:
        put(tmp_path, GROUND_TRUTH, lines(*(order.index(wnid) + 1 for _, wnid, _ in rows)))
        put(tmp_path, "meta.mat", meta(list(enumerate(order, 1))))
    source = imagenet(tmp_path)
    result = source.listing("test")
    by_folder = {path.rpartition("/")[2]: label for path, label in zip(
        table["location"].to_pylist(), table["label"].to_pylist(), strict=True)}  # fmt: skip
    assert result.num_rows == 600
    assert result["label"].to_pylist() == [by_folder[i.rpartition("/")[2]] for i in result["sample_id"].to_pylist()]
    assert source.listing("train")["sample_id"].to_pylist() == folders.listing("train")["sample_id"].to_pylist()


def test_a_list_at_an_address_is_named_without_its_credentials(tmp_path, monkeypatch):
    class There(Store):
        def __init__(self, path, key):
            super().__init__(str(tmp_path), key)

    monkeypatch.setattr(label_files, "Store", There)
    address = "s3://KEYID:sec/ret@bucket/list.txt?region=x"
    with pytest.raises(UserError, match=r"data\.val_labels = 's3://bucket/list\.txt\?region=x' cannot be read"):
        label_files.named_file(Store(str(tmp_path)), address, "data.val_labels")
    (tmp_path / "list.txt").write_text("1", encoding="utf-8")
    result = label_files.named_file(Store(str(tmp_path)), address, "data.val_labels")
    assert result == label_files.LabelFile("s3://bucket/list.txt", b"1")
