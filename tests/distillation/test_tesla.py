"""TESLA: its exact gradient is that of a full unroll, its own form drops one path; memory constant; learned soft labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expert_cases import (
    CLASSES,
    CPU,
    SHAPE,
    assert_close,
    make_config,
    make_context,
    make_method,
    make_sampler,
    reference_unroll,
)

from distill_at_scale.config import load as configuration
from distill_at_scale.config.methods import SIAMESE_AUGMENT
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.augment import Augmentation
from distill_at_scale.distillation.evaluate import EvaluationJob, Evaluator
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.distillation.methods.shared.experts import ExpertFiles, flat
from distill_at_scale.distillation.methods.shared.unroll import (
    FlatNetwork,
    StudentStep,
    SyntheticData,
    TrajectorySegment,
    recomputed,
    unrolled,
)
from distill_at_scale.distillation.student import TrainingProtocol
from distill_at_scale.models.spec import NetworkSpec

WAYS = {
    "unrolled": unrolled,
    "exact": recomputed,
    "fixed": lambda *given: recomputed(*given, exact=False),
}


@pytest.fixture
def double():
    """Double precision, so that equal gradients agree."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def a_student(at_once: int = 100) -> FlatNetwork:
    return FlatNetwork(NetworkSpec("convnet", SHAPE, CLASSES, width=6).build(0), at_once)


def a_task(
    student: FlatNetwork, steps: int = 4, images: int = 6, batch: int = 6, augment: str = "color_crop"
) -> TrajectorySegment:
    chance, augmentation = torch.Generator().manual_seed(0), Augmentation(augment)
    student_steps = []
    for _ in range(steps):
        rows = torch.randperm(images, generator=chance)[:batch]
        draw = augmentation.draw(chance, per_image=batch)
        student_steps.append(StudentStep(rows, type(draw)(draw.family, draw.numbers.to(torch.get_default_dtype()))))
    start = flat(student.network)
    return TrajectorySegment(start, start + 0.05 * torch.randn(len(start), generator=chance), student_steps)


def a_set(images: int = 6, soft: bool = False) -> tuple[SyntheticData, torch.Tensor]:
    chance = torch.Generator().manual_seed(1)
    pixels = torch.randn(images, *SHAPE, generator=chance).requires_grad_(True)
    targets = torch.arange(images) % CLASSES
    if soft:
        targets = torch.randn(images, CLASSES, generator=chance).requires_grad_(True)
    return SyntheticData(pixels, targets), torch.tensor(0.2, requires_grad=True)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("at_once", [100, 2])
@pytest.mark.parametrize("soft", [False, True])
def test_the_exact_gradient_is_that_of_the_full_unroll(soft, at_once):
    """For images, soft labels and rate, in parts or not, with batches of some of the images."""
    student, (synthetic, rate) = a_student(at_once), a_set(soft=soft)
    task = a_task(student, batch=5)
    expected, actual = unrolled(student, task, synthetic, rate), recomputed(student, task, synthetic, rate)
    assert float(actual[0]) == pytest.approx(float(expected[0]))
    assert len(actual[1]) == len(expected[1]) == 2 + soft
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        assert_close(ours, theirs, 1e-9)


def test_the_exact_gradient_holds_in_single_precision():
    student, (synthetic, rate) = a_student(2), a_set(soft=True)
    task = a_task(student)
    for ours, theirs in zip(
        recomputed(student, task, synthetic, rate)[1], unrolled(student, task, synthetic, rate)[1], strict=True
    ):
        assert_close(ours, theirs, 1e-4)


def without_the_path_through_theta(student, task, synthetic, rate):
    """MTT's autograd, but each gradient is taken at parameters detached from the earlier steps."""
    theta, total = task.start, torch.zeros_like(task.start)
    for step in task.steps:
        here = (task.start - rate.detach() * total).detach().requires_grad_(True)
        images, targets = synthetic.batch(step)
        loss = F.cross_entropy(student.logits(here, images), targets)
        total = total + torch.autograd.grad(loss, here, create_graph=True)[0]
    theta = task.start - rate * total
    return torch.autograd.grad(task.distance(theta), [*synthetic.learned, rate])


@pytest.mark.parametrize("soft", [False, True])
def test_teslas_own_form_is_the_unroll_without_the_path_through_the_parameters(soft):
    student, (synthetic, rate) = a_student(), a_set(soft=soft)
    task = a_task(student)
    actual = WAYS["fixed"](student, task, synthetic, rate)[1]
    for ours, theirs in zip(actual, without_the_path_through_theta(student, task, synthetic, rate), strict=True):
        assert_close(ours, theirs, 1e-4)
    full = unrolled(student, task, synthetic, rate)[1]
    assert float((actual[0] - full[0]).norm() / full[0].norm()) > 0.05  # what it drops is not small


def test_for_one_step_nothing_is_dropped():
    student, (synthetic, rate) = a_student(), a_set()
    task = a_task(student, steps=1)
    actual = [way(student, task, synthetic, rate)[1] for way in WAYS.values()]
    for other in actual[1:]:
        for ours, theirs in zip(other, actual[0], strict=True):
            assert_close(ours, theirs, 1e-5)


def peak_saved(way, steps: int, images: int = 6, at_once: int = 100) -> int:
    """Peak bytes that autograd keeps for the backward pass."""
    held = {"now": 0, "peak": 0}

    class Kept:
        def __init__(self, tensor):
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            held["now"] += self.size
            held["peak"] = max(held["peak"], held["now"])

        def __del__(self):
            held["now"] -= self.size

    student, (synthetic, rate) = a_student(at_once), a_set(images)
    task = a_task(student, steps, images, images, "none")
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        way(student, task, synthetic, rate)
    return held["peak"]


@pytest.mark.parametrize("way", ["exact", "fixed"])
def test_memory_does_not_grow_with_the_number_of_steps(way):
    few, many = (peak_saved(WAYS[way], steps) for steps in (2, 8))
    assert many <= 1.05 * few
    unrolled_few, unrolled_many = (peak_saved(WAYS["unrolled"], steps) for steps in (2, 8))
    assert unrolled_many > 3 * unrolled_few
    assert many < unrolled_few


def test_memory_does_not_grow_with_the_batch():
    small, large = (peak_saved(recomputed, 2, images, at_once=3) for images in (6, 24))
    assert large < 1.3 * small


@pytest.mark.parametrize(("gradient", "way"), [("exact", "unrolled"), ("fixed", "fixed")])
def test_the_gradient_is_the_one_that_is_chosen(experts, gradient, way):
    method = make_method(experts, "tesla", gradient=gradient)
    task, synthetic = method.segment(0, 0), method.synthetic()
    expected = WAYS[way](method.student, task, synthetic, method.student_lr)[1]
    for ours, theirs in zip(method.match(task, synthetic)[1], expected, strict=True):
        assert_close(ours, theirs)


def test_with_hard_labels_a_step_is_mtts(experts):
    method = make_method(experts, "tesla", learn_labels=False)
    before, task = method.images.detach().clone().flatten(0, 1), method.segment(3, 0)
    _, expected, _ = reference_unroll(method.context.spec.build(0), task, before, method.labels, torch.tensor(0.1))
    method.step(3)
    assert_close(before - method.images.detach().flatten(0, 1), expected)
    assert "soft_labels" not in method.finalize(*method.snapshot()).extras
    assert not [key for key in method.state_dict() if key.startswith("logits")]


def test_soft_labels_are_learned_and_concluded(experts):
    method = make_method(experts, "tesla", label_lr=3.0)
    before = method.logits.detach().clone()
    _, gradients = method.match(method.segment(0, 0), method.synthetic())
    method.step(0)
    assert_close(before - method.logits.detach(), 3.0 * gradients[1].view_as(before))
    synthetic = method.finalize(*method.snapshot())
    assert torch.equal(synthetic.extras["soft_labels"], method.logits.detach().flatten(0, 1))
    assert synthetic.protocol["lr"] == float(method.student_lr.detach())


def test_labels_start_from_the_experts_with_the_own_class_never_behind(experts):
    method = make_method(experts, "tesla")
    images, student = method.images.detach().flatten(0, 1), method.student
    held = ExpertFiles(experts, 4, sum(student.sizes), CPU)
    mean = sum(student.logits(*held.parameters(k, 4), images) for k in range(2)) / 2
    actual = method.logits.detach().flatten(0, 1)
    for row, expected, label in zip(actual, mean, method.labels.tolist(), strict=True):
        others = [c for c in range(CLASSES) if c != label]
        assert torch.allclose(row[others], expected[others], atol=1e-5)
        assert float(row[label]) == pytest.approx(float(expected.max()), abs=1e-5)


def test_labels_start_from_the_class_alone_on_request(experts):
    method = make_method(experts, "tesla", label_init="class")
    assert torch.equal(method.logits.detach().flatten(0, 1), 5.0 * F.one_hot(method.labels, CLASSES))


def test_labels_start_from_the_class_where_images_are_noise(experts):
    """An expert's logits for noise mean nothing."""
    method = make_method(experts, "tesla", init="noise")
    assert torch.equal(method.logits.detach().flatten(0, 1), 5.0 * F.one_hot(method.labels, CLASSES))


def test_the_defaults_are_mtts_with_soft_labels():
    config, method = configuration.Config(), METHODS["tesla"]
    assert (method.default_steps, method.parallel, method.init_of(config)) == (5000, "replicate", "real")
    assert method.protocol(config) == TrainingProtocol(1000, SIAMESE_AUGMENT, labels="soft")
    assert (config.distill.tesla.gradient, config.distill.tesla.learn_labels) == ("exact", True)
    assert method.protocol(make_config("tesla", learn_labels=False)).labels == "hard"
    assert method.networks(config) == METHODS["mtt"].networks(config)
    small = make_config("tesla")
    assert method.network_options(small) == METHODS["mtt"].network_options(make_config("mtt"))


def test_a_network_trains_on_the_soft_labels_that_were_saved(experts, tmp_path):
    """The saved set carries what its protocol asks for."""
    method = make_method(experts, "tesla")
    images, labels = method.snapshot()
    synthetic = method.finalize(images, labels)
    protocol = method.protocol(make_context(make_config("tesla"), tmp_path).config).card() | dict(synthetic.protocol)
    card = {"class_names": ["zero", "one", "two"], "protocol": protocol,
            "normalization": {"mean": [0.5], "std": [0.3]}}  # fmt: skip
    synthetic_set.SyntheticSet(images, labels, card, {}, dict(synthetic.extras)).save(tmp_path / "set")
    again = synthetic_set.load(tmp_path / "set")
    assert again.protocol.labels == "soft"
    assert again.training_set().soft["soft_labels"].shape == (len(labels), CLASSES)


def test_the_pool_is_what_the_images_start_from(experts):
    method, pool = make_method(experts, "tesla"), make_sampler()
    images = pool.normalization.apply(pool.pixels[1])
    assert all(
        float((images - image).abs().flatten(1).max(1).values.min()) < 1e-6 for image in method.images.detach()[1]
    )


def test_an_expert_goes_with_the_set(experts):
    method = make_method(experts, "tesla")
    images, labels = method.snapshot()
    outputs = method.finalize(images, labels)
    card = {"class_names": ["zero", "one", "two"], **outputs.card}
    teacher = synthetic_set.SyntheticSet(images, labels, card, {}, dict(outputs.extras)).teacher(CPU)
    (theta,) = ExpertFiles(experts, 4, sum(method.student.sizes), CPU).parameters(0, 4)
    assert torch.allclose(teacher.logits(images), method.student.logits(theta, images), atol=1e-5)
    assert "teacher" not in make_method(experts, "tesla", learn_labels=False).finalize(images, labels).card


def test_the_random_control_has_soft_labels_of_an_expert(make_run, tmp_path):
    options = {"experts": 1, "expert_epochs": 2, "max_start": 0, "target_epochs": 1, "student_steps": 1, "image_lr": 10.0,
               "augment": "none", "expert_augment": "none"}  # fmt: skip
    run = make_run(tmp_path / "run", distill__method="tesla", distill__tesla=options, distill__ipc=4)
    run.stages("ingest", "score", "select", "distill")
    evaluator = Evaluator(run.config, *(run.dir / name for name in ("prepared", "synthetic", "manifest.parquet")), CPU)
    job, hard = (EvaluationJob(name, "convnet", 1) for name in ("random_real", "full"))
    synthetic = evaluator.synthetic
    assert [evaluator._protocol(one, synthetic).labels for one in (job, hard)] == ["soft", "hard"]
    data = evaluator._training_set(job, synthetic)
    given = data.soft["soft_labels"]
    expected = synthetic.teacher(CPU).logits(data.normalized(torch.arange(12)))
    for row, other, label in zip(given, expected, data.labels.tolist(), strict=True):
        assert float(row[label]) == float(other.max())
        assert torch.equal(row[torch.arange(3) != label], other[torch.arange(3) != label])
    assert evaluator.run(job)["top1"] == evaluator.run(job)["top1"]
