"""The individual treatment effect (ITE) of a real sample on the gradient of the synthetic images, to first order.

ITE_i = M' (g_i - g) / (n - 1) with M' = d2L / dS dg (`distillation/README.md`, "Runtime pruning"). Its norm is estimated in
the few directions in which the batch's effects are large (a randomised range finder, Halko, Martinsson & Tropp 2011, arXiv
0909.4061): a direction q is the effect of a random mixture of samples, orthonormalised. <q, ITE_i> = <M q, g_i - g> / (n - 1)
needs one product with M per direction. Only a few images of the class are perturbed.

Not covered: networks whose output for a sample depends on the rest of the batch, and views that are not affine in the
stored images (siamese augmentation and multi-formation are).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_at_scale.distillation.methods.shared.class_gradients import is_plain, recorded, unfolded
from distill_at_scale.distillation.methods.shared.gradient_distance import (
    GradientDistance,
    matched_parameters,
    real_gradient,
)

View = Callable[[Tensor], Tensor]
PERTURBED, PERTURBED_FOR_FEATURES = 4, 2  # images of a class whose gradients are considered


def gradient_effects(
    network: nn.Module, real: Tensor, images: Tensor, view: View, label: int, distance: GradientDistance, probes: int,
    generator: torch.Generator, at_once: int,
) -> Tensor:  # fmt: skip
    """The norm of each real sample's effect under gradient matching [n]; 0 for a single sample.

    Args:
        real: the real batch as the network sees it [n, *shape].
        images: the class's stored synthetic images [m, *shape].
        view: stored images -> what the network sees of them; deterministic and affine.
        distance: the matching loss of one class's gradients, a scalar.
        probes: the number of directions.
        at_once: samples per forward pass.
    """
    if len(real) == 1:
        return real.new_zeros(1)
    order = torch.randperm(len(real), generator=generator).to(real.device)
    parts = order.chunk(probes + 1)  # the effects of all parts sum to zero, so the last one is redundant
    groups = [real_gradient(network, real[part], label, at_once) for part in parts]
    shares = [len(part) / len(real) for part in parts]
    mean = [sum(s * g for s, g in zip(shares, layer, strict=True)) for layer in zip(*groups, strict=True)]  # type: ignore[misc]
    response = _Response(network, images.detach(), view, label, distance, mean, generator, at_once)
    if not response.is_seen:
        return real.new_zeros(len(real))
    effects = [response.image_change([g - m for g, m in zip(group, mean, strict=True)]) for group in groups[:-1]]
    changes = [response.gradient_change(direction) for direction in _orthonormal(torch.stack(effects))]
    directions = [None if layer[0] is None else torch.stack(layer) for layer in zip(*changes, strict=True)]  # type: ignore[arg-type]
    products = projections(network, real, label, directions, at_once)
    return _norms(products) * math.sqrt(len(images) / len(response.perturbed))


def feature_effects(
    embed: Callable[[Tensor], Tensor], features: Tensor, images: Tensor, view: View, probes: int,
    generator: torch.Generator, at_once: int,
) -> Tensor:  # fmt: skip
    """The same for L = |mean features of the real images - mean features of the synthetic images|^2 [n].

    `features` [n, features] are those of the real batch; `images` and `view` (one row in, one row out) as above.
    """
    if len(features) == 1:
        return features.new_zeros(1)
    features, factor = features.detach(), 2 / len(images)
    order = torch.randperm(len(images), generator=generator)
    perturbed = images.detach()[order[:PERTURBED_FOR_FEATURES].to(images.device)]
    mixtures = torch.randn(probes, len(features), generator=generator).to(features) @ (features - features.mean(0))

    def pull_back(rows: Tensor, cotangents: Tensor) -> Tensor:
        rows = rows.detach().requires_grad_(True)
        return torch.autograd.grad(embed(view(rows)), rows, cotangents)[0]

    def push_forward(rows: Tensor, tangents: Tensor) -> Tensor:
        seen = view(rows)
        moves = view(rows + tangents) - seen
        seen = seen.detach().requires_grad_(True)
        return _jvp([embed(seen)], [seen])([moves])[0]

    rows = perturbed.repeat(probes, *[1] * (perturbed.dim() - 1))  # direction by direction
    cotangents = mixtures.repeat_interleave(len(perturbed), 0)
    effects = torch.cat(list(map(pull_back, rows.split(at_once), cotangents.split(at_once))))
    basis = _orthonormal(effects.unflatten(0, (probes, len(perturbed)))).flatten(0, 1)
    changes = torch.cat(list(map(push_forward, rows[: len(basis)].split(at_once), basis.split(at_once))))
    directions = factor * changes.unflatten(0, (-1, len(perturbed))).sum(1)  # directions x features
    return _norms(features @ directions.T) * math.sqrt(len(images) / len(perturbed))


class _Response:
    """Products with M and M': how the gradient in a few images and the mean real gradient depend on each other."""

    def __init__(
        self, network: nn.Module, images: Tensor, view: View, label: int, distance: GradientDistance, mean: list[Tensor],
        generator: torch.Generator, at_once: int,
    ):  # fmt: skip
        self.images, self.view, self.layers = images, view, len(mean)
        self.perturbed = torch.randperm(len(images), generator=generator)[:PERTURBED].to(images.device)
        real = [m.detach().requires_grad_(True) for m in mean]
        self.seen = view(images)
        synthetic = [g.requires_grad_(True) for g in real_gradient(network, self.seen, label, at_once)]
        slopes = torch.autograd.grad(distance(real, synthetic), synthetic, create_graph=True, allow_unused=True)
        self.matched = [k for k, slope in enumerate(slopes) if slope is not None and slope.requires_grad]
        self.slopes, self.mean = [slopes[k] for k in self.matched], [real[k] for k in self.matched]
        self.leaf = images[self.perturbed].requires_grad_(True)
        self.rows = self._moves(torch.randn(self.leaf.shape, generator=generator).to(images)).flatten(1).any(1)
        self.is_seen = bool(self.rows.any())  # whether the view shows any of the perturbed images
        if self.is_seen:  # the part of the synthetic gradient that comes from the perturbed images
            part = self.view(self.images.index_copy(0, self.perturbed, self.leaf))[self.rows]
            targets = torch.full((len(part),), label, device=part.device)
            loss = F.cross_entropy(network(part), targets, reduction="sum") / len(self.seen)
            parameters = matched_parameters(network)
            self.gradients = torch.autograd.grad(loss, [parameters[k] for k in self.matched], create_graph=True)
            self.gradients_forward = _jvp(self.gradients, [part])
            self.slopes_forward = _jvp(self.slopes, self.mean)

    def _moves(self, direction: Tensor) -> Tensor:
        """The change of what the network sees if the perturbed images move by `direction`."""
        return self.view(self.images.index_add(0, self.perturbed, direction)) - self.seen

    def image_change(self, change: list[Tensor]) -> Tensor:
        """M' change: the change of the gradient in the perturbed images with the mean real gradient [perturbed, *shape]."""
        slopes = self.slopes_forward([change[k] for k in self.matched])
        return torch.autograd.grad(self.gradients, self.leaf, slopes, retain_graph=True)[0]

    def gradient_change(self, direction: Tensor) -> list[Tensor | None]:
        """M direction, per layer; None for layers that the distance ignores."""
        change = self.gradients_forward([self._moves(direction)[self.rows]])
        products = torch.autograd.grad(self.slopes, self.mean, change, retain_graph=True)
        by_layer = dict(zip(self.matched, products, strict=True))
        return [by_layer.get(k) for k in range(self.layers)]


def _jvp(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """The map from changes of the inputs to those of the outputs: the derivative of the backward pass in its weights."""
    weights = [torch.zeros_like(output, requires_grad=True) for output in outputs]
    backwards = torch.autograd.grad(outputs, inputs, weights, create_graph=True)
    return lambda change: torch.autograd.grad(backwards, weights, change, retain_graph=True)


def _orthonormal(effects: Tensor) -> Tensor:
    """[directions, *shape] -> an orthonormal basis of their span [at most as many, *shape]."""
    return torch.linalg.qr(effects.flatten(1).T)[0].T.unflatten(1, effects.shape[1:])


def _norms(products: Tensor) -> Tensor:
    """<direction, statistic> of each sample [n, directions] -> the norm of its effect [n]."""
    return (products - products.mean(0)).norm(dim=1) / (len(products) - 1)


def projections(
    network: nn.Module, images: Tensor, label: int, directions: Sequence[Tensor | None], at_once: int
) -> Tensor:
    """<directions, gradient of a sample's cross-entropy> [n, directions], `at_once` samples at a time.

    `directions` has a tensor [directions, *weight] for each of `matched_parameters`, or None for zero. The gradients of all
    samples are not kept: for the weight of a plain convolution or linear layer they follow from the layer's input and the
    gradient at its output. Other weights go through autograd twice per direction, which is slower. Not covered: the weight
    of a convolution that the network also uses outside of its layer.
    """
    by_weight = {p: d for p, d in zip(matched_parameters(network), directions, strict=True) if d is not None}
    layers = {m: by_weight[m.weight] for m in network.modules() if is_plain(m) and m.weight in by_weight}  # type: ignore[index]
    others = {p: d for p, d in by_weight.items() if not any(p is m.weight for m in layers)}
    parts = []
    for part in images.split(at_once):
        with recorded(layers) as uses:
            targets = torch.full((len(part),), label, device=part.device)
            losses = F.cross_entropy(network(part), targets, reduction="none")
        result = losses.new_zeros(len(part), 1)
        if others:  # the gradient of the weighted losses is linear in the weights of the samples
            weights = torch.ones_like(losses, requires_grad=True)
            gradients = torch.autograd.grad(losses, list(others), weights, create_graph=True)
            columns = zip(*others.values(), strict=True)
            products = [torch.autograd.grad(gradients, weights, list(c), retain_graph=True)[0] for c in columns]
            result = torch.stack(products, 1)
        outputs = torch.autograd.grad(losses.sum(), [edge for *_, edge in uses])
        for (layer, x, _), g in zip(uses, outputs, strict=True):
            result = result + _layer_products(layer, x.detach(), g, layers[layer])
        parts.append(result)
    return torch.cat(parts)


def _layer_products(layer: nn.Module, x: Tensor, g: Tensor, directions: Tensor) -> Tensor:
    """Input [n, ...] of a layer, gradient at its output [n, ...] and directions [k, *weight] -> [n, k]."""
    if isinstance(layer, nn.Linear):
        filtered = F.linear(x, directions.flatten(0, 1)).unflatten(-1, directions.shape[:2])  # n, ..., k, out
        products = (filtered * g.unsqueeze(-2)).sum(-1)
        return products.flatten(1, -2).sum(1) if products.dim() > 2 else products
    gradients = torch.bmm(g.flatten(2), unfolded(x, layer))  # type: ignore[arg-type]  # n, out, in x kernel
    return gradients.flatten(1) @ directions.flatten(1).T
