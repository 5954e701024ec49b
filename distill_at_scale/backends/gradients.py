"""Gradients of real batches, class by class, and the distance between gradients (arXiv 2006.05929, DC; METHOD.md section 4).

A class's gradient is that of its mean cross-entropy over the samples that runtime pruning keeps. For a plain chain of layers
that treat samples independently (the ConvNet), one forward pass serves all classes together, losses decide what is kept, and
only then do the kept rows alone go backward, with the weight gradients taken class by class: dropping a share of the batch
saves that share of the backward pass. Other networks run class by class through autograd, after a forward pass without
gradients where samples are to be dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_at_scale.networks import ConvNet

Keep = Callable[[Tensor], Tensor] | None  # losses [n] -> bool [n]; None keeps all
Rows = list[Tensor]  # per class, the rows of the batch that count


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
    labels = torch.full((len(images),), label, device=images.device)
    loss = F.cross_entropy(network(images), labels)
    return list(torch.autograd.grad(loss, matched_parameters(network), create_graph=True))


def class_gradients(network: nn.Module, batches: Sequence[Tensor], labels: Sequence[int], keep: Keep) -> list[list[Tensor]]:
    """Per class, the matched gradients [one tensor per parameter] of its real batch [n_c, *shape]; nothing to differentiate."""
    if isinstance(network, ConvNet):
        return _chain_gradients(network, batches, labels, keep)
    return [_autograd_gradient(network, images, label, keep) for images, label in zip(batches, labels, strict=True)]


def _autograd_gradient(network: nn.Module, images: Tensor, label: int, keep: Keep) -> list[Tensor]:
    targets = torch.full((len(images),), label, device=images.device)
    if keep is not None:
        with torch.no_grad():
            kept = keep(F.cross_entropy(network(images), targets, reduction="none"))
        images, targets = images[kept], targets[kept]
    loss = F.cross_entropy(network(images), targets)
    return list(torch.autograd.grad(loss, matched_parameters(network)))


@torch.no_grad()
def _chain_gradients(network: ConvNet, batches: Sequence[Tensor], labels: Sequence[int], keep: Keep) -> list[list[Tensor]]:
    sizes = [len(batch) for batch in batches]
    targets = torch.tensor(labels, device=batches[0].device).repeat_interleave(torch.tensor(sizes, device=batches[0].device))
    saved, logits = _forward([*network.features, network.classifier], torch.cat(list(batches)))
    losses = F.cross_entropy(logits, targets, reduction="none")
    masks = [keep(part) if keep else torch.ones_like(part, dtype=torch.bool) for part in losses.split(sizes)]
    counts = [int(mask.sum()) for mask in masks]
    rows = torch.cat(masks).nonzero()[:, 0] if sum(counts) < sum(sizes) else None
    weight = torch.cat([torch.full((n,), 1 / n) for n in counts]).to(logits.device)
    logits, targets = (logits, targets) if rows is None else (logits[rows], targets[rows])
    gradient = (logits.softmax(1) - F.one_hot(targets, logits.shape[1])) * weight[:, None]
    return _backward(saved, gradient, rows, counts)


@dataclass
class _Saved:
    """A layer and what its backward pass needs of the forward pass."""

    layer: nn.Module
    inputs: Tensor
    extra: tuple[Tensor, ...] = ()


def _forward(layers: Sequence[nn.Module], x: Tensor) -> tuple[list[_Saved], Tensor]:
    saved = []
    for layer in layers:
        if isinstance(layer, nn.GroupNorm):
            n, c, rest = x.shape[0], x.shape[1], x[0, 0].numel()
            y, mean, rstd = torch.native_group_norm(x, layer.weight, layer.bias, n, c, rest, layer.num_groups, layer.eps)
            saved.append(_Saved(layer, x, (mean, rstd)))
        elif isinstance(layer, nn.ReLU):
            y = x.relu()
            saved.append(_Saved(layer, y))
        else:
            y = layer(x)
            saved.append(_Saved(layer, x))
        x = y
    return saved, x


def _backward(saved: list[_Saved], g: Tensor, rows: Tensor | None, counts: list[int]) -> list[list[Tensor]]:
    """Walk back from the logits' gradient g [kept, classes]; per class, weight gradients in parameter order."""
    per_class: list[list[Tensor]] = [[] for _ in counts]
    for position in reversed(range(len(saved))):
        entry = saved[position]
        x = entry.inputs if rows is None else entry.inputs[rows]
        extra = entry.extra if rows is None else tuple(t[rows] for t in entry.extra)
        if isinstance(entry.layer, (nn.Linear, nn.Conv2d)):
            for k, (xc, gc) in enumerate(zip(x.split(counts), g.split(counts), strict=True)):
                per_class[k].insert(0, _weight_gradient(entry.layer, xc, gc))
        if position:
            g = _input_gradient(entry.layer, x, g, extra)
    return per_class


def _weight_gradient(layer: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return g.T @ x
    return _convolution_backward(layer, x, g, (False, True, False))[1]


def _input_gradient(layer: nn.Module, x: Tensor, g: Tensor, extra: tuple[Tensor, ...]) -> Tensor:
    aten = torch.ops.aten
    if isinstance(layer, nn.Linear):
        return g @ layer.weight
    if isinstance(layer, nn.Flatten):
        return g.view(x.shape)
    if isinstance(layer, nn.ReLU):
        return aten.threshold_backward(g, x, 0)
    if isinstance(layer, nn.AvgPool2d):
        size = (layer.kernel_size,) * 2 if isinstance(layer.kernel_size, int) else layer.kernel_size
        return aten.avg_pool2d_backward(g, x, size, size, (0, 0), False, True, None)
    if isinstance(layer, nn.GroupNorm):
        n, c, rest = x.shape[0], x.shape[1], x[0, 0].numel()
        masks = (True, False, False)
        return aten.native_group_norm_backward(g, x, *extra, layer.weight, n, c, rest, layer.num_groups, masks)[0]
    assert isinstance(layer, nn.Conv2d), f"no backward pass for {type(layer).__name__}"
    return _convolution_backward(layer, x, g, (True, False, False))[0]


def _convolution_backward(layer: Any, x: Tensor, g: Tensor, wanted: tuple[bool, bool, bool]) -> Any:
    return torch.ops.aten.convolution_backward(
        g, x, layer.weight, [layer.out_channels], layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups, wanted
    )
