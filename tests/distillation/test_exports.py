"""Exports keep the order of the classes, and carry card, class names and lines of Python that load them."""

from __future__ import annotations

import json
import re

import pyarrow.parquet as pq
import pytest
import torch
from torchvision.datasets import ImageFolder

from distill_at_scale.config.sections import DataSection
from distill_at_scale.data.prepared.whitening import Whitening
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.distillation.export import folder_names
from distill_at_scale.distillation.synthetic_set import SyntheticSet

TWELVE = [str(k) for k in range(12)]


def a_set(names=("cat", "dog", "owl"), shape=(3, 16, 16), whitened=False, **card) -> SyntheticSet:
    """Two samples per class whose pixels are whole numbers."""
    chance = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2 * len(names), *shape), generator=chance)
    mean, std = [0.5, 0.4, 0.3][: shape[-3]], [0.2, 0.25, 0.3][: shape[-3]]
    images = (pixels / 255 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    facts = {
        "class_names": list(names),
        "normalization": {"mean": mean, "std": std},
        "method": "dm",
        "protocol": {"epochs": 3},
    }
    if whitened:
        facts["whitening"] = {"kind": "zca"}
    whitening = Whitening(torch.zeros(images[0].numel()), torch.eye(images[0].numel())) if whitened else None
    return SyntheticSet(images, torch.arange(len(names)).repeat_interleave(2), facts | card, whitening=whitening)


def tensors() -> SyntheticSet:
    card = {"class_names": ["a", "b"], "kind": "tensors", "protocol": {"epochs": 1},
            "normalization": {"mean": [1.0, 2.0], "std": [2.0, 4.0], "scale": 1, "inner": 1}}  # fmt: skip
    images = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0))
    return SyntheticSet(images, torch.tensor([0, 0, 1, 1]), card)


def variables_of_the_readme(text: str) -> dict:
    """The names that the README's lines of Python define."""
    scope: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], scope)
    return scope


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (["cat", "dog", "owl"], ["cat", "dog", "owl"]),
        (["owl", "cat", "dog"], ["0_owl", "1_cat", "2_dog"]),
        (TWELVE, [f"{k:02d}_{k}" for k in range(12)]),
        (["b/c", "b", "B"], ["0_b_c", "1_b", "2_class-2"]),
        (["a" * 300, "b" * 300], ["a" * 200, "b" * 200]),
        (["Zebra", "ant"], ["Zebra", "ant"]),  # as torchvision sorts: capitals first
    ],
)
def test_readers_of_class_folders_give_the_labels_of_the_set(tmp_path, names, folders):
    s = a_set(names)
    s.export_imagefolder(tmp_path / "out")
    theirs = ImageFolder(str(tmp_path / "out"))
    assert theirs.classes == folders
    order = [int(re.search(r"(\d+)\.png", path)[1]) for path, _ in theirs.samples]
    assert [label for _, label in theirs.samples] == s.labels[order].tolist()
    ours = SOURCES["imagefolder"](DataSection(source="imagefolder", path=str(tmp_path / "out"))).listing("train")
    of_ours = [int(re.search(r"(\d+)\.png", name)[1]) for name in ours["sample_id"].to_pylist()]
    assert ours["label"].to_pylist() == s.labels[of_ours].tolist()
    assert (tmp_path / "out" / "classes.txt").read_text(encoding="utf-8").splitlines() == names


@pytest.mark.parametrize("names", [["cat", "dog", "owl"], TWELVE])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_lines_of_an_image_folders_readme_give_the_set(tmp_path, monkeypatch, names, channels):
    s = a_set(names, (channels, 8, 8))
    s.export_imagefolder(tmp_path / "my set")
    monkeypatch.chdir(tmp_path)
    data = variables_of_the_readme((tmp_path / "my set" / "README.md").read_text(encoding="utf-8"))["data"]
    images, labels = zip(*data, strict=True)
    assert torch.allclose(torch.stack(images), s.images, atol=1e-5)
    assert list(labels) == s.labels.tolist()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_lines_of_exported_frames_give_the_clips(tmp_path, monkeypatch, channels):
    s = a_set(shape=(4, channels, 8, 8))
    s.export_imagefolder(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    scope = variables_of_the_readme((tmp_path / "out" / "README.md").read_text(encoding="utf-8"))
    assert torch.allclose(scope["clips"], s.images, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_lines_of_exported_videos_give_a_clip_as_it_is_stored(tmp_path, monkeypatch, channels):
    s = a_set(["dog", "cat"], shape=(4, channels, 16, 16))
    s.export_videofolder(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    clip = variables_of_the_readme((tmp_path / "out" / "README.md").read_text(encoding="utf-8"))["clip"]
    assert clip.shape == s.images.shape[1:]
    assert float(((clip - s.images[0]).abs() * 0.3).max()) <= 16 / 255  # of noise, the hardest there is
    assert (tmp_path / "out" / "0_dog").is_dir()


def test_the_lines_of_a_plain_file_give_the_set(tmp_path, monkeypatch):
    s = a_set()
    s.export_pt(tmp_path / "s.pt")
    monkeypatch.chdir(tmp_path)
    readme = torch.load(tmp_path / "s.pt", weights_only=True)["readme"]
    assert torch.equal(variables_of_the_readme(readme)["s"]["images"], s.images)
    assert "**Normalised already**" in readme


@pytest.mark.parametrize("make", [a_set, lambda: a_set(shape=(4, 3, 8, 8)), tensors])
@pytest.mark.parametrize("name", ["out", "out.parquet"])
def test_hugging_faces_datasets_reads_a_folder_and_a_file(tmp_path, monkeypatch, make, name):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    s = make()
    s.export_parquet(name)
    if name == "out":
        readme = (tmp_path / name / "README.md").read_text(encoding="utf-8")
    else:
        readme = pq.read_schema(name).metadata[b"readme"].decode()
    scope = variables_of_the_readme(readme)
    if s.kind == "tensors":
        assert torch.allclose(scope["x"], s.images[0], atol=1e-5)
        return
    images, labels = zip(*scope["samples"], strict=True)
    assert torch.allclose(torch.stack(images), s.images, atol=1e-5)
    assert list(labels) == s.labels.tolist()


@pytest.mark.parametrize("make", [a_set, lambda: a_set(shape=(4, 3, 8, 8)), tensors])
def test_a_parquet_folder_holds_the_file_and_the_notes(tmp_path, make):
    s = make()
    s.export_parquet(tmp_path / "out")
    s.export_parquet(tmp_path / "one.parquet")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["README.md", "card.json", "classes.txt", "train-00000-of-00001.parquet"]
    folder, one = pq.read_table(tmp_path / "out" / files[-1]), pq.read_table(tmp_path / "one.parquet")
    assert folder.equals(one)
    assert json.loads(one.schema.metadata[b"distill_at_scale"]) == s.card
    assert json.loads((tmp_path / "out" / "card.json").read_text(encoding="utf-8"))["class_names"] == s.class_names


def test_a_parquet_folder_is_read_by_our_own_source(tmp_path):
    s = a_set(["owl", "cat"])
    s.export_parquet(tmp_path / "out")
    source = SOURCES["parquet"](DataSection(source="parquet", path=str(tmp_path / "out")))
    assert source.class_names == ["owl", "cat"]
    assert source.listing("train")["label"].to_pylist() == s.labels.tolist()


@pytest.mark.parametrize("export", ["export_imagefolder", "export_parquet"])
def test_every_folder_says_what_it_is_and_carries_the_normalisation(tmp_path, export):
    s = a_set(whitened=True, formation=2, fingerprints={"distill": "0123456789abcdef0123"}, images_per_class=2)
    getattr(s, export)(tmp_path / "out")
    card = json.loads((tmp_path / "out" / "card.json").read_text(encoding="utf-8"))
    assert card["normalization"] == s.card["normalization"]
    assert torch.equal(Whitening.load(tmp_path / "out").matrix, s.whitening.matrix)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for part in ("mean [0.5, 0.4, 0.3], std [0.2, 0.25, 0.3]", "0123456789abcdef", "`dm`, 2 per class", "2 x 2 training images",
                 "whitening.safetensors", "License: that of the source data"):  # fmt: skip
        assert part in text


@pytest.mark.parametrize("labels", ["soft", "views"])
def test_a_readme_says_that_soft_labels_are_missing(tmp_path, labels):
    a_set(protocol={"epochs": 1, "labels": labels}).export_imagefolder(tmp_path / "out")
    assert "soft labels, which are not here" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_unusual_class_names_stay_one_line_each(tmp_path):
    a_set(["a\nb", "ä", "c"]).export_imagefolder(tmp_path / "out")
    assert (tmp_path / "out" / "classes.txt").read_bytes().decode("utf-8").split("\n") == ["a b", "ä", "c", ""]


def test_a_class_may_be_called_like_the_folder_of_an_unusable_name():
    assert folder_names(["class-1", ".."]) == ["0_class-1", "1_class-1"]
