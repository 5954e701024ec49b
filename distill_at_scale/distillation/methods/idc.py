"""IDC, multi-formation gradient matching with networks trained on real data (Kim et al. 2022, arXiv 2205.14959).

The steps and constants are in `distillation/README.md`. Workers train the same network: they exchange the real images of a
draw, which CutMix mixes across classes, and sum the gradients of their parts of each batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_at_scale.config.load import Config
from distill_at_scale.core.rng import generator
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.data.sampling.lookahead import DrawRequest
from distill_at_scale.distillation.augment import Augmentation, AugmentParams, apply_each, cutmix
from distill_at_scale.distillation.methods.contract import FinalOutputs, MethodContext
from distill_at_scale.distillation.methods.shared.gradient_distance import (
    absolute_distance,
    gradient_in_parts,
    squared_distance,
)
from distill_at_scale.distillation.methods.shared.gradient_matching import MatchingMethod, repeated_draw
from distill_at_scale.distillation.multi_formation import assemble_parts, split_parts
from distill_at_scale.distillation.student import TrainingProtocol

DISTANCES = {"mse": squared_distance, "l1": absolute_distance}
LR_IPC = 10  # the images per class that the published image rate belongs to


class IDC(MatchingMethod):
    default_steps: ClassVar[int] = 2000
    section_name: ClassVar[str] = "idc"

    @staticmethod
    def protocol(config: Config) -> TrainingProtocol:
        options = config.distill.idc
        return TrainingProtocol(1000, options.student_augment, cutmix=options.student_cutmix)

    def __init__(self, context: MethodContext) -> None:
        options = self.options = context.config.distill.idc
        lr = options.image_lr * context.config.distill.ipc / LR_IPC
        super().__init__(
            context, options.init, lr, options.image_momentum, options.augment, options.real_batch,
            DISTANCES[options.metric],
        )  # fmt: skip
        self.effect_distance = squared_distance  # absolute differences have no second derivative
        self.formation = options.factor**2  # training images in a stored one
        # as in the official code, batches with CutMix have no cutout
        families = [f for f in options.augment.split("_") if f != "cutout" or not options.network_cutmix]
        self.network_augmentation = Augmentation("_".join(families) or "none")

    @property
    def images_shown(self) -> int:
        return min(self.ipc * self.formation, self.options.synthetic_batch)

    def shown(
        self, syn: Tensor, labels: Sequence[int], params: Sequence[AugmentParams], step: int, outer: int
    ) -> Tensor:
        parts, size = split_parts(syn.flatten(0, 1), self.options.factor), self.ipc * self.formation
        if self.images_shown < size:
            rows = torch.cat([k * size + self._chosen(step, outer, label) for k, label in enumerate(labels)])
            parts = parts[rows.to(parts.device, non_blocking=True)]
        return apply_each(params, parts, [self.images_shown] * len(labels))

    def _chosen(self, step: int, outer: int, label: int) -> Tensor:
        """Which of a class's training images are shown, ascending."""
        rng = generator(self.context.seed, "synthetic batch", step, outer, label)
        return torch.randperm(self.ipc * self.formation, generator=rng)[: self.images_shown].sort().values

    def first_order_samples(self, real_batch: int) -> int:
        inner = self.options.inner
        return inner * self.context.spec.classes * real_batch + (inner - 1) * self.options.network_samples

    def prepare(self, real: ClassSampler) -> None:
        # the normalised values of pixels 0 and 255 [channels, 1, 1]; no bounds if the values are not pixels
        normalization, device = real.normalization, self.context.device
        if normalization.scale == 1 or normalization.whitening is not None:
            self.darkest, self.brightest = (torch.tensor(x, device=device) for x in (-math.inf, math.inf))
        else:
            pixels = torch.tensor([0, 255]).view(2, 1, 1, 1).expand(2, len(normalization.mean), 1, 1)
            self.darkest, self.brightest = normalization.apply(pixels).to(device)
        self.pixel_range = (self.brightest - self.darkest).nan_to_num(posinf=1.0)
        super().prepare(real)
        own_counts = {label: float(real.count(label)) for label in self.context.labels}
        counts = torch.tensor([own_counts.get(c, 0.0) for c in range(self.context.spec.classes)], device=device)
        self.context.workers.all_reduce_sum([counts])
        self.all_labels = torch.arange(len(counts)).repeat_interleave(counts.long().cpu())  # of all workers' samples

    def _initial_images(self, label: int) -> Tensor:
        images = super()._initial_images(label)
        if self.init == "real" or bool(self.darkest.isinf().all()):
            return images
        pixel_range, darkest = self.pixel_range.cpu(), self.darkest.cpu()
        return (images * pixel_range / 4 + darkest + pixel_range / 2).clamp(darkest, self.brightest.cpu())

    def real_images(self, label: int) -> Tensor:
        drawn = repeated_draw(self.real, label, self.ipc * self.formation, "initial images")
        return assemble_parts(drawn, self.options.factor)

    def draws(self, step: int) -> Iterator[DrawRequest]:
        for inner in range(self.options.inner):
            yield from self.matching_draws(step, inner)
            if inner < self.options.inner - 1:
                yield from self._network_draws(self._network_labels(step, inner), step, inner)

    def step(self, i: int) -> dict[str, float]:
        """Algorithm 1 of the paper for one random network."""
        options = self.options
        self.new_network(i)
        optimizer = torch.optim.SGD(
            self.net.parameters(),
            options.network_lr,
            options.network_momentum,
            weight_decay=options.network_weight_decay,
        )
        with torch.no_grad():
            self.images.copy_(self.images.clamp(self.darkest, self.brightest))
        total = 0.0
        for inner in range(options.inner):
            self.set_batch_norm_statistics(i, inner)
            total += self.match(i, inner, i * options.inner + inner)
            if inner < options.inner - 1:
                self._train_network(optimizer, i, inner)
        self.raise_if_diverged()
        return self.metrics(total, options.inner)

    def update(self, losses: Sequence[Tensor], step: int) -> list[float]:
        """The published rate belongs to pixels in [0, 1]: scales the gradient to them and the step back from them."""
        assert self.images.grad is not None
        self.images.grad.mul_(self.pixel_range.square())
        return super().update(losses, step)

    def _train_network(self, optimizer: torch.optim.Optimizer, step: int, inner: int) -> None:
        """Train the network on `network_samples` real samples of all classes, each worker on its part of each batch."""
        images, labels = self._network_samples(step, inner)
        workers, parameters = self.context.workers, list(self.net.parameters())
        for number, rows in enumerate(torch.arange(len(labels)).split(self.options.network_batch)):
            rng = generator(self.context.seed, "network augmentation", step, inner, number)
            seen, targets = self._augmented(images[rows.to(images.device)], labels[rows], rng)
            own = slice(workers.rank, None, workers.size)
            gradients = [torch.zeros_like(p) for p in parameters]
            if len(seen[own]):
                gradients = gradient_in_parts(self.forward, parameters, seen[own], targets[own], len(rows), self.part)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            workers.all_reduce_sum(gradients)
            optimizer.step()

    def _network_labels(self, step: int, inner: int) -> Tensor:
        """The labels [n] of the samples that train the network, in random order, the same in all workers."""
        rng = generator(self.context.seed, "network samples", step, inner)
        return self.all_labels[torch.randperm(len(self.all_labels), generator=rng)[: self.options.network_samples]]

    def _network_draws(self, labels: Tensor, step: int, inner: int) -> Iterator[DrawRequest]:
        counts = torch.bincount(labels, minlength=self.context.spec.classes).tolist()
        for label in self.context.labels:
            if counts[label]:
                yield DrawRequest((label,), counts[label], "network samples", (step, inner))

    def _network_samples(self, step: int, inner: int) -> tuple[Tensor, Tensor]:
        """Their images [n, *shape], of which each worker fills in those of its own classes, and labels [n]."""
        labels = self._network_labels(step, inner)
        images = torch.zeros(len(labels), *self.context.spec.shape, device=self.context.device)
        for request in self._network_draws(labels, step, inner):
            (batch,) = self.real.draw(request.labels, request.n, request.purpose, *request.index)
            images[(labels == batch.label).nonzero()[:, 0].to(images.device)] = batch.images
        self.context.workers.all_reduce_sum([images])
        return images, labels

    def _augmented(self, images: Tensor, labels: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """An augmented batch, with CutMix in a share `network_cutmix` of all batches, and its targets [n, classes]."""
        images = self.network_augmentation.draw(rng, per_image=len(images)).apply(images)
        targets = F.one_hot(labels, self.context.spec.classes).float().to(images.device)
        if len(images) < 2 or float(torch.rand(1, generator=rng)) >= self.options.network_cutmix:
            return images, targets
        mixed = cutmix(images, rng)
        return mixed.images, mixed.share * targets + (1 - mixed.share) * targets[mixed.order]

    def finalize(self, images: Tensor, labels: Tensor) -> FinalOutputs:
        return FinalOutputs(card={"formation": self.options.factor})
