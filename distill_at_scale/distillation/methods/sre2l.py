"""SRe2L: squeeze, recover, relabel (Yin, Xing & Shen 2023, arXiv 2306.13092; see `distillation/README.md`).

A step is one Adam update of all own images. They pass the teacher in batches that mix classes: the j-th images of the own
classes follow each other in an order drawn for each j. What is drawn for an image does not depend on the number of
workers, but a batch holds classes of one worker only, so with more workers the images are similar but not equal.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_at_scale.config.methods import SRe2LSection
from distill_at_scale.core import rng
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.methods.base import ImageMethod, MethodContext
from distill_at_scale.distillation.methods.shared.teacher import TeacherMethod
from distill_at_scale.distillation.soft_labels import TEACHER, Teacher, crop_and_flip, resized_crop_boxes


class SRe2L(TeacherMethod, ImageMethod):
    default_steps: ClassVar[int] = 4000
    no_runtime: ClassVar[str] = "sre2l matches the statistics that a teacher has remembered, so there is no real batch"
    teacher_needs_batch_norm: ClassVar[bool] = True
    section_name: ClassVar[str] = "sre2l"
    options: SRe2LSection

    def __init__(self, context: MethodContext) -> None:
        self.options = self.section(context.config)
        super().__init__(context, self.options.init, self.options.image_lr, 0.0)
        self.flip = self.protocol(context.config).augment == "flip"

    def prepare(self, real: ClassSampler) -> None:
        super().prepare(real)
        context, options = self.context, self.options
        self.optimizer = torch.optim.Adam([self.images], self.lr, (options.beta1, options.beta2))
        self.teacher = Teacher.load(context.networks / TEACHER, context.device, options.teacher_network)
        self.batch_norm_loss = BatchNormLoss(self.teacher)
        black, white = torch.zeros(1, *context.spec.shape), torch.ones(1, *context.spec.shape)
        self.lowest, self.highest = (real.normalization.apply(255 * x).to(context.device) for x in (black, white))
        self.targets = torch.tensor(context.labels, device=context.device).repeat_interleave(self.ipc)
        order = []  # of the own images, flat
        for j in range(self.ipc):
            keys = {k: rng.derive(context.seed, "recovery order", j, label) for k, label in enumerate(context.labels)}
            order += [k * self.ipc + j for k in sorted(keys, key=keys.__getitem__)]
        self.batches = torch.tensor(order).tensor_split(math.ceil(len(order) / options.recover_batch))

    def step(self, i: int) -> dict[str, float]:
        """One update along the gradient of cross-entropy + `statistics` * batch norm loss, each averaged over a batch."""
        self.optimizer.param_groups[0]["lr"] = self.lr * (1 + math.cos(math.pi * i / self.context.steps)) / 2
        boxes, flipped = self._views(i)
        syn = self.images.detach().flatten(0, 1)
        gradient, losses, statistics = torch.zeros_like(syn), torch.zeros(len(syn), device=syn.device), 0.0
        for rows in self.batches:
            batch = syn[rows].requires_grad_(True)
            with self.batch_norm_loss:
                logits = self.teacher(crop_and_flip(batch, boxes[rows], None if flipped is None else flipped[rows]))
                distance = self.batch_norm_loss.value()
            entropy = F.cross_entropy(logits, self.targets[rows], reduction="none")
            (entropy.mean() + self.options.statistics * distance).backward()
            gradient[rows] = batch.grad  # type: ignore[assignment]
            losses[rows] = entropy.detach() + self.options.statistics * distance.detach()
            statistics += float(distance.detach()) * len(rows) / len(syn)
        self.images.grad = gradient.view_as(self.images)
        class_losses = losses.view(-1, self.ipc).mean(1)
        self.update(list(class_losses), i)
        self.raise_if_diverged()
        with torch.no_grad():
            self.images.clamp_(self.lowest, self.highest)
        return {"loss": float(class_losses.mean()), "statistics": statistics}

    def _views(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Crops [own images, 4] and flips [own images] of a step; those of a class depend on (seed, step, class) only."""
        draws = [rng.generator(self.context.seed, "recovery view", step, label) for label in self.context.labels]
        numbers = torch.cat([torch.rand(self.ipc, 5, generator=draw) for draw in draws])
        return resized_crop_boxes(numbers, self.options.recover_scale), numbers[:, 4] < 0.5 if self.flip else None


class BatchNormLoss:
    """Within a `with` block, how far the inputs of a network's batch norms are from the running statistics."""

    def __init__(self, network: nn.Module):
        self.terms: list[Tensor] = []
        self.recording = False
        for layer in network.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.register_forward_pre_hook(self._record)

    def __enter__(self) -> BatchNormLoss:
        self.terms, self.recording = [], True
        return self

    def __exit__(self, *_: object) -> None:
        self.terms, self.recording = [], False

    def _record(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.recording:
            channels = inputs[0].transpose(0, 1).flatten(1)  # C x all others
            mean, variance = channels.mean(1), channels.var(1, correction=0)
            self.terms.append((mean - layer.running_mean).norm() + (variance - layer.running_var).norm())  # type: ignore[operator]

    def value(self) -> Tensor:
        """Sum over the layers passed so far of |mean - running mean| + |variance - running variance|."""
        return torch.stack(self.terms).sum()
