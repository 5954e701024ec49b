"""Students: labels of views, and batch norm with few images."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import FixedNetwork

from distill_at_scale.config.methods import EvaluateSection
from distill_at_scale.core import rng
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.distillation import student as students
from distill_at_scale.distillation.student import TrainingProtocol, TrainingSet
from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pruning.infobatch import InfoBatch

SPEC = NetworkSpec("convnet", (1, 8, 8), 3, width=6)
WITH_NORM = NetworkSpec("convnet_bn", (1, 8, 8), 3, width=6)
CPU = torch.device("cpu")
VIEWS = TrainingProtocol(
    5, augment="flip", optimizer="adamw", batch=4, lr=1e-3, cutmix=0.5, labels="views", temperature=4.0, view_scale=0.5,
    view_seed=2,
)  # fmt: skip


class RecordingLabels:
    """Labels that record the calls."""

    epochs = 2

    def __init__(self):
        self.seen = []

    def logits(self, epoch, batch, views):
        self.seen.append((epoch, batch.first, views))
        return views.flatten(1)[:, :3] * 5


def a_training_set(count: int = 10, **more) -> TrainingSet:
    images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return TrainingSet(images, torch.arange(count) % 3, **more)


def test_epochs_of_views_begin_again_where_labels_end():
    recorded = RecordingLabels()
    students.train(SPEC, a_training_set(views=recorded), VIEWS, 0, CPU)
    assert [epoch for epoch, *_ in recorded.seen] == [e for e in (0, 1, 0, 1, 0) for _ in range(3)]
    assert torch.equal(recorded.seen[0][2], recorded.seen[6][2])  # the same views in epoch 2 as in epoch 0
    assert not torch.equal(recorded.seen[0][2], recorded.seen[3][2])


@pytest.mark.filterwarnings("ignore:the network convnet_bn")
def test_every_student_sees_the_same_views():
    one, other = RecordingLabels(), RecordingLabels()
    students.train(SPEC, a_training_set(views=one), VIEWS, 0, CPU)
    students.train(WITH_NORM, a_training_set(views=other), VIEWS, 1, CPU)
    assert all(torch.equal(a[2], b[2]) for a, b in zip(one.seen, other.seen, strict=True))


def test_the_loss_is_the_divergence_at_the_temperature_times_its_square():
    recorded, data = RecordingLabels(), a_training_set(views=RecordingLabels())
    network, off = SPEC.build(0), InfoBatch(0.0, 10, 5, 0, CPU)
    for views, weighted in students.view_batches(data, VIEWS, 0):
        logits, targets = network(views).detach(), (recorded.logits(0, _Place, views) / 4).softmax(1)
        expected = (targets * (targets.log() - (logits / 4).log_softmax(1))).sum(1).mean() * 16
        assert float(students._loss(VIEWS, logits, weighted, off)) == pytest.approx(float(expected), rel=1e-4)
        assert float(students._loss(VIEWS, targets.log() * 4, weighted, off)) == pytest.approx(0, abs=1e-5)


class _Place:
    first = 0


def test_a_student_learns_what_the_labels_say():
    data, protocol = a_training_set(views=RecordingLabels()), TrainingProtocol(
        60, optimizer="adamw", batch=4, lr=1e-2, labels="views", temperature=2.0
    )  # fmt: skip
    network = students.train(SPEC, data, protocol, 0, CPU)
    answers = data.images.flatten(1)[:, :3] * 5
    before, after = (F.kl_div(n(data.images).log_softmax(1), answers.log_softmax(1), reduction="batchmean", log_target=True)
                     for n in (SPEC.build(5), network))  # fmt: skip
    assert float(after) < 0.5 * float(before)


def test_labels_of_views_cannot_serve_other_batches():
    assert VIEWS.overridden(EvaluateSection(epochs=9, batch=4)).epochs == 9
    with pytest.raises(UserError, match=r"evaluate\.batch = 8: the set has labels for batches of 4"):
        VIEWS.overridden(EvaluateSection(batch=8))


def test_the_protocol_survives_its_card():
    assert TrainingProtocol.from_card(VIEWS.card()) == VIEWS


def sizes(spec, protocol, count, monkeypatch) -> list[int]:
    seen, fixed = [], FixedNetwork(spec)
    fixed.network.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    students.train(fixed, a_training_set(count), protocol, 0, CPU)
    return seen


@pytest.mark.parametrize(("spec", "expected"), [(SPEC, [4, 4, 1]), (WITH_NORM, [4, 5])])
def test_with_batch_norm_a_last_batch_of_one_is_merged(spec, expected, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert sizes(spec, TrainingProtocol(1, batch=4), 9, monkeypatch) == expected


def test_batch_norm_with_few_images_is_warned_about():
    with pytest.warns(
        UserWarning, match=r"network convnet_bn has batch norm.*batches of 9 images.*merged into the one before"
    ):
        students.train(WITH_NORM, a_training_set(9), TrainingProtocol(1), 0, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        students.train(SPEC, a_training_set(9), TrainingProtocol(1), 0, CPU)
        students.train(WITH_NORM, a_training_set(32), TrainingProtocol(1), 0, CPU)


def test_accuracy_by_class_counts_every_class_for_itself():
    class Says(torch.nn.Module):
        def forward(self, images):
            return torch.nn.functional.one_hot(images[:, 0, 0, 0].round().long(), 4).float()

    pixels = torch.tensor([0, 1, 1, 0, 0], dtype=torch.uint8).view(5, 1, 1, 1)  # predictions
    labels = torch.tensor([0, 0, 1, 1, 2])
    plain = Normalization((0.0,), (1 / 255,))
    accuracy = students.test(Says(), pixels, labels, plain, torch.device("cpu"), at_once=2)
    assert accuracy.per_class == [0.5, 0.5, 0.0, None]
    assert accuracy.top1 == 0.4


def test_logits_that_are_equal_in_bf16_are_told_apart():
    network = SPEC.build(0)
    torch.nn.init.zeros_(network.classifier.weight)
    network.classifier.bias.data = torch.tensor([1.0, 1.001, 0.0])
    pixels, plain = torch.zeros(5, 1, 8, 8, dtype=torch.uint8), Normalization((0.0,), (1.0,))
    labels = torch.ones(5, dtype=torch.long)
    for precision in ("fp32", "bf16"):
        assert students.test(network, pixels, labels, plain, CPU, 2, precision).top1 == 1


def test_infobatch_trains_on_fewer_samples_and_mixed_batches_leave_its_memory(monkeypatch):
    data, passed, memories = a_training_set(), list[int](), list[torch.Tensor]()
    start = InfoBatch.start

    def spy(self, epoch):
        memories.append(self.losses.clone())
        kept = start(self, epoch)
        passed.append(int(kept.sum()))
        return kept

    monkeypatch.setattr(InfoBatch, "start", spy)
    protocol = TrainingProtocol(8, lr=0.1, batch=4)
    plain = students.train(SPEC, data, protocol, 0, CPU)
    assert passed == [len(data.labels)] * 8
    assert memories[-1].isinf().all()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), _reference(data, protocol), strict=True))
    passed.clear()
    students.train(SPEC, data, protocol, 0, CPU, infobatch=0.5)
    assert passed[0] == passed[7] == len(data.labels) > max(passed[2:7])
    assert not memories[-1].isinf().any()
    memories.clear()
    students.train(SPEC, data, replace(protocol, cutmix=1.0), 0, CPU, infobatch=0.5)
    assert memories[-1].isinf().all()


def _reference(data: TrainingSet, protocol: TrainingProtocol) -> list[torch.Tensor]:
    """Plain SGD over the same shuffled batches."""
    network = SPEC.build(rng.derive(0, "network")).train()
    optimizer = torch.optim.SGD(network.parameters(), protocol.lr, 0.9, weight_decay=5e-4, fused=True)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [protocol.epochs // 2 + 1], gamma=0.1)
    for epoch in range(protocol.epochs):
        order = torch.randperm(len(data.labels), generator=rng.generator(0, "epoch", epoch))
        for rows in order.split(protocol.batch):
            optimizer.zero_grad()
            F.cross_entropy(network(data.images[rows]), data.labels[rows]).backward()
            optimizer.step()
        scheduler.step()
    return list(network.parameters())
