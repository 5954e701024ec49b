"""Norms of the gradient of each sample, against autograd, and projections of features."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from distill_at_scale.models.spec import NetworkSpec
from distill_at_scale.pruning.scoring.classifier import random_projection
from distill_at_scale.pruning.scoring.gradient_norms import GradientNorms

SPEC = NetworkSpec("convnet", (1, 8, 8), 3, width=4)


def by_autograd(network, image, label):
    loss = F.cross_entropy(network(image[None]), label[None])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]).norm().item()


def test_gradient_norms_are_those_of_each_sample_alone():
    network, chance = SPEC.build(0).eval(), torch.Generator().manual_seed(0)
    images, labels = torch.randn(5, 1, 8, 8, generator=chance), torch.arange(5) % 3
    expected = [by_autograd(network, image, label) for image, label in zip(images, labels, strict=True)]
    norms = GradientNorms(SPEC, network)
    with torch.no_grad():
        assert norms(images, labels).tolist() == pytest.approx(expected, rel=1e-4)


def test_gradient_norms_in_padded_parts_are_the_same(monkeypatch):
    network, chance = SPEC.build(0).eval(), torch.Generator().manual_seed(0)
    images, labels = torch.randn(5, 1, 8, 8, generator=chance), torch.arange(5) % 3
    norms = GradientNorms(SPEC, network)
    monkeypatch.setattr("distill_at_scale.pruning.scoring.gradient_norms.BYTES", 2 * norms.bytes_per_sample)
    weights = {name: p.detach() for name, p in network.named_parameters()}
    actual = norms._in_parts(lambda image, label: norms._norm(None)(weights, image, label), images, labels)
    assert actual.tolist() == pytest.approx(norms(images, labels).tolist(), rel=1e-4)


def test_the_gradient_looks_at_the_classes_of_the_data_alone():
    network = replace(SPEC, classes=4).build(0).eval()
    images, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    table = GradientNorms(replace(SPEC, classes=4), network)
    loss = F.cross_entropy(network(images[:1])[:, [3, 1]], labels[:1])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])
    assert table(images, labels, [3, 1])[0].item() == pytest.approx(gradient.norm().item(), rel=1e-4)


def test_a_projection_keeps_distances_and_leaves_few_dimensions_alone():
    features = torch.randn(20, 2000, generator=torch.Generator().manual_seed(0))
    small = random_projection(features, 500)
    assert small.shape == (20, 500)
    assert (torch.pdist(small) / torch.pdist(features) - 1).abs().max() < 0.2
    assert torch.equal(small, random_projection(features, 500))
    assert random_projection(small, 500) is small
