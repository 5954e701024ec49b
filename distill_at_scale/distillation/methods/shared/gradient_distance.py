"""The matched gradients of one class, and the distances between gradients (DC, arXiv 2006.05929; IDC, arXiv 2205.14959).

A class's gradient is that of its mean cross-entropy. Real batches pass the network in parts that fit the processor's cache,
which halves the time on a CPU; networks normalise each sample on its own, so the sum over the parts is the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# gradients of real and of synthetic images, per matched parameter [classes, *parameter] -> distances [classes]
GradientDistance = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
Forward = Callable[[Tensor], Tensor]  # images [n, *shape] -> logits [n, classes]


def matched_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The parameters whose gradients are matched: all weights with an output and an input side, no biases or norms."""
    return [p for p in network.parameters() if p.dim() >= 2]


def cosine_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """The sum over layers and output channels of 1 - <a, b> / (|a| |b| + 1e-6) (DC; the constant is the official code's)."""
    total = synthetic[0].new_zeros(len(synthetic[0]))
    for a, b in zip(real, synthetic, strict=True):
        a, b = a.flatten(2), b.flatten(2)  # classes x output channels x the rest
        total = total + (1 - (a * b).sum(2) / (a.norm(dim=2) * b.norm(dim=2) + 1e-6)).sum(1)
    return total


def squared_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """The sum of squared differences without the last layer (IDC, `metric: mse`)."""
    pairs = list(zip(real, synthetic, strict=True))
    return torch.stack([torch.square(a - b).flatten(1).sum(1) for a, b in pairs[:-1] or pairs]).sum(0)


def absolute_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """The sum of absolute differences without the last layer (IDC, `metric: l1`)."""
    pairs = list(zip(real, synthetic, strict=True))
    return torch.stack([torch.abs(a - b).flatten(1).sum(1) for a, b in pairs[:-1] or pairs]).sum(0)


def synthetic_gradient(network: nn.Module, images: Tensor, label: int) -> list[Tensor]:
    """The matched gradients of one class's images [n, *shape], differentiable in the images."""
    loss = F.cross_entropy(network(images), torch.full((len(images),), label, device=images.device))
    return list(torch.autograd.grad(loss, matched_parameters(network), create_graph=True))


def real_gradient(
    network: nn.Module, images: Tensor, label: int, at_once: int, forward: Forward | None = None
) -> list[Tensor]:
    """The same without a graph, `at_once` images at a time; `forward` is faster code for the network."""
    targets = torch.full((len(images),), label, device=images.device)
    return gradient_in_parts(forward or network, matched_parameters(network), images, targets, len(images), at_once)


def gradient_in_parts(
    forward: Forward, parameters: Sequence[nn.Parameter], images: Tensor, targets: Tensor, count: int, at_once: int
) -> list[Tensor]:
    """The gradient of the summed cross-entropy of images [n, *shape], n >= 1, divided by `count`.

    `targets` are classes [n] or shares [n, classes].
    """
    total = list[Tensor]()
    for part, own in zip(images.split(at_once), targets.split(at_once), strict=True):
        loss = F.cross_entropy(forward(part), own, reduction="sum") / count
        gradient = torch.autograd.grad(loss, parameters)
        total = [a + b for a, b in zip(total, gradient, strict=True)] if total else list(gradient)
    return total


@torch.no_grad()
def sample_losses(network: Forward, images: Tensor, targets: Tensor, at_once: int) -> Tensor:
    """The cross-entropy of each image [n]; `targets` are classes [n]."""
    pairs = zip(images.split(at_once), targets.split(at_once), strict=True)
    return torch.cat([F.cross_entropy(network(part), t, reduction="none") for part, t in pairs])
