"""DC and DSA against reference steps on a fixed network, with and without runtime pruning."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from matching_cases import (
    CLASSES,
    HELD,
    all_images_of,
    assert_close,
    image_gradient,
    make_method,
    make_sampler,
    reference_distance,
    reference_gradient,
)

from distill_at_scale.config import load as configuration
from distill_at_scale.config.methods import SIAMESE_AUGMENT
from distill_at_scale.distillation.methods import METHODS, dc
from distill_at_scale.distillation.methods.shared.gradient_distance import real_gradient
from distill_at_scale.distillation.student import TrainingProtocol


def reference_dc_gradient(network, real, images):
    """The gradient of the summed distances in the images [classes, ipc, *shape]."""
    images = images.clone().requires_grad_(True)
    total = torch.zeros(())
    for label in range(len(images)):
        target = reference_gradient(network, real[label], label)
        total = total + reference_distance(target, reference_gradient(network, images[label], label, create_graph=True))
    return torch.autograd.grad(total, images)[0]


def test_a_dc_step_matches_the_reference():
    pool = make_sampler()
    method = make_method("dc", pool, outer=1, inner=1)
    before, actual = image_gradient(method)
    real = [all_images_of(pool, label) for label in range(CLASSES)]
    assert_close(actual, reference_dc_gradient(method.context.spec.network, real, before))


@pytest.mark.parametrize("kept", [-1, 2, 1])
def test_the_gradient_of_the_kept_samples_follows_from_that_of_all(kept):
    """All but one, few and one of them are kept."""
    pool = make_sampler()
    method, images = make_method("dc", pool), all_images_of(pool, 1)
    method.new_network(0)
    network, mask = method.net, torch.arange(len(images)) < kept % len(images)
    actual = method._gradient_of_kept(images, 1, mask, real_gradient(network, images, 1, 100))
    for own, expected in zip(actual, real_gradient(network, images[mask], 1, 100), strict=True):
        assert_close(own, expected)


def test_the_inner_loop_trains_the_network_on_the_synthetic_set():
    """Two outer iterations: the second gradient belongs to a network that made three epochs of plain SGD."""
    pool = make_sampler()
    method = make_method("dc", pool, outer=2, inner=3, network_lr=0.5)
    before = method.images.detach().clone()
    method.step(0)
    network = method.context.spec.build(0)
    real = [all_images_of(pool, label) for label in range(CLASSES)]
    middle = before - reference_dc_gradient(network, real, before)
    optimizer = torch.optim.SGD(network.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(network(middle.flatten(0, 1)), torch.arange(CLASSES).repeat_interleave(2)).backward()
        optimizer.step()
    last = middle - reference_dc_gradient(network, real, middle)
    assert_close(method.images.detach() - middle, last - middle, 1e-2)


def test_the_inner_loop_sees_every_image_once_per_epoch_in_small_batches():
    """Three batches of two of six images: at a rate near zero, their gradients add up to three times the mean's."""
    pool = make_sampler()
    method = make_method("dc", pool, outer=1, inner=1, network_lr=1e-3, network_batch=2)
    method.new_network(0)
    network = method.net
    before = [p.detach().clone() for p in network.parameters()]
    images, labels = method.images.detach().flatten(0, 1), torch.arange(CLASSES).repeat_interleave(2)
    expected = torch.autograd.grad(3 * F.cross_entropy(network(images), labels), list(network.parameters()))
    method._train_network(0, 0, 1)
    for parameter, old, gradient in zip(network.parameters(), before, expected, strict=True):
        assert torch.allclose((old - parameter.detach()) / 1e-3, gradient, rtol=0.1, atol=2e-2)


def test_momentum_is_that_of_sgd():
    pool = make_sampler()
    plain, heavy = make_method("dc", pool, outer=1), make_method("dc", pool, outer=1, image_momentum=0.5)
    start = plain.images.detach().clone()
    plain.step(0)
    heavy.step(0)
    assert torch.equal(plain.images, heavy.images)
    first = start - plain.images.detach()
    plain.step(1)
    heavy.step(1)
    assert_close(plain.images.detach() - heavy.images.detach(), 0.5 * first)


@pytest.mark.parametrize(("ipc", "loops"), [(1, (1, 1)), (5, (1, 1)), (10, (10, 50)), (50, (50, 10)), (100, (50, 10))])
def test_the_default_loops_are_the_official_ones(ipc, loops):
    assert dc.default_loops(ipc) == loops


def test_the_defaults_are_the_official_ones():
    config = configuration.Config()
    assert [METHODS[m].default_steps for m in ("dc", "dsa", "dm", "idc")] == [1000, 1000, 20_000, 2000]
    assert [METHODS[m].init_of(config) for m in ("dc", "dsa", "dm")] == ["noise", "real", "real"]
    assert METHODS["dc"].protocol(config) == TrainingProtocol(300)
    assert METHODS["dsa"].protocol(config) == TrainingProtocol(1000, SIAMESE_AUGMENT)
    assert METHODS["dm"].protocol(config).epochs == 1000
    assert (config.distill.dc.image_lr, config.distill.dc.image_momentum, config.distill.dc.network_lr) == (
        0.1,
        0.5,
        0.01,
    )


@pytest.mark.parametrize("drop", [0.3, 0.5, 0.99])
def test_the_masked_gradient_is_autograds_on_the_kept_samples(drop):
    """Rule loss: of each class the floor(drop n) samples with the largest loss do not count; at least one stays."""
    pool = make_sampler()
    method = make_method("dc", pool, outer=1, runtime={"rule": "loss", "drop": drop, "refresh": 1})
    before, actual = image_gradient(method)
    network, kept = method.context.spec.network, []
    for label in range(CLASSES):
        batch = all_images_of(pool, label)
        order = sorted(
            range(HELD), key=lambda k: F.cross_entropy(network(batch[k][None]), torch.tensor([label])).item()
        )
        kept.append(batch[order[: max(1, HELD - math.floor(drop * HELD))]])
    assert_close(actual, reference_dc_gradient(network, kept, before))


def test_dropping_changes_the_gradient():
    pool = make_sampler()
    _, full = image_gradient(make_method("dc", pool, outer=1))
    _, masked = image_gradient(make_method("dc", pool, outer=1, runtime={"rule": "loss", "drop": 0.5}))
    assert float((full - masked).abs().max()) > 0.01 * float(full.abs().max())


def test_dsa_is_dc_with_its_own_section():
    pool, options = make_sampler(), {"outer": 1, "inner": 1, "init": "real"}
    plain, siamese = make_method("dc", pool, **options), make_method("dsa", pool, **options)
    plain.step(0)
    siamese.step(0)
    assert torch.equal(plain.images, siamese.images)
