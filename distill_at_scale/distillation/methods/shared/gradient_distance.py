"""Gradients of a class's real batch, and the distance between gradients (arXiv 2006.05929, DC; METHOD.md section 4).

A class's gradient is that of its mean cross-entropy over the samples that count. The batch goes through the network
in parts that fit the processor's cache, which halves the time on a CPU; the sum over the parts is the gradient of
the whole. The networks' normalisation works sample by sample, so the parts do not see each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GradientDistance = Callable[
    [Sequence[Tensor], Sequence[Tensor]], Tensor
]  # real and synthetic gradients -> their distance


def matched_parameters(network: nn.Module) -> list[nn.Parameter]:
    """What is matched: every weight with an output and an input side; biases and norm weights are left out."""
    return [p for p in network.parameters() if p.dim() >= 2]


def cosine_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """Per class the sum over layers and output channels of 1 - <a, b> / (|a| |b| + 1e-6) [classes].

    Gradients are [classes, *parameter] (DC, equation 5 with the official constant).
    """
    total = synthetic[0].new_zeros(len(synthetic[0]))
    for a, b in zip(real, synthetic, strict=True):
        a, b = a.flatten(2), b.flatten(2)  # classes x output channels x the rest
        total = total + (1 - (a * b).sum(2) / (a.norm(dim=2) * b.norm(dim=2) + 1e-6)).sum(1)
    return total


def squared_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """Per class the sum of squared differences, without the last layer [classes] (IDC, its metric `mse`)."""
    return _differences(real, synthetic, torch.square)


def absolute_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """Per class the sum of absolute differences, without the last layer [classes] (IDC, its metric `l1`)."""
    return _differences(real, synthetic, torch.abs)


def _differences(real: Sequence[Tensor], synthetic: Sequence[Tensor], size: Callable[[Tensor], Tensor]) -> Tensor:
    pairs = list(zip(real, synthetic, strict=True))
    return torch.stack([size(a - b).flatten(1).sum(1) for a, b in pairs[:-1] or pairs]).sum(0)


def of_single_class(metric: GradientDistance) -> GradientDistance:
    """The metric between the gradients of one class [*parameter], a scalar."""
    return lambda real, synthetic: metric([a[None] for a in real], [b[None] for b in synthetic])[0]


class_distance = of_single_class(cosine_distance)


def synthetic_gradient(network: nn.Module, images: Tensor, label: int) -> list[Tensor]:
    """The matched gradients of one class's synthetic images [ipc, *shape], differentiable in the images."""
    loss = F.cross_entropy(network(images), _targets(images, label))
    return list(torch.autograd.grad(loss, matched_parameters(network), create_graph=True))


def real_gradient(network: nn.Module, images: Tensor, label: int, at_once: int) -> list[Tensor]:
    """The matched gradients of one class's real images [n, *shape], `at_once` images at a time; nothing to differentiate."""
    parameters = matched_parameters(network)
    total: list[Tensor] = []
    for part in images.split(at_once):
        loss = F.cross_entropy(network(part), _targets(part, label), reduction="sum") / len(images)
        gradient = torch.autograd.grad(loss, parameters)
        total = [a + b for a, b in zip(total, gradient, strict=True)] if total else list(gradient)
    return total


@torch.no_grad()
def sample_losses(network: nn.Module, images: Tensor, labels: int | Tensor, at_once: int) -> Tensor:
    """The cross-entropy of each image [n]; `labels` is one for all, or [n]."""
    targets = labels if isinstance(labels, Tensor) else _targets(images, labels)
    pairs = zip(images.split(at_once), targets.split(at_once), strict=True)
    return torch.cat([F.cross_entropy(network(part), t, reduction="none") for part, t in pairs])


def _targets(images: Tensor, label: int) -> Tensor:
    return torch.full((len(images),), label, device=images.device)
