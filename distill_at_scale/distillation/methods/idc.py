"""IDC, multi-formation matching with networks trained on real data (Kim et al. 2022, arXiv 2205.14959; METHOD.md section 4).

A stored image holds factor x factor training images (formation.py). Every step draws a new network; per inner iteration the
images of each class are matched once, by the squared or absolute difference of gradients, and then the network is trained
on real samples of all classes. Workers train the same network: they add up their shares of every batch of real images,
which CutMix mixes across classes, and then the gradients of their parts of it.

As in the official code, the image rate is that of pixels between 0 and 1 at ten images per class and grows with their number,
images are clipped to that range once a step, and where batches are cut and mixed the other augmentation cuts nothing out.
Left out: its rule that the rate grows with the resolution (relative to a size per data set), and networks trained
beforehand for ImageNet.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.rng import derive, generator
from distill_at_scale.data.prepared.normalization import Normalization
from distill_at_scale.data.sampling.class_sampler import ClassSampler
from distill_at_scale.distillation.augment import Augmentation, AugmentParams, cutmix
from distill_at_scale.distillation.methods.base import FinalOutputs, MethodContext, too_few_message
from distill_at_scale.distillation.methods.shared.gradient_distance import absolute_distance, squared_distance
from distill_at_scale.distillation.methods.shared.gradient_matching import MatchingMethod, View, repeated
from distill_at_scale.distillation.multi_formation import assembled, parts_of
from distill_at_scale.distillation.student import TrainingProtocol

METRICS = {"mse": squared_distance, "l1": absolute_distance}
RATE_IPC = 10  # the images per class that the published rate belongs to


class IDC(MatchingMethod):
    default_steps: ClassVar[int] = 2000

    @staticmethod
    def init_of(config: Config) -> str:
        return config.distill.idc.init

    @staticmethod
    def protocol(config: Config) -> TrainingProtocol:
        made = config.distill.idc
        return TrainingProtocol(1000, made.student_augment, cutmix=made.student_cutmix)

    def __init__(self, context: MethodContext) -> None:
        made = self.options = context.config.distill.idc
        lr = made.image_lr * context.config.distill.ipc / RATE_IPC
        super().__init__(
            context, made.init, lr, made.image_momentum, made.augment, made.real_batch, METRICS[made.metric]
        )
        self.judged = squared_distance  # absolute differences have no second derivative, which effects need
        families = [f for f in made.augment.split("_") if f != "cutout" or not made.network_cutmix]
        self.network_augmentation = Augmentation("_".join(families) or "none")

    @property
    def shown(self) -> int:
        return min(self.ipc * self.options.factor**2, self.options.synthetic_batch)

    def view(self, draw: AugmentParams, step: int, outer: int, label: int) -> View:
        chance = generator(self.context.seed, "synthetic batch", step, outer, label)
        order = torch.randperm(self.ipc * self.options.factor**2, generator=chance)[: self.shown].sort().values
        return lambda images: draw.apply(parts_of(images, self.options.factor)[order.to(images.device)])

    def prepare(self, real: ClassSampler) -> None:
        self.darkest, self.brightest = self._range(real.normalization)
        super().prepare(real)
        counts = torch.zeros(self.context.spec.classes)
        counts[self.context.labels] = torch.tensor([float(real.count(c)) for c in self.context.labels])
        counts = counts.to(self.context.device)
        self.context.workers.all_reduce_sum([counts])
        self.everything = torch.arange(len(counts)).repeat_interleave(counts.long().cpu())  # the label of every sample

    def _range(self, normalization: Normalization) -> tuple[Tensor, Tensor]:
        """What a channel's pixels 0 and 1 are for the network [channels, 1, 1]; without bounds where nothing is a pixel."""
        device = self.context.device
        if normalization.scale == 1 or normalization.whitening is not None:
            return torch.tensor(-math.inf, device=device), torch.tensor(math.inf, device=device)
        ends = torch.tensor([0, 255]).view(2, 1, 1, 1).expand(2, len(normalization.mean), 1, 1)
        darkest, brightest = normalization.apply(ends).to(device)
        return darkest, brightest

    @property
    def _scale(self) -> Tensor:
        """The length of the range of pixels; 1 where there is none."""
        return (self.brightest - self.darkest).nan_to_num(posinf=1.0)

    def _initial(self, label: int) -> Tensor:
        number = self.ipc * self.options.factor**2
        if self.init == "noise":
            noise = super()._initial(label)
            if bool(self.darkest.isinf().all()):
                return noise
            scale = self._scale.cpu()
            return self._clipped(noise * scale / 4 + self.darkest.cpu() + scale / 2)
        if self.real.count(label) < self.ipc:
            raise UserError(too_few_message(self.context.class_names[label], self.real.count(label), self.ipc))
        return assembled(repeated(self.real, label, number, "initial images"), self.options.factor).cpu()

    def _clipped(self, images: Tensor) -> Tensor:
        return images.clamp(self.darkest.to(images.device), self.brightest.to(images.device))

    def step(self, i: int) -> dict[str, float]:
        spec, made = self.context.spec, self.options
        network = spec.build(derive(self.context.seed, "network", i)).to(self.context.device).train()
        optimizer = torch.optim.SGD(
            network.parameters(), made.network_lr, made.network_momentum, weight_decay=made.network_weight_decay
        )
        with torch.no_grad():
            self.images.copy_(self._clipped(self.images))
        total = 0.0
        for inner in range(made.inner):
            self.set_batch_norm_statistics(network, i, inner)
            total += self.match(network, i, inner, i * made.inner + inner)
            if inner < made.inner - 1:
                self._train(network, optimizer, i, inner)
        self.raise_if_diverged()
        return self.metrics(total, made.inner)

    def update(self, losses: list[Tensor], step: int) -> None:
        """The published rate is for pixels between 0 and 1, so gradients are taken there and steps are scaled back."""
        assert self.images.grad is not None
        self.images.grad.mul_(self._scale.square())
        super().update(losses, step)

    def _train(self, network: nn.Module, optimizer: torch.optim.Optimizer, step: int, inner: int) -> None:
        """Train the network on a draw of real samples of all classes, in batches."""
        images, labels = self._samples(step, inner)
        parameters = list(network.parameters())
        for number, rows in enumerate(torch.arange(len(labels)).split(self.options.network_batch)):
            chance = generator(self.context.seed, "network augmentation", step, inner, number)
            seen, targets = self._mixed(images[rows.to(images.device)], labels[rows], chance)
            mine = slice(self.context.workers.rank, None, self.context.workers.size)
            gradients = [torch.zeros_like(p) for p in parameters]
            parts = zip(seen[mine].split(self.at_once), targets[mine].split(self.at_once), strict=True)
            for part, wanted in parts:
                if not len(part):
                    continue
                loss = F.cross_entropy(network(part), wanted, reduction="sum") / len(rows)
                for gradient, more in zip(gradients, torch.autograd.grad(loss, parameters), strict=True):
                    gradient.add_(more)
            self.context.workers.all_reduce_sum(gradients)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()

    def _samples(self, step: int, inner: int) -> tuple[Tensor, Tensor]:
        """Real images [n, *shape] and labels [n] in a random order, the same on every worker."""
        chance = generator(self.context.seed, "network samples", step, inner)
        labels = self.everything[torch.randperm(len(self.everything), generator=chance)[: self.options.network_samples]]
        images = torch.zeros(len(labels), *self.context.spec.shape, device=self.context.device)
        for label in self.context.labels:
            places = (labels == label).nonzero()[:, 0]
            if len(places):
                drawn = self.real.draw([label], len(places), "network samples", step, inner)[0]
                images[places.to(images.device)] = drawn.images
        self.context.workers.all_reduce_sum([images])  # each worker knows its own classes' images
        return images, labels

    def _mixed(self, images: Tensor, labels: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor]:
        """An augmented batch, often cut and mixed, and its targets [n, classes]."""
        images = self.network_augmentation.draw(chance, per_image=len(images)).apply(images)
        targets = F.one_hot(labels, self.context.spec.classes).float().to(images.device)
        if len(images) < 2 or float(torch.rand(1, generator=chance)) >= self.options.network_cutmix:
            return images, targets
        mixed = cutmix(images, chance)
        return mixed.images, mixed.share * targets + (1 - mixed.share) * targets[mixed.order]

    def finalize(self, images: Tensor, labels: Tensor) -> FinalOutputs:
        return FinalOutputs(card={"formation": self.options.factor})
