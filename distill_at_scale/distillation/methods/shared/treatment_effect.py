"""The individual treatment effect (ITE) of a real sample on the gradient of the synthetic images, to first order.

ITE_i = M' (g_i - g) / (n - 1) with M' = d2L / dS dg (`distillation/README.md`, "Runtime pruning"). Its norm is estimated in
the few directions in which effects are large (a randomised range finder, Halko, Martinsson & Tropp 2011, arXiv 0909.4061): a
direction q is the effect of a mixture of samples, orthonormalised. <q, ITE_i> = <M q, g_i - g> / (n - 1), so the cost is two
second derivatives of the loss per direction, and the gradients of the samples, which the step needs anyway. The effects on
few of the images that the network sees stand for those on all.

Not covered: networks whose output for a sample depends on the rest of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_at_scale.distillation.methods.shared.class_gradients import class_gradients
from distill_at_scale.distillation.methods.shared.gradient_distance import (
    GradientDistance,
    matched_parameters,
    real_gradient,
)

View = Callable[[Tensor], Tensor]
PERTURBED = 2  # of the images that the network sees of a class: those considered
HELD = 2**29  # bytes of samples' gradients that are held to be mixed; the more samples, the better the directions
MOVE = 1e-3  # of the norm of the images: by how much they are moved


class SampleGradients(NamedTuple):
    """The gradient of each image's cross-entropy under one network, in the matched parameters.

    `joint`: whether `class_gradients` supports the network; if not, images pass it one by one.
    """

    network: nn.Module
    label: int
    at_once: int
    joint: bool

    def __call__(self, images: Tensor) -> list[Tensor]:
        """[n, *shape] -> per parameter [n, *parameter]."""
        if self.joint:
            ones = images.new_ones(self.at_once)
            each = [
                class_gradients(self.network, part, [self.label] * len(part), ones[: len(part)])
                for part in images.split(self.at_once)
            ]
            return [torch.cat(layer) for layer in zip(*each, strict=True)]
        single = [real_gradient(self.network, image[None], self.label, 1) for image in images]
        return [torch.stack(layer) for layer in zip(*single, strict=True)]


def gradient_effects(
    sample_gradients: SampleGradients, real: Tensor, images: Tensor, view: View, distance: GradientDistance, probes: int,
    generator: torch.Generator,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The norm of each real sample's effect under gradient matching [n], and the mean gradient of the real batch.

    Args:
        real: the real batch as the network sees it [n, *shape].
        images: the class's stored synthetic images [m, *shape].
        view: stored images -> what the network sees of them; deterministic.
        distance: the matching loss of several classes.
        probes: the number of directions.
    """
    if len(real) == 1:
        return real.new_zeros(1), [g[0] for g in sample_gradients(real)]
    network, label, at_once, _ = sample_gradients
    leaf = images.detach().requires_grad_(True)
    seen = view(leaf)
    rows = torch.randperm(len(seen), generator=generator)[:PERTURBED].to(seen.device)
    order = torch.randperm(len(real), generator=generator).to(real.device)
    held = HELD // (4 * sum(p.numel() for p in matched_parameters(network)))
    first = sample_gradients(real[order[: max(held, 2 * probes + 2)]])
    mean = [g.mean(0) for g in first]
    # mixtures of samples sum to zero, so the last one is redundant
    parts = zip(*(g.chunk(probes + 1) for g in first), strict=True)
    mixtures = [[own.mean(0) - m for own, m in zip(part, mean, strict=True)] for part in parts][:-1]
    response = _Response(distance, mean, real_gradient(network, seen.detach(), label, at_once))
    # the second derivatives of the loss in images and weights, taken from either side
    targets = torch.full((len(rows),), label, device=seen.device)
    loss = F.cross_entropy(network(seen[rows]), targets, reduction="sum") / len(seen)
    parameters = [matched_parameters(network)[k] for k in response.matched]
    in_images, *in_weights = torch.autograd.grad(loss, [leaf, *parameters], create_graph=True)
    effects = [torch.autograd.grad(in_weights, leaf, response.slopes(m), retain_graph=True)[0] for m in mixtures]
    moved = [
        torch.autograd.grad(in_images, parameters, q, retain_graph=True) for q in _orthonormal(torch.stack(effects))
    ]
    stacked = [torch.stack(layer) for layer in zip(*map(response.back, moved), strict=True)]
    directions = dict(zip(response.matched, stacked, strict=True))
    products, total = [_products(first, directions)], [g.sum(0) for g in first]
    for part in filter(len, order[len(first[0]) :].split(max(1, min(at_once, held)))):
        each = sample_gradients(real[part])
        products.append(_products(each, directions))
        total = [t + g.sum(0) for t, g in zip(total, each, strict=True)]
    norms = _norms(torch.cat(products))[order.argsort()] * math.sqrt(len(seen) / len(rows))
    return norms, [t / len(real) for t in total]


def feature_effects(
    embed: Callable[[Tensor], Tensor], features: Tensor, images: Tensor, view: View, probes: int,
    generator: torch.Generator, at_once: int,
) -> Tensor:  # fmt: skip
    """The same for L = |mean features of the real images - mean features of the synthetic images|^2 [n].

    `features` [n, features] are those of the real batch; `images` and `view` (one row in, one row out) as above.
    """
    if len(features) == 1:
        return features.new_zeros(1)
    features = features.detach()
    rows = torch.randperm(len(images), generator=generator)[:PERTURBED].to(images.device)
    leaf = images.detach()[rows].requires_grad_(True)
    synthetic = embed(view(leaf))
    mixtures = torch.randn(probes, len(features), generator=generator).to(features) @ (features - features.mean(0))
    effects = [
        torch.autograd.grad(synthetic, leaf, change.expand_as(synthetic), retain_graph=True)[0] for change in mixtures
    ]
    basis, step = _orthonormal(torch.stack(effects)), MOVE * leaf.detach().norm().clamp_min(1e-6)
    # features are continuous, so their derivative may be a difference, of two plain passes
    ends = torch.cat([view(leaf.detach() + sign * step * q) for sign in (1, -1) for q in basis])
    with torch.no_grad():
        moved = torch.cat([embed(part) for part in ends.split(at_once)]).unflatten(0, (2, len(basis), len(rows))).sum(2)
    directions = (moved[0] - moved[1]) / (step * len(images))
    return _norms(features @ directions.T) * math.sqrt(len(images) / len(rows))


class _Response:
    """How the slopes of a distance in the synthetic gradient depend on the real gradient.

    `matched` are the indices of the parameters that the distance depends on; changes of the others are left out.
    """

    def __init__(self, distance: GradientDistance, real: Sequence[Tensor], synthetic: Sequence[Tensor]):
        leaves = [[x[None].detach().requires_grad_(True) for x in gradient] for gradient in (real, synthetic)]
        found = torch.autograd.grad(distance(*leaves).sum(), leaves[1], create_graph=True, allow_unused=True)
        self.matched = [k for k, slope in enumerate(found) if slope is not None and slope.requires_grad]
        self.real, self.of_slopes = [leaves[0][k] for k in self.matched], [found[k] for k in self.matched]
        self.weights = [torch.zeros_like(x, requires_grad=True) for x in self.real]
        self.pulled = torch.autograd.grad(self.of_slopes, self.real, self.weights, create_graph=True)

    def slopes(self, change: Sequence[Tensor]) -> list[Tensor]:
        """A change of the real gradient, per parameter -> that of the slopes, per matched parameter."""
        pushed = torch.autograd.grad(
            self.pulled, self.weights, [change[k][None] for k in self.matched], retain_graph=True
        )
        return [x[0] for x in pushed]

    def back(self, change: Sequence[Tensor]) -> list[Tensor]:
        """The transposed map, both per matched parameter."""
        pulled = torch.autograd.grad(self.of_slopes, self.real, [x[None] for x in change], retain_graph=True)
        return [x[0] for x in pulled]


def _products(gradients: Sequence[Tensor], directions: Mapping[int, Tensor]) -> Tensor:
    """Gradients of samples, per parameter [n, *parameter], and directions [k, *parameter] -> [n, k]."""
    return torch.stack([gradients[i].flatten(1) @ d.flatten(1).T for i, d in directions.items()]).sum(0)


def _orthonormal(effects: Tensor) -> Tensor:
    """[directions, *shape] -> an orthonormal basis of their span [at most as many, *shape]."""
    return torch.linalg.qr(effects.flatten(1).T)[0].T.unflatten(1, effects.shape[1:])


def _norms(products: Tensor) -> Tensor:
    """<direction, statistic> of each sample [n, directions] -> the norm of its effect [n]."""
    return (products - products.mean(0)).norm(dim=1) / (len(products) - 1)
