"""IDC against a reference step, its images, its training on real data, and any number of workers."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import FixedNetwork
from matching_cases import assert_close, reference_gradient

from distill_at_scale.config import load as configuration
from distill_at_scale.core.collectives import SingleProcess
from distill_at_scale.core.errors import DistillationDiverged, UserError
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.methods import idc
from distill_at_scale.distillation.methods.base import MethodContext
from distill_at_scale.distillation.multi_formation import assemble_parts, split_parts
from distill_at_scale.distillation.synthetic_set import SyntheticSet
from distill_at_scale.models.spec import NetworkSpec

CPU, SHAPE, CLASSES, STD = torch.device("cpu"), (1, 8, 8), 4, 0.5
SPEC = FixedNetwork(
    NetworkSpec("convnet", SHAPE, CLASSES, width=6), at_once=4
)  # once: building seeds all threads alike
NAMES = ["zero", "one", "two", "three"]


def make_sampler(labels=range(CLASSES), held: int = 5) -> ClassSampler:
    pixels = {
        c: torch.randint(256, (held, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(c))
        for c in labels
    }
    return ClassSampler(pixels, Normalization((0.5,), (STD,)), seed=0)


def make_method(labels=range(CLASSES), workers=None, held: int = 5, ipc: int = 2, runtime=None, **options):
    section = {"image_lr": 0.1, "image_momentum": 0.0, "inner": 1, "augment": "none", **options}
    config = configuration.validate(
        {"distill": {"method": "idc", "ipc": ipc, "idc": section}, "runtime": runtime or {"rule": "none"}}
    )
    method = idc.IDC(MethodContext(config, SPEC, NAMES, list(labels), workers or SingleProcess(), CPU, 1))
    method.prepare(make_sampler(labels, held))
    return method


@pytest.mark.parametrize(("metric", "size"), [("mse", torch.square), ("l1", torch.abs)])
def test_an_image_update_matches_the_reference(metric, size):
    """Decoded images, differences of weight gradients without the classifier's, a rate for pixels between 0 and 1."""
    method = make_method(metric=metric)
    images = method.images.detach().clone().requires_grad_(True)
    network, total, pool = method.context.spec.network, torch.zeros(()), make_sampler()
    for label in range(CLASSES):
        real = reference_gradient(network, pool.normalization.apply(pool.pixels[label]), label)
        mine = reference_gradient(network, split_parts(images[label], 2), label, create_graph=True)
        pairs = [(a, b) for a, b in zip(real, mine, strict=True) if a.dim() == 4]
        total = total + sum(size(a - b).sum() for a, b in pairs)
    expected = torch.autograd.grad(total, images)[0] * 0.1 * (2 / 10) / STD**2
    metrics = method.step(0)
    assert_close(images.detach() - method.images.detach(), expected)
    assert metrics["loss"] == pytest.approx(float(total.detach()) / CLASSES, rel=1e-4)


def test_images_start_as_real_ones_put_together():
    method = make_method(held=8, ipc=2)
    drawn = make_sampler(held=8).draw([1], 8, "initial images")[0].images
    assert torch.equal(method.images[1].detach(), assemble_parts(drawn, 2))


def test_too_few_samples_for_all_parts_repeat():
    parts = split_parts(make_method(held=2, ipc=2).images[0].detach(), 2)
    assert torch.allclose(parts[0], parts[2], atol=1e-5)
    assert not torch.allclose(parts[0], parts[1], atol=1e-2)


def test_fewer_samples_than_images_are_refused():
    with pytest.raises(UserError, match=r"'zero' has 1 samples, fewer than distill\.ipc = 2"):
        make_method(held=1)


def test_noise_and_images_are_clamped_to_the_pixel_range():
    method = make_method(init="noise")
    assert -1 <= float(method.images.detach().min()) < float(method.images.detach().max()) <= 1
    with torch.no_grad():
        method.images.add_(3)
    method.lr = method.optimizer.param_groups[0]["lr"] = 0.0
    method.step(0)
    assert float(method.images.detach().max()) == 1


def test_no_more_decoded_images_than_asked_are_matched_and_they_change():
    method = make_method(ipc=4, synthetic_batch=5)
    draw = method.augmentation.draw(torch.Generator())
    first, second = (method.shown(method.images[:1].detach(), [0], [draw], step, 0) for step in (0, 1))
    assert len(first) == len(second) == 5
    assert not torch.equal(first, second)


def test_the_network_is_trained_on_real_samples_of_all_classes():
    method = make_method(network_samples=100, network_cutmix=0.0, network_lr=0.1, network_batch=100)
    method.new_network(0)
    network = method.net
    twin = method.context.spec.build(0)
    optimizers = [torch.optim.SGD(n.parameters(), 0.1, 0.9, weight_decay=5e-4) for n in (network, twin)]
    method._train_network(optimizers[0], 0, 0)
    pixels, labels = make_sampler().all_samples()
    F.cross_entropy(twin(make_sampler().normalization.apply(pixels)), labels).backward()
    optimizers[1].step()
    for actual, expected in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(actual, expected, atol=1e-5)


def test_mixed_targets_are_shares_of_two_classes():
    method = make_method()
    images, labels = method._network_samples(0, 0)
    mixed, targets = method._augmented(images, labels, torch.Generator().manual_seed(1))
    assert torch.allclose(targets.sum(1), torch.ones(len(labels)))
    assert not torch.equal(mixed, images)
    assert ((targets > 0).sum(1) <= 2).all()


class Threads:
    """Workers that are threads of one process; `all_reduce_sum` adds up their tensors."""

    def __init__(self, size: int):
        self.size, self.barrier, self.held = size, threading.Barrier(size), [None] * size

    def of(self, rank: int):
        worker = SingleProcess()
        worker.rank, worker.size = rank, self.size
        worker.all_reduce_sum = lambda tensors: self._sum(rank, tensors)
        return worker

    def _sum(self, rank: int, tensors: list[torch.Tensor]) -> None:
        self.held[rank] = [t.detach().clone() for t in tensors]
        self.barrier.wait(60)
        totals = [sum(parts[1:], parts[0]) for parts in zip(*self.held, strict=True)]
        self.barrier.wait(60)
        for tensor, total in zip(tensors, totals, strict=True):
            tensor.copy_(total)


def images_of(size: int) -> torch.Tensor:
    """All classes' images after two steps of three inner iterations, by `size` workers."""
    options = {
        "inner": 3,
        "network_samples": 12,
        "network_batch": 5,
        "network_lr": 0.05,
        "augment": "color_crop_cutout",
    }
    group, images, problems = Threads(size), torch.zeros(CLASSES, 2, *SHAPE), []

    def work(rank: int) -> None:
        labels = list(range(CLASSES))[rank::size]
        try:
            method = make_method(labels, group.of(rank), **options)
            for step in range(2):
                method.step(step)
            images[labels] = method.images.detach()
        except Exception as error:
            problems.append(error)
            group.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    return images


@pytest.fixture(scope="module")
def alone() -> torch.Tensor:
    return images_of(1)


@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_workers_gives_the_same_images(alone, size):
    assert not torch.allclose(alone, make_method().images.detach(), atol=1e-2)
    assert torch.allclose(images_of(size), alone, rtol=1e-3, atol=1e-3)


def test_what_is_not_finite_is_named_and_the_images_stay():
    method = make_method(inner=2)
    with torch.no_grad():
        method.images[1].fill_(float("nan"))
    with pytest.raises(DistillationDiverged, match=r"class 'one' is not finite at step 4.*distill\.idc\.image_lr"):
        method.step(4)
    assert torch.isfinite(method.images[0]).all()


def test_the_card_describes_how_to_split_the_set():
    method = make_method()
    images, labels = method.snapshot()
    card = method.finalize(images, labels).card
    protocol = idc.IDC.protocol(configuration.Config()).card()
    training_set = SyntheticSet(images, labels, dict(card) | {"protocol": protocol}).training_set()
    assert len(training_set.images) == len(training_set.labels) == CLASSES * 2 * 4
    assert training_set.labels[:8].tolist() == [0] * 8


def test_evaluation_is_cut_and_mixed_and_needs_no_cutout():
    protocol = idc.IDC.protocol(configuration.Config())
    assert (protocol.epochs, protocol.cutmix) == (1000, 0.5)
    assert protocol.augment == "color_crop_flip_scale_rotate"


def test_runtime_pruning_drops_the_largest_losses():
    plain, pruned = make_method(), make_method(runtime={"rule": "loss", "drop": 0.5, "refresh": 1})
    plain.step(0)
    pruned.step(0)
    assert not torch.allclose(plain.images, pruned.images, atol=1e-4)


def test_effects_use_squared_distances_for_every_metric():
    """Absolute differences have no second derivative, so effects are computed with squared ones."""
    plain, pruned = (
        make_method(metric="l1"),
        make_method(metric="l1", runtime={"rule": "ite", "drop": 0.5, "refresh": 1}),
    )
    plain.step(0)
    assert pruned.step(0)["real_share"] < 1
    assert not torch.allclose(plain.images, pruned.images, atol=1e-4)
