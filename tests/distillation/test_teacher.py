"""The teacher of SRe2L and RDED: training, resuming, pretrained weights, and configurations that are refused before a run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from teacher_cases import CLASSES, QUICK, SHAPE, make_config, make_context, make_sampler, make_teacher

from distill_at_scale.config import load as configuration
from distill_at_scale.core import safetensors_io
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.distillation.methods.shared import teacher as teachers
from distill_at_scale.distillation.soft_labels import TEACHER, Teacher
from distill_at_scale.models.spec import NetworkSpec


def weights(teacher: Teacher) -> torch.Tensor:
    return torch.cat([p.reshape(-1) for p in teacher.network.parameters()])


def test_a_teacher_learns_the_kept_samples(tmp_path):
    pool, teacher = make_sampler(), make_teacher(make_context(tmp_path, teacher_epochs=15))
    pixels, labels = pool.all_samples()
    answers = teacher.logits(pool.normalization.apply(pixels))
    assert float((answers.argmax(1) == labels).float().mean()) > 0.9
    assert "right in the last one" in teacher.facts.origin


def test_a_teacher_reports_the_samples_that_it_has_seen(tmp_path):
    seen, context = list[int](), make_context(tmp_path, teacher_epochs=2)
    make_teacher(replace(context, progressed=seen.append))
    assert seen == [16, 32, 48, 60, 76, 92, 108, 120]
    assert METHODS["rded"].network_epochs(context.config) == 2


@pytest.mark.parametrize("infobatch", [0.0, 0.5])
def test_an_interrupted_teacher_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, infobatch):
    options = {"teacher_epochs": 4, "teacher_infobatch": infobatch}
    uninterrupted = make_teacher(make_context(tmp_path / "a", **options))
    context, epoch = make_context(tmp_path / "b", **options), teachers.TeacherTraining._epoch

    def stop(self, pixels, labels, normalization, number):
        if number == 2:
            raise KeyboardInterrupt
        return epoch(self, pixels, labels, normalization, number)

    monkeypatch.setattr(teachers.TeacherTraining, "_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        make_teacher(context)
    assert not (context.networks / TEACHER).exists()
    seen = []
    monkeypatch.setattr(teachers.TeacherTraining, "_epoch", lambda *a: (seen.append(a[4]), epoch(*a))[1])
    assert torch.equal(weights(make_teacher(context)), weights(uninterrupted))
    assert seen == [2, 3]
    assert [p.name for p in context.networks.iterdir()] == [TEACHER]


def test_a_teacher_with_infobatch_leaves_out_easy_samples_until_the_last_epoch(tmp_path):
    seen, context = list[int](), make_context(tmp_path, teacher_epochs=8, teacher_infobatch=0.5)
    make_teacher(replace(context, progressed=seen.append))
    epochs = [[n - 60 * k for n in seen if 60 * k < n <= 60 * (k + 1)] for k in range(8)]
    assert [max(epochs[k]) for k in (0, 7)] == [60, 60]
    assert all(30 <= max(epoch) < 60 for epoch in epochs[1:7])
    options = METHODS["rded"].network_options
    assert options(context.config) != options(make_config(teacher_epochs=8))
    assert "teacher_infobatch" not in options(make_config())  # teachers of earlier versions stay valid


def test_both_methods_share_a_teacher_with_equal_options():
    options = [METHODS[m].network_options(make_config(m)) for m in ("sre2l", "rded")]
    assert options[0] == options[1]
    assert options[0] != METHODS["rded"].network_options(make_config(teacher_lr=0.1))
    assert options[0] == METHODS["rded"].network_options(make_config(label_epochs=7, crops=2))


def test_a_teacher_that_diverges_says_so(tmp_path):
    with pytest.raises(DistillationDiverged, match=r"teacher diverged in epoch 0.*distill\.rded\.teacher_lr"):
        make_teacher(make_context(tmp_path, teacher_lr=1e30))


def ready_made(folder, classes=CLASSES, names=None):
    spec = NetworkSpec("convnet_bn", SHAPE, classes, 6)
    path = folder / "w.safetensors"
    save_file(spec.build(9).state_dict(), path, {"class_names": json.dumps(names)} if names else None)
    return spec.build(9).eval(), str(path)


def test_pretrained_weights_are_loaded_and_identified_by_content(tmp_path):
    network, path = ready_made(tmp_path)
    teacher = make_teacher(make_context(tmp_path, teacher_weights=path))
    images = torch.randn(4, *SHAPE)
    assert torch.allclose(teacher(images), network(images), atol=1e-5)
    before = METHODS["rded"].network_options(make_config(teacher_weights=path))
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes((tmp_path / "w.safetensors").read_bytes())
    assert before == METHODS["rded"].network_options(make_config(teacher_weights=str(moved), teacher_lr=0.3))
    safetensors_io.save(moved, {k: v + 1 if v.is_floating_point() else v for k, v in network.state_dict().items()})
    assert before != METHODS["rded"].network_options(make_config(teacher_weights=str(moved)))


def test_pretrained_weights_of_another_class_order_are_reordered(tmp_path):
    network, path = ready_made(tmp_path, classes=4, names=["two", "one", "more", "zero"])
    context = make_context(tmp_path, teacher_weights=path)
    object.__setattr__(context, "source_class_names", ["two", "one", "more", "zero"])
    images = torch.randn(4, *SHAPE)
    assert torch.allclose(make_teacher(context)(images), network(images)[:, [3, 1, 0]], atol=1e-5)


def test_the_normalisation_of_pretrained_weights_is_converted(tmp_path, monkeypatch):
    network, path = ready_made(tmp_path)
    load = teachers.pretrained.load
    monkeypatch.setattr(teachers.pretrained, "load", lambda *a: replace(load(*a), normalization=((0.4,), (0.2,))))
    pixels = torch.rand(4, *SHAPE)
    teacher = make_teacher(make_context(tmp_path, teacher_weights=path))
    assert torch.allclose(teacher((pixels - 0.5) / 0.25), network((pixels - 0.4) / 0.2), atol=1e-4)


def test_errors_about_weights_that_do_not_fit_name_the_teachers_keys(tmp_path):
    _, path = ready_made(tmp_path)
    with pytest.raises(UserError, match=r"distill\.rded\.teacher_network = 'convnet'"):
        make_teacher(make_context(tmp_path, teacher_network="convnet", teacher_weights=path))
    with pytest.raises(UserError, match=r"distill\.rded\.teacher_weights = '.*none': there is no such file"):
        METHODS["rded"].network_options(make_config(teacher_weights=str(tmp_path / "none")))


@pytest.mark.parametrize(("options", "message"), [
    ({"teacher_network": "convnet"}, r"teacher_network = 'convnet' has no batch norm.*take convnet_bn"),
    ({"teacher_network": "resnet18_bn"}, r"distill\.sre2l\.teacher_network = 'resnet18_bn': .*at least 16 x 16"),
    ({"teacher_network": "convnet_b"}, r"distill\.sre2l\.teacher_network = 'convnet_b'"),
    ({"teacher_augment": "colour"}, "unknown augmentation 'colour'"),
])  # fmt: skip
def test_a_teacher_that_cannot_serve_is_refused_before_the_run(options, message):
    with pytest.raises(UserError, match=message):
        METHODS["sre2l"].protocol(make_config("sre2l", **options))


def test_rded_does_not_need_batch_norm():
    METHODS["rded"].protocol(make_config(teacher_network="convnet"))


def test_whitened_data_and_plain_tensors_are_refused():
    for data, message in (({"whiten": "zca"}, "data.whiten=none"), ({"source": "tensors"}, "tensors has none")):
        values = {"distill": {"method": "rded", "rded": QUICK}, "data": {"size": 8, "channels": 1} | data}
        with pytest.raises(UserError, match=message):
            METHODS["rded"].protocol(configuration.validate(values))


def test_students_train_as_the_papers_say_and_views_flip_only_where_the_teacher_flips():
    config = make_config(teacher_augment="color_crop_flip", label_epochs=300)
    protocol = METHODS["rded"].protocol(config)
    assert (
        protocol.epochs,
        protocol.optimizer,
        protocol.lr,
        protocol.labels,
        protocol.temperature,
    ) == (300, "adamw", 1e-3, "views", 20.0)
    assert protocol.plan.flip
    assert not METHODS["rded"].protocol(make_config(teacher_augment="color_crop")).plan.flip


def test_another_batch_for_evaluation_is_refused_before_the_run():
    values = {
        "distill": {"method": "rded", "rded": QUICK},
        "data": {"size": 8, "channels": 1},
        "evaluate": {"batch": 7},
    }
    with pytest.raises(UserError, match=r"evaluate\.batch = 7: the set has labels for batches of 64"):
        METHODS["rded"].protocol(configuration.validate(values))


def test_the_costs_name_training_labelling_and_ranking():
    costs = METHODS["rded"].costs(make_config(label_epochs=7, crops=4))
    assert [(c.images, c.passes, c.backward) for c in costs] == [
        ("kept", 3, True), ("synthetic", 7, False), ("kept", 4, False)
    ]  # fmt: skip
    assert {c.network for c in costs} == {"convnet_bn"}
    assert [c.images for c in METHODS["sre2l"].costs(make_config("sre2l", teacher_weights="w"))] == ["synthetic"]


def test_a_damaged_unfinished_teacher_is_named(tmp_path):
    context = make_context(tmp_path)
    teachers._checkpoint_path(context.networks).write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"partial is damaged .* renamed to .*partial\.damaged; give the same"):
        make_teacher(context)
