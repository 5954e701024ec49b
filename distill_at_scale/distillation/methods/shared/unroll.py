"""A student's SGD steps on synthetic data, and the gradients of its end point in the images, the labels and its rate.

The loss and its three ways to a gradient (`unrolled`, `recomputed(exact=True)` and `recomputed(exact=False)`) are in
`distillation/README.md`, "TESLA"; there g_i are the gradients of the steps, and p is `pull` here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from distill_at_scale.distillation.augment import AugmentParams

LossAndGradients = tuple[Tensor, list[Tensor]]  # gradients in the learned tensors and, last, in the student's rate


@dataclass(frozen=True)
class StudentStep:
    """One step of the student: indices of its synthetic images [batch], and their augmentation."""

    rows: Tensor
    params: AugmentParams

    def split(self, at_once: int) -> list[StudentStep]:
        """The same step in parts of up to `at_once` images."""
        numbers, rows = self.params.numbers, self.rows.split(at_once)
        parts = [numbers] * len(rows) if len(numbers) != len(self.rows) else numbers.split(at_once)
        return [StudentStep(r, AugmentParams(self.params.family, n)) for r, n in zip(rows, parts, strict=True)]


@dataclass(frozen=True)
class TrajectorySegment:
    """What a student is matched with: it goes from `start` by `steps` and should reach `target` (flat parameters)."""

    start: Tensor
    target: Tensor
    steps: Sequence[StudentStep]

    def distance(self, end: Tensor) -> Tensor:
        return (end - self.target).square().sum() / (self.start - self.target).square().sum()


@dataclass(frozen=True)
class SyntheticData:
    """Images [n, *shape] and targets: classes int64 [n], or logits [n, classes] whose softmax is the soft label."""

    images: Tensor
    targets: Tensor

    @property
    def learned(self) -> list[Tensor]:
        return [x for x in (self.images, self.targets) if x.is_floating_point()]

    def batch(self, step: StudentStep) -> tuple[Tensor, Tensor]:
        """Augmented images of a step and their targets, classes or probabilities."""
        rows = step.rows.to(self.images.device)
        targets = self.targets[rows]
        return step.params.apply(self.images[rows]), targets.softmax(1) if targets.is_floating_point() else targets


class FlatNetwork:
    """A network as a function of its flat parameters; `at_once` images pass it together."""

    def __init__(self, network: nn.Module, at_once: int):
        self.network, self.at_once = network.eval().requires_grad_(False), at_once
        self.names = [name for name, _ in network.named_parameters()]
        self.shapes = [p.shape for p in network.parameters()]
        self.sizes = [p.numel() for p in network.parameters()]

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        """[n, *shape] -> [n, classes]."""
        views = [part.view(shape) for part, shape in zip(theta.split(self.sizes), self.shapes, strict=True)]
        return functional_call(self.network, dict(zip(self.names, views, strict=True)), (images,))

    def gradient(
        self, theta: Tensor, synthetic: SyntheticData, step: StudentStep, total: int, create_graph: bool = False
    ) -> Tensor:
        """Gradient, in theta, of the summed cross-entropy / total [parameters]."""
        images, targets = synthetic.batch(step)
        loss = F.cross_entropy(self.logits(theta, images), targets, reduction="sum") / total
        return torch.autograd.grad(loss, theta, create_graph=create_graph)[0]

    def gradient_in_parts(self, theta: Tensor, synthetic: SyntheticData, step: StudentStep) -> Tensor:
        """The gradient of a step without a graph, `at_once` images at a time."""
        theta = theta.detach().requires_grad_(True)
        fixed = SyntheticData(synthetic.images.detach(), synthetic.targets.detach())
        parts = [self.gradient(theta, fixed, part, len(step.rows)) for part in step.split(self.at_once)]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def products(
        self, theta: Tensor, synthetic: SyntheticData, step: StudentStep, pull: Tensor, exact: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """<g, pull> for the gradient g of a step, and its derivatives in the learned tensors and, if `exact`, in theta."""
        theta = theta.detach().requires_grad_(True)
        inputs = [*synthetic.learned, *([theta] if exact else [])]
        total, sums = pull.new_zeros(()), [torch.zeros_like(x) for x in inputs]
        for part in step.split(self.at_once):
            product = self.gradient(theta, synthetic, part, len(step.rows), create_graph=True) @ pull
            total += product.detach()
            for accumulated, gradient in zip(sums, torch.autograd.grad(product, inputs), strict=True):
                accumulated += gradient
        return total, sums


def unrolled(net: FlatNetwork, segment: TrajectorySegment, synthetic: SyntheticData, lr: Tensor) -> LossAndGradients:
    """Loss and gradients by autograd through all steps; memory grows with their number."""
    theta = segment.start.clone().requires_grad_(True)
    for step in segment.steps:
        theta = theta - lr * net.gradient(theta, synthetic, step, len(step.rows), create_graph=True)
    loss = segment.distance(theta)
    return loss.detach(), list(torch.autograd.grad(loss, [*synthetic.learned, lr]))


def recomputed(
    net: FlatNetwork, segment: TrajectorySegment, synthetic: SyntheticData, lr: Tensor, exact: bool = True
) -> LossAndGradients:
    """The same with the activations of one part of one step; `exact=False` ignores the path through theta."""
    lr = lr.detach()
    theta, visited = segment.start, []
    for step in segment.steps:
        visited.append(theta.cpu())
        theta = theta - lr * net.gradient_in_parts(theta, synthetic, step)
    pull = 2 * (theta - segment.target) / (segment.start - segment.target).square().sum()
    sums, lr_gradient = [torch.zeros_like(x) for x in synthetic.learned], torch.zeros_like(lr)
    for start, step in zip(reversed(visited), reversed(segment.steps), strict=True):
        product, gradients = net.products(start.to(pull.device), synthetic, step, pull, exact)
        lr_gradient -= product
        for accumulated, gradient in zip(sums, gradients, strict=False):  # theta's, if any, comes last
            accumulated -= lr * gradient
        if exact:
            pull = pull - lr * gradients[-1]
    return segment.distance(theta), [*sums, lr_gradient]
