"""A synthetic set in a training script: indexing, dataset, loader, and the transform of real test images."""

from __future__ import annotations

import itertools
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from distill_at_scale.core import safetensors_io
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.normalization import normalization_of
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.soft_labels import StoredLabels
from distill_at_scale.distillation.student import view_batches
from distill_at_scale.distillation.synthetic_set import SyntheticSet

NAMES = ["cat", "dog", "owl"]


def a_set(shape=(3, 8, 8), ipc=4, extras=None, **card) -> SyntheticSet:
    images = torch.randn(len(NAMES) * ipc, *shape, generator=torch.Generator().manual_seed(0))
    normalization = {"mean": [0.5, 0.4, 0.3][: shape[-3]], "std": [0.2, 0.25, 0.3][: shape[-3]]}
    protocol = card.pop("protocol", {"epochs": 3})
    facts = {"class_names": NAMES, "normalization": normalization, "protocol": protocol, **card}
    return SyntheticSet(images, torch.arange(len(NAMES)).repeat_interleave(ipc), facts, extras=extras or {})


@pytest.fixture
def view_set(tmp_path) -> SyntheticSet:
    """A set with labels for the views of two epochs."""
    chance = torch.Generator().manual_seed(1)
    for epoch, values in enumerate(torch.randn(2, 12, 3, generator=chance).half()):
        safetensors_io.save(StoredLabels(tmp_path, 2, 3).file(epoch), {"values": values})
    protocol = {"epochs": 2, "labels": "views", "batch": 5, "temperature": 2.0, "view_scale": 0.5}
    return replace(a_set(protocol=protocol, soft_labels={"epochs": 2}), labels_of_views=tmp_path)


def test_length_index_and_slices_are_those_of_the_stored_samples():
    s = a_set()
    assert len(s) == 12
    image, label = s[5]
    assert torch.equal(image, s.images[5])
    assert (label, type(label)) == (1, int)
    assert s[np.int64(-1)][1] == 2
    images, labels = s[2:5]
    assert torch.equal(images, s.images[2:5])
    assert labels.tolist() == [0, 0, 1]
    assert s[[0, 11]][1].tolist() == [0, 2]
    assert [label for _, label in s] == s.labels.tolist()
    with pytest.raises(IndexError):
        s[12]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("formation", [1, 2])
def test_the_dataset_has_the_images_that_a_network_trains_on(workers, formation):
    s = a_set(formation=formation)
    expected = s.training_set()
    dataset = s.as_dataset()
    assert len(dataset) == 12 * formation**2
    images, labels = next(iter(DataLoader(dataset, batch_size=len(dataset), num_workers=workers)))
    assert torch.equal(images, expected.images)
    assert torch.equal(labels, expected.labels)


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (1, 8, 8)])
def test_clips_and_grey_images_load_in_the_same_way(shape):
    images, labels = next(iter(a_set(shape).train_loader(batch_size=6)))
    assert images.shape == (6, *shape)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)


def test_a_plain_loader_gives_every_image_once_in_an_order_of_the_seed_and_the_epoch():
    s = a_set(formation=2, protocol={"epochs": 3, "augment": "flip_crop", "cutmix": 1.0})
    loader = s.train_loader(batch_size=7, seed=1, augment=False)
    first, second = (list(loader) for _ in range(2))
    assert [len(labels) for _, labels in first] == [7] * 6 + [6]
    assert len(loader) == 7
    again = list(s.train_loader(batch_size=7, seed=1, augment=False))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], second[0][0])
    data = s.training_set()
    for epoch in (first, second):
        images, labels = (torch.cat(parts) for parts in zip(*epoch, strict=True))
        places = [int((data.images == image).flatten(1).all(1).nonzero()) for image in images]
        assert sorted(places) == list(range(48))
        assert torch.equal(labels, data.labels[places])


def test_without_shuffling_the_order_is_the_stored_one():
    s = a_set()
    batches = list(s.train_loader(batch_size=11, shuffle=False))
    assert len(batches) == 1, "a last batch of one image would break batch norm"
    assert torch.equal(batches[0][0], s.images)


def test_the_protocols_augmentation_and_cutmix_are_on_unless_switched_off():
    s = a_set(protocol={"epochs": 3, "augment": "flip", "batch": 12})
    images, labels = next(iter(s.train_loader(shuffle=False)))
    mirrored = [torch.equal(image, original.flip(-1)) for image, original in zip(images, s.images, strict=True)]
    assert 0 < sum(mirrored) < 12
    assert torch.equal(labels, s.labels)
    mixed = a_set(protocol={"epochs": 3, "cutmix": 1.0, "batch": 12}).train_loader()
    images, targets = next(iter(mixed))
    assert targets.shape == (12, 3)
    assert torch.allclose(targets.sum(1), torch.ones(12))
    assert ((targets > 0) & (targets < 1)).any()


def test_learned_soft_labels_come_as_probabilities_at_the_temperature():
    logits = torch.randn(12, 3, generator=torch.Generator().manual_seed(2))
    s = a_set(protocol={"epochs": 2, "labels": "soft", "temperature": 2.0}, extras={"soft_labels": logits})
    _, targets = next(iter(s.train_loader(shuffle=False)))
    assert torch.allclose(targets, (logits / 2).softmax(1))


def test_labels_of_views_come_with_their_views_and_only_in_their_batches(view_set):
    s = view_set
    loader, data, protocol = s.train_loader(), s.training_set(), s.protocol
    assert len(loader) == 3
    for epoch in range(3):  # the third repeats the first of two labelled epochs
        for ours, (views, [(_, log_targets, _)]) in itertools.zip_longest(loader, view_batches(data, protocol, epoch)):
            assert torch.equal(ours[0], views)
            assert torch.allclose(ours[1].log(), log_targets, atol=1e-5)
    for wrong in ({"batch_size": 4}, {"shuffle": False}):
        with pytest.raises(UserError, match=r"views in shuffled batches of 5.*augment=False"):
            s.train_loader(**wrong)
    images, labels = next(iter(s.train_loader(batch_size=12, shuffle=False, augment=False)))
    assert torch.equal(images, s.images)
    assert torch.equal(labels, s.labels)


def test_no_loader_reads_or_changes_the_global_random_state(view_set):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    s = a_set(protocol={"epochs": 2, "augment": "color_crop_cutout_flip_scale_rotate", "cutmix": 1.0})
    once = [batch[0] for batch in s.train_loader()]
    torch.manual_seed(7)
    assert all(torch.equal(a, b[0]) for a, b in zip(once, s.train_loader(), strict=True))
    torch.set_rng_state(before[0])
    list(view_set.train_loader())
    list(s.train_loader(augment=False))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])


def test_a_loader_of_the_protocol_trains_a_network():
    s = a_set(protocol={"epochs": 40, "augment": "flip", "batch": 6})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    optimizer, loader = torch.optim.SGD(network.parameters(), 0.05), s.train_loader()
    for _ in range(s.protocol.epochs):
        for images, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(network(images), targets).backward()
            optimizer.step()
    assert network(s.images).argmax(1).tolist() == s.labels.tolist()


def test_missing_labels_of_views_are_an_error(view_set):
    s = replace(view_set, labels_of_views=None)
    with pytest.raises(UserError, match=r"lacks the labels of its views"):
        s.train_loader()


def pictures(folder, mode: str, ending: str) -> None:
    """Coloured gradients with noise, of several sizes; one JPEG is turned by its EXIF tag."""
    chance = np.random.default_rng(0)
    for split, name in itertools.product(("train", "test"), NAMES):
        target = folder / split / name
        target.mkdir(parents=True)
        for k, (height, width) in enumerate([(16, 16), (40, 61), (97, 50), (33, 128)]):
            y, x = np.mgrid[0:height, 0:width]
            waves = [np.sin(x / (5 + k + c)) + np.cos(y / (7 - c)) for c in range(3)]
            pixels = (np.stack(waves, -1) * 50 + 128 + chance.normal(0, 8, (height, width, 3))).clip(0, 255)
            exif = Image.Exif()
            exif[0x0112] = 6 if k == 1 else 1
            Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(target / f"{k}.{ending}", quality=95, exif=exif)


@pytest.mark.parametrize("resize", ["square", "crop"])
@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("RGB", 1), ("L", 3), ("L", 1)])
def test_real_images_become_what_the_prepared_test_data_are(tmp_path, make_run, resize, mode, channels):
    pictures(tmp_path / "data", mode, "png")
    settings = {
        "source": "imagefolder",
        "path": str(tmp_path / "data"),
        "size": 16,
        "channels": channels,
        "resize": resize,
    }
    overrides = {f"data__{key}": value for key, value in settings.items()} | {
        "data__holdout": None,
        "data__classes": None,
    }
    prepared = PreparedDataset(make_run(tmp_path / "run", **overrides).stages("ingest").dir / "prepared")
    normalization = normalization_of(prepared)
    s = SyntheticSet(torch.zeros(1, *prepared.shape), torch.zeros(1, dtype=torch.int64),
                     {"class_names": NAMES, "normalization": normalization.card(), "resize": resize})  # fmt: skip
    expected = normalization.apply(torch.from_numpy(prepared.load("test")[0]))
    real = ImageFolder(str(tmp_path / "data" / "test"), s.test_transform(), loader=Image.open)
    assert torch.allclose(torch.stack([image for image, _ in real]), expected, atol=1e-6)
    # a tensor has no EXIF tag
    as_tensors = ImageFolder(str(tmp_path / "data" / "test"), v2.Compose([v2.PILToTensor(), s.test_transform()]))
    upright = [k for k in range(len(expected)) if k % 4 != 1]
    assert torch.allclose(torch.stack([image for image, _ in as_tensors])[upright], expected[upright], atol=0.03 / 0.2)


def test_a_jpeg_is_close_to_its_reduced_decoding(tmp_path, make_run):
    pictures(tmp_path / "data", "RGB", "jpg")
    run = make_run(tmp_path / "run", data__source="imagefolder", data__path=str(tmp_path / "data"), data__size=16,
                   data__channels=3, data__holdout=None, data__classes=None)  # fmt: skip
    prepared = PreparedDataset(run.stages("ingest").dir / "prepared")
    normalization = normalization_of(prepared)
    s = SyntheticSet(torch.zeros(1, *prepared.shape), torch.zeros(1, dtype=torch.int64),
                     {"class_names": NAMES, "normalization": normalization.card(), "resize": "square"})  # fmt: skip
    expected = normalization.apply(torch.from_numpy(prepared.load("test")[0]))
    real = ImageFolder(str(tmp_path / "data" / "test"), s.test_transform())
    difference = (torch.stack([image for image, _ in real]) - expected).abs() * torch.tensor(prepared.std).view(3, 1, 1)
    assert float(difference.mean()) < 2 / 255


def test_a_finished_run_says_how_real_images_are_resized(digits_run):
    s, prepared = synthetic_set.load(digits_run.dir), PreparedDataset(digits_run.dir / "prepared")
    stored = torch.from_numpy(prepared.load("test")[0])
    transform = pickle.loads(pickle.dumps(s.test_transform()))  # for the workers of a DataLoader
    assert torch.equal(transform(stored), s.normalization.apply(stored))
    assert torch.equal(transform(Image.fromarray(stored[3, 0].numpy())), s.normalization.apply(stored)[3])
    assert "resize='square'" in repr(transform)


def test_whitened_sets_whiten_real_images_too(tmp_path, make_run):
    run = make_run(tmp_path / "run", data__whiten="zca", distill__method="dm").stages(
        "ingest", "score", "select", "distill"
    )
    s, prepared = synthetic_set.load(run.dir), PreparedDataset(run.dir / "prepared")
    stored = torch.from_numpy(prepared.load("test")[0][:5])
    assert torch.equal(s.test_transform()(stored), normalization_of(prepared).apply(stored))


def test_an_older_set_asks_for_the_resize():
    s = a_set()
    with pytest.raises(UserError, match=r"older version wrote it; call test_transform\(resize=\.\.\.\)"):
        s.test_transform()
    wide = torch.zeros(3, 8, 16, dtype=torch.uint8)
    wide[..., 4:12] = 255
    crop, square = (s.test_transform(resize=resize)(wide) for resize in ("crop", "square"))
    assert crop.shape == square.shape == (3, 8, 8)
    assert float(crop.std(dim=(1, 2)).max()) == 0 < float(square.std(dim=(1, 2)).min())


def test_clips_are_transformed_frame_by_frame_and_a_wrong_number_of_frames_is_an_error():
    s = a_set((4, 3, 8, 8), resize="square")
    frames = torch.randint(256, (4, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clip = s.test_transform()(frames)
    of_image = a_set(resize="square").test_transform()
    assert torch.equal(clip, torch.stack([of_image(frame) for frame in frames]))
    with pytest.raises(UserError, match=r"shape \[7, 3, 8, 8\], .*\[4, 3, 8, 8\]; of a video, draw 4 frames first"):
        s.test_transform()(torch.zeros(7, 3, 8, 8, dtype=torch.uint8))


def test_arrays_are_only_normalised():
    card = {"class_names": NAMES, "kind": "tensors", "protocol": {"epochs": 1},
            "normalization": {"mean": [1.0, 2.0], "std": [2.0, 4.0], "scale": 1, "inner": 1}}  # fmt: skip
    s = SyntheticSet(torch.zeros(3, 2, 5), torch.arange(3), card)
    values = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    expected = (values - torch.tensor([[1.0], [2.0]])) / torch.tensor([[2.0], [4.0]])
    assert torch.allclose(s.test_transform()(values), expected)
    with pytest.raises(UserError, match=r"shape \[2, 6\]"):
        s.test_transform()(torch.zeros(2, 6))


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3, 8, 8), torch.zeros(8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, dtype=torch.uint8)]
)
def test_what_is_no_image_is_refused_with_what_is_allowed(wrong):
    with pytest.raises(UserError, match=r"takes a PIL image or a uint8 tensor \[\.\.\., C, H, W\]"):
        a_set(resize="square").test_transform()(wrong)
