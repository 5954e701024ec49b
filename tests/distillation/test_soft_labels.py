"""Soft labels of views: the views, how labels are stored, and that every worker and student gets the same."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distill_at_scale.core import safetensors_io
from distill_at_scale.core.collectives import SingleProcess
from distill_at_scale.core.errors import UserError
from distill_at_scale.distillation.soft_labels import (
    StoredLabels,
    Teacher,
    TeacherFacts,
    TeacherLabels,
    ViewPlan,
    compact,
    crop_and_flip,
    expand,
    relabel,
    resized_crop_boxes,
    with_normalization,
)

SHAPE, CLASSES = (1, 8, 8), 6
CPU = torch.device("cpu")
PLAN = ViewPlan(seed=3, batch=4, min_area=0.3, flip=True, cutmix=0.5)


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def a_teacher(seed: int = 0, columns=None) -> Teacher:
    facts = TeacherFacts("convnet_bn", SHAPE, CLASSES, 6, None, (1.0,), (0.0,), columns)
    return Teacher.from_state(facts, facts.spec.build(seed).state_dict(), CPU)


class Pretended:
    """One of several workers; what each gathers is collected from all by running them one after the other."""

    def __init__(self, rank: int, size: int, parts: list):
        self.rank, self.size, self.parts = rank, size, parts

    def gather(self, value):
        self.parts.append(value)
        return [value]

    def broadcast(self, value):
        return value


def test_crops_are_inside_the_image_and_their_areas_fill_the_range():
    boxes = resized_crop_boxes(torch.rand(2000, 4, generator=chance()), 0.25)
    assert float(boxes.min()) >= 0
    assert float((boxes[:, :2] + boxes[:, 2:]).max()) <= 1 + 1e-6
    area, ratio = boxes[:, 2] * boxes[:, 3], boxes[:, 3] / boxes[:, 2]
    assert 0.25 <= float(area.min()) < 0.27
    assert 0.98 < float(area.max()) <= 1 + 1e-6
    assert float(area.mean()) == pytest.approx(0.625, abs=0.02)
    assert 3 / 4 - 1e-3 <= float(ratio.min()) < 0.8 < 1.25 < float(ratio.max()) <= 4 / 3 + 1e-3


def test_a_view_of_everything_is_the_image():
    images = torch.rand(3, *SHAPE, generator=chance())
    assert torch.allclose(crop_and_flip(images, resized_crop_boxes(torch.rand(3, 4), 1.0)), images, atol=1e-5)


def test_a_crop_shows_its_quarter_and_a_flip_mirrors_it():
    images = torch.zeros(1, 1, 8, 8)
    images[..., :4, 4:] = torch.linspace(0.5, 1, 4)  # the quarter at the top right
    box = torch.tensor([[0.0, 0.5, 0.5, 0.5]])
    view, mirrored = crop_and_flip(images, box), crop_and_flip(images, box, torch.tensor([True]))
    assert float(view.min()) > 0.25  # at its edge half a pixel of the neighbour shows
    assert torch.allclose(mirrored, view.flip(3), atol=1e-6)
    assert bool((view[0, 0, 3].diff() >= 0).all())


def test_the_frames_of_a_clip_get_the_same_view():
    clips = torch.rand(2, 1, 1, 8, 8, generator=chance()).expand(2, 5, 1, 8, 8)
    views = crop_and_flip(
        clips, resized_crop_boxes(torch.rand(2, 4, generator=chance()), 0.1), torch.tensor([True, False])
    )
    assert views.shape == clips.shape
    assert torch.allclose(views, views[:, :1].expand_as(views))
    assert not torch.allclose(views, clips)


def test_views_follow_from_seed_and_epoch_alone():
    again = ViewPlan(3, 4, 0.3, True, 0.5)
    for a, b in zip(PLAN.batches(7, 10), again.batches(7, 10), strict=True):
        assert torch.equal(a.rows, b.rows)
        assert torch.equal(a.boxes, b.boxes)
        assert a.cutmix_seed == b.cutmix_seed
    other = next(iter(PLAN.batches(8, 10)))
    assert not torch.equal(other.boxes, next(iter(PLAN.batches(7, 10))).boxes)


@pytest.mark.parametrize(("count", "sizes"), [(8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (1, [1])])
def test_an_epoch_shows_every_image_once_and_no_batch_has_one_image(count, sizes):
    batches = list(PLAN.batches(0, count))
    assert [len(b.rows) for b in batches] == sizes
    assert torch.cat([b.rows for b in batches]).sort().values.tolist() == list(range(count))
    assert [b.first for b in batches] == [sum(sizes[:k]) for k in range(len(sizes))]


def test_without_flip_and_cutmix_views_are_crops_only():
    for batch in ViewPlan(0, 4, 0.3, False, 0.0).batches(0, 8):
        assert batch.flipped is None
        assert batch.cutmix_seed is None
    assert all(b.cutmix_seed is not None for b in ViewPlan(0, 4, 0.3, False, 1.0).batches(0, 8))


def test_cutting_and_mixing_repeats_itself():
    plan, images = ViewPlan(0, 6, 0.3, False, 1.0), torch.rand(6, *SHAPE, generator=chance())
    batches = [next(iter(plan.batches(epoch, 6))) for epoch in range(5)]
    assert all(torch.equal(batch.apply(images), batch.apply(images)) for batch in batches)
    assert any(not torch.equal(batch.apply(images), crop_and_flip(images, batch.boxes)) for batch in batches)


def test_all_classes_are_stored_to_half_precision():
    logits = torch.randn(5, CLASSES, generator=chance()) * 10 + 300
    actual = expand(compact(logits, None, 20.0), CLASSES)
    assert torch.allclose(actual.softmax(1), logits.softmax(1), atol=5e-3)
    assert torch.allclose((actual / 20).softmax(1), (logits / 20).softmax(1), atol=1e-4)


@pytest.mark.parametrize("heat", [1.0, 20.0])
def test_the_largest_keep_their_probability_and_the_rest_is_spread_evenly(heat):
    logits = torch.randn(5, CLASSES, generator=chance()) * 4
    values, classes = compact(logits, 2, heat)
    assert (values.dtype, classes.dtype, values.shape) == (torch.float16, torch.int16, (5, 2))
    actual, expected = (expand((values, classes), CLASSES) / heat).softmax(1), (logits / heat).softmax(1)
    top = expected.topk(2, dim=1).indices
    assert torch.allclose(actual.gather(1, top), expected.gather(1, top), atol=2e-3)
    rest = actual.scatter(1, top, 0.0)
    assert torch.allclose(rest.sum(1), 1 - expected.gather(1, top).sum(1), atol=2e-3)
    spread = rest[rest > 0].view(5, CLASSES - 2)
    assert torch.allclose(spread, spread[:, :1].expand_as(spread))


def test_as_many_as_there_are_classes_are_all_of_them():
    logits = torch.randn(2, CLASSES, generator=chance())
    assert compact(logits, CLASSES, 1.0)[1] is None
    assert torch.equal(compact(logits, CLASSES + 4, 1.0)[0], compact(logits, None, 1.0)[0])


@pytest.mark.parametrize("top_k", [None, 2])
def test_stored_labels_are_the_teachers_outputs_for_the_same_views(tmp_path, top_k):
    images, asked = torch.randn(10, *SHAPE, generator=chance()), TeacherLabels(a_teacher(), 3, top_k, 5.0)
    relabel(images, PLAN, asked, SingleProcess(), tmp_path)
    stored = StoredLabels(tmp_path, 3, CLASSES)
    assert stored.problem(10) is None
    for epoch in range(3):
        for batch in PLAN.batches(epoch, 10):
            views = batch.apply(images[batch.rows])
            assert torch.equal(stored.logits(epoch, batch, views), asked.logits(epoch, batch, views))
            assert float(stored.logits(epoch, batch, views).abs().max()) > 0


def test_the_size_is_two_bytes_a_class_or_four_of_those_that_are_stored(tmp_path):
    images = torch.randn(10, *SHAPE, generator=chance())
    for top_k, each in ((None, 2 * CLASSES), (2, 2 * 4)):
        asked = TeacherLabels(a_teacher(), 3, top_k, 5.0)
        assert relabel(images, PLAN, asked, SingleProcess(), tmp_path / str(top_k)) == 10 * 3 * each


def test_workers_share_the_epochs(tmp_path):
    images, asked = torch.randn(10, *SHAPE, generator=chance()), TeacherLabels(a_teacher(), 5, None, 5.0)
    relabel(images, PLAN, asked, SingleProcess(), tmp_path)
    parts: list = [[], []]
    assert relabel(images, PLAN, asked, Pretended(1, 2, parts[1]), tmp_path / "other node") == 0
    assert not (tmp_path / "other node").exists()
    relabel(images, PLAN, asked, Pretended(0, 2, parts[0]), tmp_path / "first node")
    assert len(parts[0]) == len(parts[1]) == 3  # as many exchanges, though one has nothing to give in the last
    assert parts[1][2] is None
    shared = dict(part for pair in zip(*parts, strict=True) for part in pair if part is not None)
    assert sorted(shared) == [0, 1, 2, 3, 4]
    for epoch, tensors in shared.items():
        assert torch.equal(
            tensors["values"], safetensors_io.load(StoredLabels(tmp_path, 5, CLASSES).file(epoch))["values"]
        )


def test_an_interrupted_relabelling_goes_on_with_the_missing_epochs(tmp_path, monkeypatch):
    images, asked, stored = torch.randn(10, *SHAPE, generator=chance()), TeacherLabels(a_teacher(), 4, 2, 5.0), []
    whole, parts = StoredLabels(tmp_path / "whole", 4, CLASSES), StoredLabels(tmp_path / "parts", 4, CLASSES)
    relabel(images, PLAN, asked, SingleProcess(), whole.folder)
    save = safetensors_io.save

    def stop_at_the_third(path, tensors):
        if len(stored) == 2:
            raise KeyboardInterrupt
        stored.append(path.name)
        save(path, tensors)

    monkeypatch.setattr(safetensors_io, "save", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        relabel(images, PLAN, asked, SingleProcess(), parts.folder)
    assert "epoch-00002.safetensors cannot be read" in str(parts.problem(10))
    monkeypatch.setattr(safetensors_io, "save", lambda path, tensors: (stored.append(path.name), save(path, tensors)))
    size = relabel(images, PLAN, asked, SingleProcess(), parts.folder)
    assert stored == [f"epoch-{epoch:05d}.safetensors" for epoch in range(4)]
    assert size == 4 * 10 * 2 * 4
    assert all(parts.file(epoch).read_bytes() == whole.file(epoch).read_bytes() for epoch in range(4))


def test_a_teacher_is_loaded_as_it_was_saved(tmp_path):
    teacher, images = a_teacher(columns=(2, 0)), torch.randn(3, *SHAPE, generator=chance())
    teacher.save(tmp_path / "t.safetensors")
    again = Teacher.load(tmp_path / "t.safetensors", CPU)
    assert again.facts == teacher.facts
    assert torch.equal(again(images), teacher(images))
    assert torch.equal(again(images), a_teacher()(images)[:, [2, 0]])


def test_a_damaged_teacher_is_named(tmp_path):
    a_teacher().save(tmp_path / "t.safetensors")
    (tmp_path / "t.safetensors").write_bytes((tmp_path / "t.safetensors").read_bytes()[:50])
    with pytest.raises(UserError, match=r"teacher .*t\.safetensors cannot be read.*renamed to t\.safetensors\.damaged"):
        Teacher.load(tmp_path / "t.safetensors", CPU)


def test_weights_that_expect_another_normalisation_get_it():
    own, theirs = ((0.5,), (0.25,)), ((0.4,), (0.2,))
    pixels = torch.rand(2, *SHAPE, generator=chance())
    facts = with_normalization(a_teacher().facts, own, theirs)

    class Same(nn.Module):
        def forward(self, images):
            return images

    seen = Teacher(facts, Same())((pixels - 0.5) / 0.25)
    assert torch.allclose(seen, (pixels - 0.4) / 0.2, atol=1e-6)
    assert not math.isclose(float(seen.mean()), float(((pixels - 0.5) / 0.25).mean()), abs_tol=1e-3)
