"""Inner products of each sample's gradient with a few directions, without keeping the gradients of all samples.

For the weight of a plain convolution or linear layer, a sample's gradient follows from the layer's input and the gradient
at its output. Other weights go through autograd twice per direction, which is slower. Not covered: the weight of a
convolution that the network also uses outside of its layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_at_scale.distillation.methods.shared.class_gradients import is_plain, recorded, unfolded
from distill_at_scale.distillation.methods.shared.gradient_distance import matched_parameters


def projections(
    network: nn.Module, images: Tensor, label: int, directions: Sequence[Tensor | None], at_once: int
) -> Tensor:
    """<directions, gradient of a sample's cross-entropy> [n, directions], `at_once` samples at a time.

    `directions` has a tensor [directions, *weight] for each of `matched_parameters`, or None for zero.
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
            result = torch.stack(
                [torch.autograd.grad(gradients, weights, list(c), retain_graph=True)[0] for c in columns], 1
            )
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
