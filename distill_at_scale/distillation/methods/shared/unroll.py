"""A student's steps on synthetic data, and the gradient of where it ends in the images, labels and its learning rate.

From an expert's parameters theta_0 the student takes T steps theta_(t+1) = theta_t - rate * g_t, where g_t is the gradient
of the cross-entropy of a synthetic batch at theta_t; the loss is |theta_T - target|^2 / |theta_0 - target|^2. Its gradient
comes in three ways:

- `unrolled`: autograd through all steps (MTT, arXiv 2203.11932). The graph keeps the activations of all T steps.
- `recomputed(through=True)`: the very same gradient, up to rounding, by reverse mode by hand. Only the theta_t are kept;
  going backwards, each step is computed again, and products with its second derivatives are taken one step at a time:
      d images -= rate * (dg_t/d images)^T p     p <- p - rate * (dg_t/d theta)^T p     with p = d loss / d theta_T at first.
  The activations of one part of one batch are held, however many steps there are and however large a batch is.
- `recomputed(through=False)`: TESLA's own form (arXiv 2211.10586, section 3.2 and its code). There the loss is expanded in
  G = sum of g_t, and every g_t is differentiated at a *fixed* theta_t: p stays what it is at the end. This drops how the
  images of a step act on later gradients through theta (the second of the two products); the paper calls the result MTT's
  gradient, but it equals it only for T = 1 and to first order in the rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from distill_at_scale.distillation.augment import AugmentParams


@dataclass(frozen=True)
class StudentStep:
    """One step of the student: places of the synthetic images [batch], and how they are augmented."""

    rows: Tensor
    draw: AugmentParams

    def split(self, at_once: int) -> list[StudentStep]:
        """The same step in parts."""
        numbers = self.draw.numbers
        shared = len(numbers) != len(self.rows)
        each = [numbers] * -(-len(self.rows) // at_once) if shared else numbers.split(at_once)
        rows = self.rows.split(at_once)
        return [StudentStep(r, AugmentParams(self.draw.family, n)) for r, n in zip(rows, each, strict=True)]


@dataclass(frozen=True)
class TrajectorySegment:
    """What a student is to do: from `start`, by `moves`, to `target` (flat parameters)."""

    start: Tensor
    target: Tensor
    moves: Sequence[StudentStep]

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

    def batch(self, move: StudentStep) -> tuple[Tensor, Tensor]:
        """Augmented images and the labels, classes or probabilities, of one step."""
        rows = move.rows.to(self.images.device)
        targets = self.targets[rows]
        return move.draw.apply(self.images[rows]), targets.softmax(1) if targets.is_floating_point() else targets


class FlatNetwork:
    """A network as a function of its flat parameters; `at_once` images go through it together."""

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
        self, theta: Tensor, synthetic: SyntheticData, move: StudentStep, total: int, create_graph: bool = False
    ) -> Tensor:
        """Gradient, in flat parameters theta, of the summed cross-entropy / total [parameters]."""
        images, targets = synthetic.batch(move)
        loss = F.cross_entropy(self.logits(theta, images), targets, reduction="sum") / total
        return torch.autograd.grad(loss, theta, create_graph=create_graph)[0]

    def whole_gradient(self, theta: Tensor, synthetic: SyntheticData, move: StudentStep) -> Tensor:
        """The gradient of one step, in parts, without a graph for anything else."""
        theta = theta.detach().requires_grad_(True)
        given = SyntheticData(synthetic.images.detach(), synthetic.targets.detach())
        parts = [self.gradient(theta, given, part, len(move.rows)) for part in move.split(self.at_once)]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def products(
        self, theta: Tensor, synthetic: SyntheticData, move: StudentStep, pull: Tensor, through: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """<g, pull> for the gradient g of one step, and its derivatives in the learned tensors and, `through`, theta."""
        theta = theta.detach().requires_grad_(True)
        inputs = [*synthetic.learned, *([theta] if through else [])]
        total, sums = pull.new_zeros(()), [torch.zeros_like(x) for x in inputs]
        for part in move.split(self.at_once):
            dot = self.gradient(theta, synthetic, part, len(move.rows), create_graph=True) @ pull
            total += dot.detach()
            for known, more in zip(sums, torch.autograd.grad(dot, inputs), strict=True):
                known += more
        return total, sums


LossAndGradients = tuple[
    Tensor, list[Tensor]
]  # the loss, and its gradients in the learned tensors and, last, in the rate


def unrolled(student: FlatNetwork, task: TrajectorySegment, synthetic: SyntheticData, rate: Tensor) -> LossAndGradients:
    """Loss and gradients by autograd through all steps; memory grows with their number."""
    theta = task.start.clone().requires_grad_(True)
    for move in task.moves:
        theta = theta - rate * student.gradient(theta, synthetic, move, len(move.rows), create_graph=True)
    loss = task.distance(theta)
    return loss.detach(), list(torch.autograd.grad(loss, [*synthetic.learned, rate]))


def recomputed(
    student: FlatNetwork, task: TrajectorySegment, synthetic: SyntheticData, rate: Tensor, through: bool = True
) -> LossAndGradients:
    """The same with the activations of one part of one step; `through=False` leaves out the path through theta."""
    rate = rate.detach()
    end, visited = _forward(student, task, synthetic, rate)
    pull = 2 * (end - task.target) / (task.start - task.target).square().sum()
    sums, of_rate = [torch.zeros_like(x) for x in synthetic.learned], torch.zeros_like(rate)
    for theta, move in zip(reversed(visited), reversed(task.moves), strict=True):
        dot, found = student.products(theta.to(pull.device), synthetic, move, pull, through)
        of_rate -= dot
        for known, more in zip(sums, found, strict=False):  # theta's comes after them
            known -= rate * more
        if through:
            pull = pull - rate * found[-1]
    return task.distance(end), [*sums, of_rate]


def _forward(
    student: FlatNetwork, task: TrajectorySegment, synthetic: SyntheticData, rate: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Where the student ends, and where each step began; the latter wait in host memory."""
    theta, visited = task.start, []
    for move in task.moves:
        visited.append(theta.cpu())
        theta = theta - rate * student.whole_gradient(theta, synthetic, move)
    return theta, visited
