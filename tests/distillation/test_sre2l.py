"""SRe2L: the recovery against its formula, its batches, and resuming."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from teacher_cases import CLASSES, CPU, NAMES, SHAPE, make_config, make_context, make_sampler, make_teacher

from distill_at_scale.core import rng, safetensors_io
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.distillation.methods.sre2l import BatchNormLoss, SRe2L
from distill_at_scale.distillation.soft_labels import TEACHER, StoredLabels, Teacher, crop_and_flip, resized_crop_boxes


@pytest.fixture
def recovery(tmp_path):
    """recovery(labels=..., steps=..., **options): a prepared backend with the same teacher."""

    def prepared(labels=None, **options) -> SRe2L:
        context = make_context(tmp_path, "sre2l", **options)
        if not (tmp_path / TEACHER).exists():
            make_teacher(context)
        if labels is not None:
            object.__setattr__(context, "labels", labels)
        method = SRe2L(context)
        method.prepare(make_sampler())
        return method

    return prepared


def test_the_distance_is_that_of_means_and_variances_before_every_batch_norm(recovery):
    teacher = recovery().teacher
    images, layers = torch.randn(5, *SHAPE), teacher.network.features
    with BatchNormLoss(teacher) as statistics:
        teacher(images)
        actual = statistics.value()
    entering, expected = images, torch.zeros(())
    for layer in layers:
        if isinstance(layer, torch.nn.BatchNorm2d):
            expected = expected + (entering.mean((0, 2, 3)) - layer.running_mean).norm()
            expected = expected + (entering.var((0, 2, 3), unbiased=False) - layer.running_var).norm()
        entering = layer(entering)
    assert float(actual) == pytest.approx(float(expected), rel=1e-4)
    assert float(expected) > 0


def class_images(method, label):
    return torch.cat(list(method._real_images(label)))


def test_moments_are_those_of_all_images_of_a_class_and_add_up_to_those_of_all(recovery, monkeypatch):
    method = recovery()
    monkeypatch.setattr(type(method.teacher.facts.spec), "microbatch", lambda self, device: 3)
    entering, expected = class_images(method, 1), []
    for layer in method.teacher.network.features:
        if isinstance(layer, torch.nn.BatchNorm2d):
            expected.append(torch.stack([entering.mean((0, 2, 3)), entering.var((0, 2, 3), unbiased=False)]))
        entering = layer(entering)
    moments = [method.batch_norm_loss.moments(method._real_images(label)) for label in range(CLASSES)]
    assert torch.allclose(moments[1], torch.cat(expected, 1), atol=1e-5)
    together = method.batch_norm_loss.moments([class_images(method, label) for label in range(CLASSES)])
    counts = torch.tensor([float(method.real.count(label)) for label in range(CLASSES)])
    mean = sum(n * own[0] for n, own in zip(counts, moments, strict=True)) / counts.sum()
    assert torch.allclose(together[0], mean, atol=1e-5)


def test_a_step_with_class_statistics_takes_each_class_alone(recovery):
    method = recovery(statistics=0.5, steps=10, class_statistics=True)
    assert [rows.tolist() for rows in method.batches] == [[0, 1], [2, 3], [4, 5]]
    before, (boxes, _) = method.images.detach().clone(), method._views(0)
    images, loss = before.flatten(0, 1).requires_grad_(True), torch.zeros(())
    for label in range(CLASSES):
        with torch.no_grad():
            moments = BatchNormLoss(method.teacher).moments([class_images(method, label)])
        own = slice(2 * label, 2 * label + 2)
        with BatchNormLoss(method.teacher, first=10).against(moments) as statistics:
            logits = method.teacher(crop_and_flip(images[own], boxes[own]))
            loss = loss + F.cross_entropy(logits, torch.tensor([label, label])) + 0.5 * statistics.value()
    loss.backward()
    torch.optim.Adam([images], 0.25, (0.5, 0.9)).step()
    metrics = method.step(0)
    expected = images.detach().clamp(method.lowest, method.highest)
    assert torch.allclose(method.images.detach().flatten(0, 1), expected, atol=1e-4)
    assert metrics["loss"] == pytest.approx(float(loss.detach()) / CLASSES, rel=1e-4)


def test_class_statistics_give_the_same_images_for_any_number_of_workers_and_after_a_resume(recovery, monkeypatch):
    keys = {"class_statistics": True, "steps": 4}
    together = recovery(**keys)
    parts = [recovery(labels=labels, **keys) for labels in ([0, 2], [1])]
    for i in range(2):
        for method in (together, *parts):
            method.step(i)
    merged = {key: value for part in parts for key, value in part.state_dict().items()}
    resumed = recovery(**keys)
    resumed.load_state_dict(merged)
    assert torch.equal(resumed.images, together.images)
    monkeypatch.setattr(BatchNormLoss, "moments", None)  # they are part of the state
    for i in (2, 3):
        together.step(i)
        resumed.step(i)
    assert torch.equal(resumed.images, together.images)


def test_the_smallest_crop_falls_along_a_cosine(recovery):
    method = recovery(crop_schedule="cosine", steps=10)
    constant = recovery(recover_scale=0.08 + 0.92 * (1 + math.cos(0.5 * math.pi)) / 2, steps=10)
    assert torch.equal(method._views(0)[0], torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(2 * CLASSES, 4)), "whole images"
    assert torch.equal(method._views(5)[0], constant._views(5)[0])
    areas = [float(method._views(step)[0][:, 2:].prod(1).min()) for step in range(11)]
    assert 0.08 <= areas[10] < 0.5 < areas[2]


def test_between_blocks_images_move_towards_their_start_and_the_optimizer_is_new(recovery):
    keys = {
        "steps": 4,
        "blocks": 2,
        "residual": 0.25,
        "teacher_network": "teacher_cases:Pooled",
        "block_sizes": [10, 8],
    }
    method = recovery(**keys)
    start = method.start.clone()
    assert method.images.shape[-2:] == (10, 10)
    for i in range(2):
        method.step(i)
    expected = 0.25 * method._resized(method.images.detach(), 8) + 0.75 * start
    assert torch.equal(method.snapshot()[0], method._resized(method.images.detach(), 8).flatten(0, 1))
    state = {key: value.clone() for key, value in method.state_dict().items()}
    seen = []
    update, method.update = (
        method.update,
        lambda losses, i: (seen.append(method.images.detach().clone()), update(losses, i))[1],
    )
    method.step(2)
    assert torch.allclose(seen[0], expected, atol=1e-6)
    assert float(method.optimizer.state[method.images]["step"]) == 1
    resumed = recovery(**keys)
    resumed.load_state_dict(state)
    resumed.step(2)
    assert torch.equal(resumed.images, method.images)
    state = {key: value.clone() for key, value in method.state_dict().items()}
    again = recovery(**keys)
    again.load_state_dict(state)
    for one in (again, method):
        one.step(3)
    assert torch.equal(again.images, method.images)


def test_patches_are_crops_of_medium_loss(recovery):
    method = recovery(init="patches")
    images = method.real.draw([1], 300, "patches")[0].images
    numbers = torch.rand(len(images), 4, generator=rng.generator(method.context.seed, "patch crops", 1))
    patches = crop_and_flip(images, resized_crop_boxes(numbers, 0.5))
    losses = F.cross_entropy(
        method.teacher.logits(patches), torch.ones(len(patches), dtype=torch.long), reduction="none"
    )
    chosen = [int((patches == one).flatten(1).all(1).nonzero()[0]) for one in method.images.detach()[1]]
    below = [int((losses < losses[k]).sum()) for k in chosen]
    assert sorted(below) == [(len(losses) - 2) // 2, (len(losses) - 2) // 2 + 1]


def test_a_teacher_without_global_pooling_takes_no_other_size():
    with pytest.raises(
        UserError, match=r"teacher_network = 'convnet_bn' takes no images of 4 pixels, .*leave block_sizes out"
    ):
        SRe2L.protocol(make_config("sre2l", teacher_network="convnet_bn", block_sizes=[4]))


def test_a_step_follows_adam_on_the_reference_gradient(recovery):
    method = recovery(statistics=0.5, steps=10)
    before = method.images.detach().clone()
    boxes, flipped = method._views(0)
    assert flipped is None
    images = before.flatten(0, 1).requires_grad_(True)
    with BatchNormLoss(method.teacher) as statistics:
        logits = method.teacher(crop_and_flip(images, boxes))
        loss = F.cross_entropy(logits, torch.tensor([0, 0, 1, 1, 2, 2])) + 0.5 * statistics.value()
    loss.backward()
    adam = torch.optim.Adam([images], 0.25, (0.5, 0.9))
    adam.step()
    expected = images.detach().clamp(method.lowest, method.highest)
    metrics = method.step(0)
    assert torch.allclose(method.images.detach().flatten(0, 1), expected, atol=1e-4)
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)


def test_the_rate_follows_a_cosine(recovery):
    method = recovery(steps=4)
    rates = []
    for i in range(4):
        method.step(i)
        rates.append(method.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.25 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)])


def test_images_stay_pixels_and_their_loss_falls(recovery):
    method = recovery(steps=30)
    losses = [method.step(i)["loss"] for i in range(30)]
    shown_as = make_sampler().normalization.invert(method.snapshot()[0])
    assert float(shown_as.min()) >= -1e-5
    assert float(shown_as.max()) <= 1 + 1e-5
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_batches_mix_the_classes_and_hold_every_image_once(recovery):
    batches = recovery(recover_batch=3).batches
    assert torch.cat(batches).sort().values.tolist() == list(range(2 * CLASSES))
    for places in batches:
        assert sorted((places // 2).tolist()) == [0, 1, 2]  # ipc 2: each of the three classes once


@pytest.mark.parametrize(("most", "sizes"), [(4, [3, 3]), (5, [3, 3]), (100, [6]), (1, [1] * 6)])
def test_batches_are_of_nearly_one_size(recovery, most, sizes):
    assert [len(places) for places in recovery(recover_batch=most).batches] == sizes


def test_what_is_drawn_for_a_class_does_not_depend_on_who_owns_it(recovery):
    together, alone = recovery(), recovery(labels=[2])
    assert torch.equal(together.images[2], alone.images[0])
    assert torch.equal(together._views(5)[0][4:], alone._views(5)[0])
    assert not torch.equal(together._views(5)[0][:2], alone._views(5)[0])


def test_views_flip_where_the_teachers_strategy_does(recovery):
    _, flipped = recovery(teacher_augment="flip")._views(0)
    assert flipped is not None
    assert flipped.shape == (2 * CLASSES,)


def test_resuming_gives_the_same_images(recovery):
    uninterrupted, first = recovery(steps=4), recovery(steps=4)
    for i in range(4):
        uninterrupted.step(i)
    for i in range(2):
        first.step(i)
    state = {key: value.clone() for key, value in first.state_dict().items()}
    second = recovery(steps=4)
    second.load_state_dict(state)
    for i in (2, 3):
        second.step(i)
    assert torch.equal(second.images, uninterrupted.images)
    part = recovery(labels=[0, 2], steps=4)
    part.load_state_dict(state)
    assert torch.equal(part.images[1], first.images[2])


def test_non_finite_values_leave_the_images_unchanged_and_name_the_class(recovery):
    method = recovery(steps=4, recover_batch=1)
    with torch.no_grad():
        method.images[1, 0, 0, 0, 0] = float("nan")
    before = method.images.detach().clone()
    with pytest.raises(DistillationDiverged, match=r"class 'one' is not finite at step 3.*distill\.sre2l\.image_lr"):
        method.step(3)
    assert torch.equal(method.images.detach().nan_to_num(), before.nan_to_num())


def test_recovered_images_are_what_the_teacher_takes_them_for(recovery):
    method = recovery(steps=40)
    for i in range(40):
        method.step(i)
    images, labels = method.snapshot()
    assert float((method.teacher(images).argmax(1) == labels).float().mean()) > 0.8


def test_the_conclusion_holds_labels_teacher_and_their_size(recovery):
    method = recovery(top_k=2)
    more = method.finalize(*method.snapshot())
    stored = StoredLabels(more.labels, 2, CLASSES)
    assert stored.problem(6) is None
    assert safetensors_io.load(stored.file(1))["values"].shape == (6, 2)
    assert more.card["soft_label_bytes"] == 2 * 6 * 2 * 4
    assert more.card["soft_labels"]["bytes_per_image"] == 16
    state = {k.partition("/")[2]: v for k, v in more.extras.items() if k.startswith("teacher/")}
    assert torch.equal(
        Teacher.from_state(method.teacher.facts, state, CPU)(torch.ones(1, *SHAPE)),
        method.teacher(torch.ones(1, *SHAPE)),
    )
    assert method.context.class_names == NAMES
