"""Sets from elsewhere: every format gives the same images and labels, and what does not fit is refused by its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_prepared
from PIL import Image

from distill_at_scale.core.errors import UserError
from distill_at_scale.core.images import png
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import normalization_of
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.experiments.compare import external

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), np.uint8)
LABELS = np.array([0, 0, 1, 1, 2, 2])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_prepared(tmp_path_factory.mktemp("external"), PIXELS, LABELS)  # classes c0, c1, c2


def loaded(path, data):
    return external.load("theirs", str(path), data, normalization_of(data))


def write_folder(root: Path, pixels=PIXELS, labels=LABELS, names=("c0", "c1", "c2")) -> Path:
    for place, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        (root / names[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(root / names[label] / f"{place}.png")
    return root


def write_pt(path: Path, **content) -> Path:
    torch.save({"images": torch.from_numpy(PIXELS), "labels": torch.from_numpy(LABELS), **content}, path)
    return path


def write_parquet(path: Path, labels) -> Path:
    images = [{"bytes": png([Image.fromarray(p.transpose(1, 2, 0))]), "path": f"{i}.png"} for i, p in enumerate(PIXELS)]
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    return path


def test_every_format_gives_the_same_set(data, tmp_path):
    expected = (torch.from_numpy(PIXELS).float() / 255 - 0.5) / 0.25
    fractions = torch.from_numpy(PIXELS).float() / 255
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 3.0])
    own = (fractions - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    (tmp_path / "many").mkdir()
    write_parquet(tmp_path / "many" / "train-00000-of-00001.parquet", LABELS.tolist())
    for path, value_bytes in (
        (write_folder(tmp_path / "folder"), 1),
        (write_folder(tmp_path / "numbers", names=("0", "1", "2")), 1),
        (write_pt(tmp_path / "pixels.pt"), 1),
        (write_pt(tmp_path / "fractions.pt", images=fractions), 4),
        (write_pt(tmp_path / "normalised.pt", images=own, mean=mean, std=std), 4),
        (write_parquet(tmp_path / "one.parquet", [f"c{label}" for label in LABELS]), 1),
        (tmp_path / "many", 1),
    ):
        result = loaded(path, data)
        order = torch.argsort(result.labels, stable=True)
        assert result.labels[order].tolist() == LABELS.tolist(), path
        assert torch.allclose(result.images[order], expected, atol=1e-5), path
        assert (result.stored, result.value_bytes) == (6, value_bytes), path


def test_exports_of_a_set_can_be_entered(digits_run, tmp_path):
    synthetic = synthetic_set.load(digits_run.dir)
    data = PreparedDataset(digits_run.dir / "prepared")
    synthetic.export_pt(tmp_path / "set.pt")
    synthetic.export_imagefolder(tmp_path / "folder")
    synthetic.export_parquet(tmp_path / "parquet")
    synthetic.export_parquet(tmp_path / "set.parquet")
    for name, atol in (("set.pt", 1e-5), ("folder", 0.02), ("parquet", 0.02), ("set.parquet", 0.02)):
        result = loaded(tmp_path / name, data)
        clipped = synthetic.normalization.apply(synthetic.values()) if atol > 1e-3 else synthetic.images
        assert result.labels.tolist() == synthetic.labels.tolist()
        assert torch.allclose(result.images, clipped, atol=atol)
    assert torch.equal(loaded(digits_run.dir, data).images, synthetic.images)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (
            lambda p: write_folder(p / "x", names=("c0", "c1", "dog")),
            "its class 'dog' is none of the data's: c0, c1, c2",
        ),
        (lambda p: write_folder(p / "x", PIXELS[:4], LABELS[:4]), "no sample of 1 classes, for example 'c2'"),
        (
            lambda p: write_folder(p / "x", np.zeros((3, 3, 9, 9), np.uint8), [0, 1, 2]),
            "0.png has 9 x 9 pixels, the data 8 x 8",
        ),
        (lambda p: write_pt(p / "x.pt", labels=torch.tensor([0, 0, 1, 1, 2, 3])), "a label is outside 0..2"),
        (lambda p: write_pt(p / "x.pt", labels=torch.zeros(5, dtype=torch.long)), "one for each of the 6 images"),
        (lambda p: write_pt(p / "x.pt", images=torch.rand(6, 3, 8, 8) * 5 - 2), "give uint8, floats from 0 to 1"),
        (lambda p: write_pt(p / "x.pt", images=torch.full((6, 3, 8, 8), torch.nan)), "not finite"),
        (lambda p: write_pt(p / "x.pt", images=torch.rand(6, 1, 8, 8)), "[1, 8, 8], those of the data [3, 8, 8]"),
        (lambda p: write_pt(p / "x.pt", soft_labels=torch.zeros(6, 2)), "soft_labels must be logits [6, 3]"),
        (lambda p: write_pt(p / "x.pt", images=[1]), "tensors images [n, *shape] and labels [n]"),
        (lambda p: write_parquet(p / "x.parquet", [0, 0, 1, 1, 2, 3]), "its class '3' is none"),
        (lambda p: p / "missing", "no such file or folder"),
    ],
)
def test_what_does_not_fit_is_refused(data, tmp_path, make, problem):
    path = make(tmp_path)
    with pytest.raises(UserError) as error:
        loaded(path, data)
    assert problem in str(error.value)
    assert str(error.value).startswith(f"compare.external: theirs = {path}: ")
