"""Gradients of a class's real batch, and the distance between gradients (arXiv 2006.05929, DC; METHOD.md section 4).

A class's gradient is that of its mean cross-entropy over the samples that count. The batch goes through the network
in parts that fit the processor's cache, which halves the time on a CPU; the sum over the parts is the gradient of
the whole. The networks' normalisation works sample by sample, so the parts do not see each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def matched_parameters(network: nn.Module) -> list[nn.Parameter]:
    """What is matched: every weight with an output and an input side; biases and norm weights are left out."""
    return [p for p in network.parameters() if p.dim() >= 2]


def distance(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """Sum over layers and output channels of 1 - <a, b> / (|a| |b| + 1e-6) (DC, equation 5 with the official constant)."""
    total = synthetic[0].new_zeros(())
    for a, b in zip(real, synthetic, strict=True):
        a, b = a.flatten(1), b.flatten(1)  # output channels x the rest
        total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()
    return total


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
def losses(network: nn.Module, images: Tensor, label: int, at_once: int) -> Tensor:
    """The cross-entropy of each of a class's images [n]."""
    parts = [F.cross_entropy(network(p), _targets(p, label), reduction="none") for p in images.split(at_once)]
    return torch.cat(parts)


def _targets(images: Tensor, label: int) -> Tensor:
    return torch.full((len(images),), label, device=images.device)
