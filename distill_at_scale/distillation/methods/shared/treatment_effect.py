"""The individual treatment effect of real samples on the synthetic images' gradient, to first order (METHOD.md section 3).

For a matching loss L that depends on the real batch through a mean statistic g (gradients, features) alone, leaving out
sample i moves g by (g - g_i) / (n - 1), so ITE_i = M' (g_i - g) / (n - 1) to first order, up to the sign, with
M' = d2L / dD_s dg. Its size is estimated in the few directions in which the effects of the batch are large (a randomised
range finder, Halko, Martinsson & Tropp 2011, arXiv 0909.4061): a direction q is the effect of a random mixture of samples,
orthonormalised; <q, ITE_i> = <M q, g_i - g> / (n - 1), which needs one product with M per direction instead of one per
sample. Only a few images of the class are moved, since a sample that moves one of them much moves the others much too.

Left out: networks whose output for a sample depends on the rest of the batch, and views that are not affine in the
stored images (siamese augmentation and multi-formation are).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_at_scale.distillation.methods.shared.gradient_distance import matched_parameters, real_gradient
from distill_at_scale.distillation.methods.shared.gradient_projections import projections

Distance = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]  # real and synthetic gradients -> a scalar
View = Callable[[Tensor], Tensor]
Gradients = list[Tensor]
MOVED, MOVED_FOR_FEATURES = 4, 2  # synthetic images of a class whose gradients are looked at


def gradient_effects(
    network: nn.Module,
    real: Tensor,
    images: Tensor,
    view: View,
    label: int,
    distance: Distance,
    probes: int,
    generator: torch.Generator,
    at_once: int,
) -> Tensor:
    """The size of each real sample's effect under gradient matching [n]; 0 for a sample that is alone.

    `real` [n, *shape] as the network sees it; `images` [m, *shape] the class's synthetic images as they are stored, which
    `view` turns into what the network sees, the same every time; `distance` the matching loss of two lists of gradients;
    `probes` the number of directions.
    """
    if len(real) == 1:
        return real.new_zeros(1)
    order = torch.randperm(len(real), generator=generator).to(real.device)
    parts = order.chunk(probes + 1)  # the effects of all parts add up to none, so the last one tells nothing new
    groups = [real_gradient(network, real[part], label, at_once) for part in parts]
    shares = [len(part) / len(real) for part in parts]
    mean = [sum(s * g for s, g in zip(shares, layer, strict=True)) for layer in zip(*groups, strict=True)]  # type: ignore[misc]
    response = _Response(network, images.detach(), view, label, distance, mean, generator, at_once)
    if not response.is_seen:
        return real.new_zeros(len(real))
    effects = [response.back([g - m for g, m in zip(group, mean, strict=True)]) for group in groups[:-1]]
    ahead = [response.ahead(direction) for direction in _orthonormal(torch.stack(effects))]
    directions = [None if layer[0] is None else torch.stack(layer) for layer in zip(*ahead, strict=True)]  # type: ignore[arg-type]
    return _size(projections(network, real, label, directions, at_once)) * math.sqrt(len(images) / len(response.moved))


def feature_effects(
    embed: Callable[[Tensor], Tensor],
    features: Tensor,
    images: Tensor,
    view: View,
    probes: int,
    generator: torch.Generator,
    at_once: int,
) -> Tensor:
    """The same for matching mean features, L = |mean features of the real - of the synthetic images|^2 [n].

    `features` [n, features] of the real batch; `images` [m, *shape] and `view`, one row in and one out, as above.
    """
    if len(features) == 1:
        return features.new_zeros(1)
    features, factor = features.detach(), 2 / len(images)
    moved = images.detach()[_some(len(images), MOVED_FOR_FEATURES, generator).to(images.device)]
    mixtures = torch.randn(probes, len(features), generator=generator).to(features) @ (features - features.mean(0))
    rows = moved.repeat(probes, *[1] * (moved.dim() - 1))  # direction by direction
    effects = _in_step(lambda x, c: _back(embed, view, x, c), at_once, rows, mixtures.repeat_interleave(len(moved), 0))
    ways = _orthonormal(effects.unflatten(0, (probes, len(moved)))).flatten(0, 1)
    changes = _in_step(lambda x, q: _ahead(embed, view, x, q), at_once, rows[: len(ways)], ways)
    directions = factor * changes.unflatten(0, (-1, len(moved))).sum(1)  # directions x features
    return _size(features @ directions.T) * math.sqrt(len(images) / len(moved))


class _Response:
    """How the gradient in a few of a class's images follows the real batch's mean gradient, and the other way round."""

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        view: View,
        label: int,
        distance: Distance,
        mean: Gradients,
        generator: torch.Generator,
        at_once: int,
    ):
        self.images, self.view = images, view
        self.moved = _some(len(images), MOVED, generator).to(images.device)
        given = [m.detach().requires_grad_(True) for m in mean]
        self.seen = view(images)
        made = [g.requires_grad_(True) for g in real_gradient(network, self.seen, label, at_once)]
        slopes = torch.autograd.grad(distance(given, made), made, create_graph=True, allow_unused=True)
        self.counted = [k for k, slope in enumerate(slopes) if slope is not None and slope.requires_grad]
        self.slopes = [slopes[k] for k in self.counted]
        self.layers, self.counted_mean = len(given), [given[k] for k in self.counted]
        self.leaf = images[self.moved].requires_grad_(True)
        self.rows = self._moves(torch.randn(self.leaf.shape, generator=generator).to(images)).flatten(1).any(1)
        if self.is_seen:
            self._follow(network, label)

    @property
    def is_seen(self) -> bool:
        """Whether the view shows any of the moved images."""
        return bool(self.rows.any())

    def _follow(self, network: nn.Module, label: int) -> None:
        """The part of the synthetic gradient that the moved images make, as a function of them."""
        part = self.view(self.images.index_copy(0, self.moved, self.leaf))[self.rows]
        targets = torch.full((len(part),), label, device=part.device)
        loss = F.cross_entropy(network(part), targets, reduction="sum") / len(self.seen)
        parameters = matched_parameters(network)
        self.gradients = torch.autograd.grad(loss, [parameters[k] for k in self.counted], create_graph=True)
        self.forward_of_gradients = _transposed(self.gradients, [part])
        self.forward_of_slopes = _transposed(self.slopes, self.counted_mean)

    def _moves(self, way: Tensor) -> Tensor:
        """How what the network sees moves as the moved images do."""
        return self.view(self.images.index_add(0, self.moved, way)) - self.seen

    def back(self, change: Gradients) -> Tensor:
        """M' change: how the moved images' gradient changes with the mean real gradient [moved, *shape]."""
        slopes = self.forward_of_slopes([change[k] for k in self.counted])
        return torch.autograd.grad(self.gradients, self.leaf, slopes, retain_graph=True)[0]

    def ahead(self, way: Tensor) -> list[Tensor | None]:
        """M way, layer by layer: None where a layer does not count."""
        change = self.forward_of_gradients([self._moves(way)[self.rows]])
        found = torch.autograd.grad(self.slopes, self.counted_mean, change, retain_graph=True)
        result: list[Tensor | None] = [None] * self.layers
        for k, direction in zip(self.counted, found, strict=True):
            result[k] = direction
        return result


def _transposed(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """A change of the inputs -> that of the outputs: the backward pass is linear in its weights, so its own is this."""
    weights = [torch.zeros_like(output, requires_grad=True) for output in outputs]
    backwards = torch.autograd.grad(outputs, inputs, weights, create_graph=True)
    return lambda change: torch.autograd.grad(backwards, weights, change, retain_graph=True)


def _some(images: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(images, generator=generator)[:n]


def _in_step(function: Callable[[Tensor, Tensor], Tensor], at_once: int, first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([function(*p) for p in zip(first.split(at_once), second.split(at_once), strict=True)])


def _back(embed: Callable[[Tensor], Tensor], view: View, images: Tensor, cotangents: Tensor) -> Tensor:
    images = images.detach().requires_grad_(True)
    return torch.autograd.grad(embed(view(images)), images, cotangents)[0]


def _ahead(embed: Callable[[Tensor], Tensor], view: View, images: Tensor, ways: Tensor) -> Tensor:
    """How each row's features change as it moves [rows, features]."""
    seen = view(images)
    moves = view(images + ways) - seen
    seen = seen.detach().requires_grad_(True)
    return _transposed([embed(seen)], [seen])([moves])[0]


def _orthonormal(effects: Tensor) -> Tensor:
    """[directions, *shape] -> an orthonormal basis of their span [at most as many, *shape]."""
    return torch.linalg.qr(effects.flatten(1).T)[0].T.unflatten(1, effects.shape[1:])


def _size(found: Tensor) -> Tensor:
    """<direction, statistic> of each sample [n, directions] -> the size of its effect [n]."""
    return (found - found.mean(0)).norm(dim=1) / (len(found) - 1)
