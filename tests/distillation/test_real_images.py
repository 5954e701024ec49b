"""Coreset and PCA: which samples they take, in which order, how they are tiled, and how networks are trained on them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, write_prepared
from distill_runs import elsewhere, same, start, stop_before

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.engine import DistillPaths, check_inputs
from distill_at_scale.distillation.evaluate import EvaluationJob, Evaluator
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.distillation.soft_labels import resized_crop_boxes
from distill_at_scale.distillation.student import TrainingProtocol, TrainingSet, epoch_batches

CPU = torch.device("cpu")
CORESET, PCA = {"distill__method": "coreset", "distill__ipc": 3}, {"distill__method": "pca", "distill__ipc": 2}


def real(places: DistillPaths, label: int, count: int) -> torch.Tensor:
    """The kept samples of a class with the smallest ranks, normalised; read row by row, without the package's sampling."""
    prepared = PreparedDataset(places.prepared)
    rows = [row for row in manifest.read(places.manifest)[0].to_pylist() if row["label"] == label and row["kept"]]
    ids = prepared.ids("train", label).to_pylist()
    first = [ids.index(row["sample_id"]) for row in sorted(rows, key=lambda row: row["rank"])[:count]]
    pixels = torch.cat([torch.from_numpy(prepared.take("train", label, [place])) for place in first])
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (prepared.mean, prepared.std))
    return (pixels.float() / 255 - mean) / std


def shuffled_ranks(places: DistillPaths, folder) -> DistillPaths:
    """The same samples, ranked in an order that is not that of their ids."""
    table, facts = manifest.read(places.manifest)
    ranks = np.random.default_rng(0).permutation(table.num_rows).astype(np.int32)
    manifest.write(folder / "manifest.parquet", table.set_column(3, manifest.SCHEMA.field(3), [ranks]), facts)
    return replace(places, manifest=folder / "manifest.parquet")


@pytest.mark.parametrize("hold", ["host", "shards"])
def test_a_coreset_is_the_first_kept_samples_in_the_order_of_their_ranks(places, tmp_path, monkeypatch, hold):
    where = shuffled_ranks(places, tmp_path)
    read, take = [], PreparedDataset.take

    def spy(self, split, label, wanted, threads=1):
        read.append(len(wanted))
        return take(self, split, label, wanted, threads)

    monkeypatch.setattr(PreparedDataset, "take", spy)
    result = start(where, **CORESET, distill__hold=hold).run()
    monkeypatch.undo()
    assert sum(read) == 3 * 3  # no other sample is decoded
    assert result.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert torch.allclose(result.images, torch.cat([real(where, label, 3) for label in range(3)]), atol=1e-6)
    assert len({image.numpy().tobytes() for image in result.images}) == 9


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_pca_tiles_the_first_kept_samples_row_by_row(places, tmp_path, factor):
    where = shuffled_ranks(places, tmp_path)
    result = start(where, **PCA, distill__pca__factor=factor).run()
    side = -(-8 // factor)
    for label in range(3):
        candidates = real(where, label, 2 * factor**2)
        small = candidates
        if factor > 1:
            small = F.interpolate(candidates, size=(side, side), mode="bilinear", antialias=True)
        for number in range(2):
            image = torch.zeros(1, 8, 8)
            for k in range(factor**2):
                top, left = (min(side * i, 8 - side) for i in divmod(k, factor))
                image[:, top : top + side, left : left + side] = small[number * factor**2 + k]
            assert torch.allclose(result.images[2 * label + number], image, atol=1e-5)
    assert "formation" not in result.card


def test_pca_tiles_every_frame_of_a_clip(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (16, 3, 3, 8, 8), np.uint8)
    prepared = write_prepared(tmp_path / "prepared", pixels, np.repeat([0, 1], 8))
    rows = [{"sample_id": name, "label": label, "score": 0.0, "rank": 7 - k, "kept": True}
            for label in (0, 1) for k, name in enumerate(prepared.ids("train", label).to_pylist())]  # fmt: skip
    manifest.write(tmp_path / "m", manifest.SCHEMA.empty_table().from_pylist(rows, manifest.SCHEMA), {})
    where = DistillPaths(tmp_path / "prepared", tmp_path / "m", tmp_path / "work", tmp_path / "log")
    keys = {"data__frames": 3, "data__classes": None, "distill__network": "convnet3d"}
    result = start(where, distill__method="pca", distill__ipc=1, **keys).run()
    clips = torch.from_numpy(prepared.take("train", 1, range(8))).flip(0)[:4].float().div(255).sub(0.5).div(0.25)
    for frame in range(3):
        small = F.interpolate(clips[:, frame], size=(4, 4), mode="bilinear", antialias=True)
        assert torch.allclose(result.images[1, frame, :, 4:, :4], small[2], atol=1e-5)


@pytest.mark.parametrize("method", [CORESET, PCA])
def test_one_step_is_the_default_and_several_resume_to_the_same_bytes(places, method):
    whole = start(places, **method, distill__steps=None).run()
    assert whole.card["steps"] == 1
    where = elsewhere(places, "stopped")
    stopped = start(where, **method, distill__steps=3, distill__checkpoint_every=1)
    stop_before(stopped, 2)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = start(where, **method, distill__steps=3).run()
    assert same(replace(whole, snapshots={}), replace(resumed, snapshots={}))


def test_too_few_kept_samples_are_an_error_with_the_number_to_keep(places):
    prepared = PreparedDataset(places.prepared)
    config = tiny_config("x", **PCA, distill__pca__factor=3)
    check_inputs(config, prepared, [18, 18, 18])
    with pytest.raises(UserError, match=r"17 samples of the class '1' are kept, but pca needs 18 of each class; "
                                        r"set select\.per_class=18 or select\.min_per_class=18, or lower "
                                        r"distill\.ipc or distill\.pca\.factor"):  # fmt: skip
        check_inputs(config, prepared, [18, 17, 18])
    with pytest.raises(UserError, match=r"coreset needs 3 of each class; .* or lower distill\.ipc$"):
        check_inputs(tiny_config("x", **CORESET), prepared, [3, 3, 2])


def test_a_tile_has_at_least_one_pixel_and_data_are_not_whitened():
    with pytest.raises(UserError, match="factor = 5 leaves no pixel for a tile of an image of 4 pixels; lower it"):
        METHODS["pca"].protocol(tiny_config("x", **PCA, distill__pca__factor=5, data__size=4))
    with pytest.raises(UserError, match=r"distill\.pca works on pixels, not on whitened data"):
        METHODS["pca"].protocol(tiny_config("x", **PCA, data__whiten="zca"))


def test_the_card_holds_crops_of_about_one_tile_and_the_loader_makes_them(places, tmp_path):
    result = start(places, **PCA, distill__pca__crop_spread=1.0, distill__pca__student_augment="none").run()
    result.save(tmp_path / "set")
    loaded = synthetic_set.load(tmp_path / "set")
    assert json.loads((tmp_path / "set" / "card.json").read_text(encoding="utf-8"))["protocol"]["crop"] == [0.25, 0.25]
    assert loaded.protocol == TrainingProtocol(1000, "none", crop=(0.25, 0.25))
    grey = replace(loaded, images=torch.zeros(6, 1, 8, 8), labels=torch.zeros(6, dtype=torch.long))
    grey.images[:, :, :, :] = torch.arange(8.0)  # each column has its number
    images, _ = next(iter(grey.train_loader()))
    span = (
        images[:, 0, 0, -1] - images[:, 0, 0, 0]
    )  # of a crop whose width is w pixels: w * 7 / 8, less if the edge clamps it
    assert (
        (span > 2.5) & (span < 4.2)
    ).all()  # a quarter of the area: about half of the side, by the ratio 0.87 to 1.15
    assert torch.equal(next(iter(grey.train_loader(augment=False, shuffle=False)))[0], grey.images)
    coreset = start(elsewhere(places, "coreset"), **CORESET).run()
    assert "crop" not in coreset.card["protocol"]
    assert coreset.protocol.epochs == 1000
    plain = tiny_config("x", **CORESET, distill__coreset__student_augment="none")
    assert METHODS["coreset"].protocol(plain) == TrainingProtocol(300, "none")


def test_crops_are_mirrored_half_of_the_time_and_other_families_always_follow():
    ramp = torch.arange(16.0).expand(400, 1, 16, 16) + 1
    data = TrainingSet(ramp, torch.zeros(400, dtype=torch.long))
    generator = torch.Generator().manual_seed(0)

    def batch(augment):
        protocol = TrainingProtocol(1, augment, batch=400, crop=(0.5, 1.0))
        return next(epoch_batches(data, protocol, generator, merge=False))[0]

    images = batch("flip")
    mirrored = images[:, 0, 0, 0] > images[:, 0, 0, -1]
    assert 0.4 < mirrored.float().mean() < 0.6
    assert not (batch("none")[:, 0, 0, 0] > batch("none")[:, 0, 0, -1]).any()
    both = batch("flip_cutout")
    assert (both == 0).flatten(1).any(1).all()  # every image has its hole
    areas = resized_crop_boxes(torch.rand(1000, 4, generator=generator), 0.1, 0.4)[:, 2:].prod(1)
    assert areas.min() < 0.11
    assert 0.39 < areas.max() <= 0.4 + 1e-6


def test_real_images_are_not_cropped_as_tiles(make_run, tmp_path):
    run = make_run(tmp_path / "run", **PCA, evaluate__seeds=1, evaluate__epochs=2, evaluate__bounds=["full"],
                   evaluate__bound_epochs=1)  # fmt: skip
    run.stages("ingest", "score", "select", "distill", "evaluate")
    folders = [run.dir / name for name in ("prepared", "synthetic", "manifest.parquet")]
    evaluator = Evaluator(run.config, *folders, CPU)

    def crop(name):
        return evaluator._protocol(EvaluationJob(name, "convnet", 0), evaluator.synthetic).crop

    assert crop("distilled") == (0.125, 0.5)
    assert crop("random_real") == crop("full") == (0.25, 1.0)
    rows = json.loads((run.dir / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    assert [row["set"] for row in rows] == ["distilled", "random_real", "full"]
    record = json.loads((run.dir / "stages" / "distill.json").read_text(encoding="utf-8"))
    assert "warnings" not in record
